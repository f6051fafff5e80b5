"""Why a queued run waits: each reason, and which of several is named."""

from typing import Any

import pytest

from service.core.news import PhaseView
from service.core.run import Phase, QueueReason
from service.core.waiting import QueueView, WorkerView, explained, why_queued
from tests.factories import make_capabilities, make_run


def worker(*, playing: int = 0, slots: int = 2, draining: bool = False, **measured: Any) -> WorkerView:
    return WorkerView(
        capabilities=(make_capabilities(**measured),), slots=slots, playing=playing, draining=draining
    )  # fmt: skip


def waiting(*workers: WorkerView, **more: Any) -> QueueView:
    words: dict[str, Any] = {
        "tenant": "acme", "boundary": "gvisor", "runtime": "default", "attempt": 0, "held_back": False, "active": 0,
        "concurrent": 2, "workers": workers,
    }  # fmt: skip
    return QueueView(**words | more)


BUSY, DRAINING, FREE = worker(playing=2), worker(draining=True), worker(playing=1)
CASES: dict[str, tuple[QueueView, QueueReason | None, str | None]] = {
    "nobody lives": (waiting(), QueueReason.NO_WORKER, "no live worker builds gvisor"),
    "who lives cannot build it": (
        waiting(worker(available=False), worker(boundary="microvm")),
        QueueReason.NO_WORKER,
        "no live worker builds gvisor",
    ),
    "who builds it has not its runtime": (
        waiting(FREE, runtime="python"),
        QueueReason.NO_WORKER,
        "no live worker offers gvisor with runtime python",
    ),
    "the site drains": (
        waiting(DRAINING, worker(draining=True, playing=2), worker(boundary="microvm")),
        QueueReason.DRAINING,
        "every worker that builds gvisor is draining: it takes no more runs",
    ),
    "one drains and the other is busy": (
        waiting(DRAINING, BUSY),
        QueueReason.WORKERS_BUSY,
        "every worker that builds gvisor is busy",
    ),
    "all are busy": (
        waiting(BUSY, worker(playing=3, slots=3)),
        QueueReason.WORKERS_BUSY,
        "every worker that builds gvisor is busy",
    ),
    "its tenant is at its cap": (
        waiting(FREE, active=2),
        QueueReason.TENANT_AT_CAP,
        "tenant acme has 2 runs under way and may have 2",
    ),
    "its tenant's cap was lowered meanwhile": (
        waiting(FREE, active=2, concurrent=1),
        QueueReason.TENANT_AT_CAP,
        "tenant acme has 2 runs under way and may have 1",
    ),
    "its tenant's one run": (
        waiting(BUSY, active=1, concurrent=1),
        QueueReason.TENANT_AT_CAP,
        "tenant acme has 1 run under way and may have 1",
    ),
    "what it left is still there": (
        waiting(FREE, attempt=2, held_back=True, active=2),
        QueueReason.CLEANING_UP,
        "what attempt 2 made is not yet known to be gone",
    ),
    "its tenant's nodes are gone": (
        waiting(worker(boundary="namespace/runc"), boundary="namespace/runc+affinity/blue"),
        QueueReason.NO_WORKER,
        "no live worker builds namespace/runc+affinity/blue",
    ),
    "its tenant's nodes are there": (
        waiting(
            worker(boundary="namespace/runc", node_groups=frozenset({"blue"})), boundary="namespace/runc+affinity/blue"
        ),
        None,
        None,
    ),
    "without a worker nothing else matters": (
        waiting(held_back=True, active=2),
        QueueReason.NO_WORKER,
        "no live worker builds gvisor",
    ),
    "a worker is free": (waiting(BUSY, DRAINING, FREE, active=1), None, None),
}


@pytest.mark.parametrize(("view", "reason", "message"), CASES.values(), ids=list(CASES))
def test_what_is_in_its_way_is_named(view: QueueView, reason: QueueReason | None, message: str | None) -> None:
    assert why_queued(view) == (None if reason is None else (reason, message))


def test_every_reason_is_given_by_some_case() -> None:
    assert {reason for _, reason, _ in CASES.values()} == {*QueueReason, None}


def test_the_reason_is_put_on_the_run_and_on_its_phase_and_only_while_it_is_queued() -> None:
    run = make_run()
    phase = PhaseView(phase=Phase.QUEUED, at=None, attempt=0, outcome=None, reason=None, queue_position=1)
    shown, told = explained(run, waiting()), explained(phase, waiting())

    assert (shown.queue_reason, shown.message) == (QueueReason.NO_WORKER, "no live worker builds gvisor")
    assert (told.queue_reason, told.message) == (shown.queue_reason, shown.message)
    assert shown.reason is None, "that is why it ended"
    assert explained(run, None) == run
    assert explained(run, waiting(FREE)) == run
