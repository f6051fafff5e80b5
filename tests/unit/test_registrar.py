"""A worker's parent says again and again what it can build, and listens to what has become possible since."""

from types import SimpleNamespace
from typing import Any

import pytest

from service.adapters.celery_queue import queue_name
from service.core.boundary import Capabilities
from service.core.errors import Unavailable
from service.core.ports.tenants import WorkerRecord
from tests.factories import make_capabilities
from workers.registrar import registering


class Store:
    def __init__(self) -> None:
        self.recorded: list[WorkerRecord] = []
        self.draining = self.away = False

    def record_worker(self, worker: WorkerRecord) -> None:
        if self.away:
            raise Unavailable("no database")
        self.recorded.append(worker)

    def is_draining(self, worker_id: str) -> bool:
        return self.draining


class Parent:
    """As Celery has it: a timer that never fires by itself, and a consumer that notes what it is told."""

    def __init__(self) -> None:
        self.rows: tuple[Capabilities, ...] = (row(),)
        self.store = Store()
        self.heard = {"namespace/runc": "boundary.namespace.runc"}
        self.added: list[str] = []
        record = WorkerRecord(id="wrk_1", host="h", site="s", capabilities=self.rows, slots=1)
        step = registering(
            self.store, record, measure=lambda: self.rows, heard=self.heard, queue_name=queue_name, every_s=30
        )
        worker: Any = SimpleNamespace(
            steps=[],
            timer=SimpleNamespace(call_repeatedly=lambda seconds, beat: None),
            consumer=SimpleNamespace(add_task_queue=self.added.append),
        )
        self.registrar = step(worker)
        self.registrar.start(worker)


def row(*groups: str, available: bool = True) -> Capabilities:
    return make_capabilities(boundary="namespace/runc", available=available, node_groups=frozenset(groups))


@pytest.fixture
def parent() -> Parent:
    return Parent()


def test_a_node_group_that_is_new_is_listened_to_once(parent: Parent) -> None:
    parent.registrar.beat()
    assert parent.added == [], "what it listens to already"
    parent.rows = (row("blue"), make_capabilities(boundary="microvm"))
    parent.registrar.beat()
    parent.registrar.beat()
    assert parent.added == ["boundary.namespace.runc+affinity.blue", "boundary.microvm"]
    assert parent.store.recorded[-1].capabilities == parent.rows
    assert list(parent.heard) == ["namespace/runc", "namespace/runc+affinity/blue", "microvm"]


def test_what_cannot_be_built_is_not_listened_to(parent: Parent) -> None:
    parent.rows = (row("blue", available=False),)
    parent.registrar.beat()
    assert parent.added == []


def test_a_worker_that_drains_listens_to_nothing_new(parent: Parent) -> None:
    parent.rows, parent.store.draining = (row("blue"),), True
    parent.registrar.beat()
    assert parent.added == []
    parent.store.draining = False
    parent.registrar.beat()
    assert parent.added == ["boundary.namespace.runc+affinity.blue"], "the control"


def test_a_database_that_is_away_ends_no_beat(parent: Parent) -> None:
    parent.rows, parent.store.away = (row("blue"),), True
    parent.registrar.beat()
    assert parent.added == []
    parent.store.away = False
    parent.registrar.beat()
    assert len(parent.added) == 1
