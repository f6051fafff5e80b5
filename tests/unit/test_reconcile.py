"""What a lost worker or a lost message leaves behind is found again from the store alone."""

import threading
from collections.abc import Iterator, MutableMapping
from datetime import timedelta
from typing import Any

import pytest
import structlog

from service.adapters.memory import MemoryDoorbell, MemoryHints, MemoryStore
from service.core.lease import LeaseView
from service.core.run import MAX_ATTEMPTS, Outcome, Phase, Reason, Verdict
from tests.contract.store_steps import add_run, add_tenant, bring_to, claimed, types_told
from tests.scenes import RUN_OUT, Clock
from workers.reconcile import reconcile

MAX_QUEUE = timedelta(hours=1)
RING_AFTER = timedelta(seconds=30)


@pytest.fixture(autouse=True)
def logged() -> Iterator[list[MutableMapping[str, Any]]]:
    with structlog.testing.capture_logs() as entries:
        yield entries


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> MemoryStore:
    store = MemoryStore(clock=clock)
    add_tenant(store, concurrent=10)
    return store


@pytest.fixture
def doorbell() -> MemoryDoorbell:
    return MemoryDoorbell()


@pytest.fixture
def hints() -> MemoryHints:
    return MemoryHints()


def _reconcile(store: MemoryStore, doorbell: MemoryDoorbell, hints: MemoryHints | None = None) -> int:
    return reconcile(store, doorbell, hints or MemoryHints(), max_queue=MAX_QUEUE, ring_after=RING_AFTER)


def test_nothing_is_done_where_nothing_is_wrong(
    store: MemoryStore, doorbell: MemoryDoorbell, hints: MemoryHints
) -> None:
    add_run(store)
    bring_to(store, Phase.RUNNING)
    add_run(store)

    assert _reconcile(store, doorbell, hints) == 0
    assert (doorbell.rings, hints.given) == ([], [])


def test_a_run_that_waits_has_its_bell_rung_again(store: MemoryStore, doorbell: MemoryDoorbell, clock: Clock) -> None:
    add_run(store)
    add_run(store)
    add_run(store, boundary="namespace/runc")
    clock.now += timedelta(seconds=29)
    _reconcile(store, doorbell)
    assert doorbell.rings == []

    clock.now += timedelta(seconds=2)

    assert _reconcile(store, doorbell) == 0
    assert doorbell.rings == ["gvisor", "namespace/runc"]


@pytest.mark.parametrize(
    ("phase", "then", "reason", "word"),
    [
        (Phase.PROVISIONING, Phase.QUEUED, None, "run_requeued"),
        (Phase.RUNNING, Phase.FINISHED, Reason.WORKER_LOST, "run_ended"),
        (Phase.COLLECTING, Phase.FINISHED, Reason.WORKER_LOST, "run_ended"),
    ],
)
def test_a_lost_worker_means_again_before_the_guest_ran_and_an_error_after(
    store: MemoryStore,
    doorbell: MemoryDoorbell,
    hints: MemoryHints,
    clock: Clock,
    phase: Phase,
    then: Phase,
    reason: Reason | None,
    word: str,
    logged: list[MutableMapping[str, Any]],
) -> None:
    run = add_run(store)
    bring_to(store, phase)
    clock.now += RUN_OUT

    assert _reconcile(store, doorbell, hints) == 1

    found = store.get_run(run.id, None)
    assert (found.phase, found.reason) == (then, reason)
    assert hints.given == [("run", run.id), ("outbox", run.id)]
    assert [(entry["event"], entry["log_level"], entry["run_id"], entry["was"]) for entry in logged] == [
        (word, "warning", run.id, str(phase))
    ]
    assert _reconcile(store, doorbell, hints) == 0, "once is enough"


@pytest.mark.parametrize("phase", [Phase.PROVISIONING, Phase.RUNNING, Phase.COLLECTING])
def test_a_worker_that_still_holds_its_lease_is_not_lost(
    store: MemoryStore, doorbell: MemoryDoorbell, clock: Clock, phase: Phase
) -> None:
    run = add_run(store)
    bring_to(store, phase)
    clock.now += timedelta(seconds=29)

    assert _reconcile(store, doorbell) == 0
    assert store.get_run(run.id, None).phase is phase


def test_a_run_whose_worker_was_lost_too_often_while_provisioning_ends(
    store: MemoryStore, doorbell: MemoryDoorbell, clock: Clock
) -> None:
    run = add_run(store)
    for _ in range(MAX_ATTEMPTS):
        held = claimed(store)
        clock.now += RUN_OUT
        assert _reconcile(store, doorbell) == 1
        store.record_destroyed(run.id, held.fence)

    found = store.get_run(run.id, None)
    assert (found.outcome, found.reason) == (Outcome.ERRORED, Reason.PROVISION_FAILED)


def test_a_run_that_waited_too_long_ends(store: MemoryStore, doorbell: MemoryDoorbell, clock: Clock) -> None:
    run = add_run(store)
    clock.now += MAX_QUEUE
    assert _reconcile(store, doorbell) == 0
    doorbell.rings.clear()

    clock.now += timedelta(seconds=1)

    assert _reconcile(store, doorbell) == 1
    assert store.get_run(run.id, None).reason is Reason.QUEUE_EXPIRED
    assert doorbell.rings == []


def test_a_run_that_was_to_be_cancelled_when_its_worker_was_lost_is_cancelled(
    store: MemoryStore, doorbell: MemoryDoorbell, clock: Clock
) -> None:
    run = add_run(store)
    bring_to(store, Phase.RUNNING)
    store.request_cancel(run.id, None, by="tenant")
    clock.now += RUN_OUT

    assert _reconcile(store, doorbell) == 1

    assert store.get_run(run.id, None).outcome is Outcome.CANCELLED


def test_a_run_that_moved_on_meanwhile_is_not_counted(
    doorbell: MemoryDoorbell, hints: MemoryHints, clock: Clock
) -> None:
    class Moving(MemoryStore):
        """Another reconciler is always a moment faster."""

        def recover_finish(self, view: LeaseView, verdict: Verdict) -> bool:
            super().recover_finish(view, verdict)
            return super().recover_finish(view, verdict)

    moving = Moving(clock=clock)
    add_tenant(moving)
    add_run(moving)
    bring_to(moving, Phase.RUNNING)
    clock.now += RUN_OUT

    assert _reconcile(moving, doorbell, hints) == 0
    assert hints.given == []


def test_runs_are_recovered_though_no_bell_can_be_rung(
    store: MemoryStore, doorbell: MemoryDoorbell, clock: Clock, logged: list[MutableMapping[str, Any]]
) -> None:
    add_run(store)
    bring_to(store, Phase.RUNNING)
    add_run(store)
    clock.now += RUN_OUT
    doorbell.away = True

    assert _reconcile(store, doorbell) == 1
    assert [entry["event"] for entry in logged] == ["run_ended", "doorbell_unavailable"]

    doorbell.away = False
    _reconcile(store, doorbell)
    assert doorbell.rings == ["gvisor"]


def test_several_at_once_recover_each_run_once(store: MemoryStore, doorbell: MemoryDoorbell, clock: Clock) -> None:
    runs = [add_run(store) for _ in range(10)]
    for _ in runs:
        bring_to(store, Phase.RUNNING)
    clock.now += RUN_OUT
    start = threading.Barrier(4)
    changed: list[int] = []

    def work() -> None:
        start.wait()
        changed.append(_reconcile(store, doorbell))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sum(changed) == len(runs)
    assert all(types_told(store, run.id).count("run.finished") == 1 for run in runs)
