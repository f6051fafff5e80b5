"""Tenants take turns on the real line: Celery's bells from Redis, a worker's processes, claims in the database."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service.adapters.celery_queue import CeleryDoorbell
from service.adapters.sql_store import SqlStore
from service.core.events import EventType
from service.core.run import Outcome, Phase, QueueReason
from service.core.waiting import why_queued
from tests.bench.programs import program
from tests.contract.store_steps import DAY, LEASE, add_run, add_tenant
from tests.factories import make_scenario
from tests.servers import RedisServer

pytestmark = pytest.mark.timeout(120)
WITHIN_S = 60.0


@pytest.fixture
def store(sqlite_database: str) -> Iterator[SqlStore]:
    store = SqlStore(sqlite_database)
    store.migrate()
    yield store
    store.close()


def eventually(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not true():
        assert time.monotonic() < deadline, f"not within {WITHIN_S:g} s"
        time.sleep(0.05)


def claimed_in_order(store: SqlStore) -> list[str]:
    """The tenants of the runs, in the order in which they were claimed."""
    assert store.lead("test", lease=LEASE)
    store.stamp("test", limit=1000)
    rows = store.retained(after=0, limit=1000)
    return [row.tenant for row in rows if row.type == EventType.PROVISIONING]


def test_a_tenant_that_comes_last_is_second_and_the_reason_why_the_others_wait_is_told(
    store: SqlStore, redis_server: RedisServer, tmp_path: Path
) -> None:
    scenario = make_scenario(steps=[{"name": "work", "run": ["sleep", "0.1"]}])
    doorbell = CeleryDoorbell(redis_server.url)
    for name in ("heavy", "light"):
        add_tenant(store, name=name, concurrent=5)
    for name in ("heavy",) * 8 + ("light",) * 2:
        doorbell.ring(add_run(store, tenant=name, scenario=scenario).placement.boundary)
    last = add_run(store, tenant="heavy", scenario=scenario)
    reasons: set[QueueReason] = set()

    def look() -> bool:
        for view in store.queue_views([last.id], worker_fresh=DAY).values():
            reasons.update(reason for reason, _ in filter(None, [why_queued(view)]))
        run = store.get_run(last.id, None)
        return run.phase is Phase.FINISHED and run.outcome is Outcome.PASSED

    settings = {
        "database_url": store._db.url.render_as_string(hide_password=False), "redis_url": redis_server.url,
        "state_dir": tmp_path / "state", "runtime_dir": tmp_path / "run", "site": "here", "worker_concurrency": 1,
    }  # fmt: skip
    assert not look()
    with program("worker", tmp_path, settings=settings):
        eventually(look)

    assert claimed_in_order(store) == ["heavy", "light"] * 2 + ["heavy"] * 7
    assert reasons == {QueueReason.NO_WORKER, QueueReason.WORKERS_BUSY}
