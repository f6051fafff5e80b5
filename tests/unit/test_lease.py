"""The deciders: who may act on a run, and what becomes of it when nobody does. Tables; `now` is an argument."""

from datetime import timedelta
from typing import Any

import pytest

from service.core.lease import (
    LeaseView,
    Recover,
    Recovery,
    cancelled,
    gone,
    instead_of_another_attempt,
    overdue,
    recover,
)
from service.core.run import ACTIVE, MAX_ATTEMPTS, Outcome, Phase, Reason
from tests.factories import NOON, make_run_id

SECOND = timedelta(seconds=1)
HOUR = timedelta(hours=1)
LATE = NOON - SECOND
LIVE = NOON + SECOND


def make_view(*, phase: Phase = Phase.RUNNING, **more: Any) -> LeaseView:
    words: dict[str, Any] = {"run_id": make_run_id(), "attempt": 1, "fence": 1, "created_at": NOON, "lease_until": LIVE}
    return LeaseView(**words | {"phase": phase} | more)


@pytest.mark.parametrize("phase", list(Phase))
def test_only_an_active_phase_can_be_overdue(phase: Phase) -> None:
    assert overdue(make_view(phase=phase, lease_until=LATE), now=NOON) is (phase in ACTIVE)


@pytest.mark.parametrize(("until", "late"), [(LATE, True), (NOON, False), (LIVE, False), (None, False)])
def test_a_lease_holds_up_to_and_with_its_last_instant(until: Any, late: bool) -> None:
    assert overdue(make_view(lease_until=until), now=NOON) is late


@pytest.mark.parametrize(
    ("view", "fence", "is_gone"),
    [
        pytest.param(None, 1, True, id="no run claims it"),
        pytest.param(make_view(), 1, False, id="its holder acts"),
        pytest.param(make_view(fence=2), 1, True, id="an older fence"),
        pytest.param(make_view(lease_until=LATE), 1, True, id="its lease has run out"),
        pytest.param(make_view(phase=Phase.QUEUED, lease_until=None), 1, True, id="returned to the queue"),
        pytest.param(make_view(phase=Phase.FINISHED, lease_until=None), 1, True, id="finished"),
    ],
)
def test_a_boundary_may_be_destroyed_only_when_no_run_claims_it(
    view: LeaseView | None, fence: int, is_gone: bool
) -> None:
    assert gone(view, fence, now=NOON) is is_gone


REQUEUE = (Recovery.REQUEUE, None, None)
WORKER_LOST = (Recovery.FINISH, Outcome.ERRORED, Reason.WORKER_LOST)
PROVISION_FAILED = (Recovery.FINISH, Outcome.ERRORED, Reason.PROVISION_FAILED)
EXPIRED = (Recovery.FINISH, Outcome.ERRORED, Reason.QUEUE_EXPIRED)
CANCELLED = (Recovery.FINISH, Outcome.CANCELLED, Reason.CANCELLED_BY_TENANT)


@pytest.mark.parametrize(
    ("words", "decided"),
    [
        ({"phase": Phase.QUEUED, "lease_until": None, "created_at": NOON - HOUR}, None),
        ({"phase": Phase.QUEUED, "lease_until": None, "created_at": NOON - HOUR - SECOND}, EXPIRED),
        ({"phase": Phase.FINISHED, "lease_until": None, "created_at": NOON - 9 * HOUR}, None),
        *(({"phase": phase, "created_at": NOON - 9 * HOUR}, None) for phase in sorted(ACTIVE)),
        ({"phase": Phase.PROVISIONING, "lease_until": LATE, "attempt": MAX_ATTEMPTS - 1}, REQUEUE),
        ({"phase": Phase.PROVISIONING, "lease_until": LATE, "attempt": MAX_ATTEMPTS}, PROVISION_FAILED),
        ({"phase": Phase.RUNNING, "lease_until": LATE}, WORKER_LOST),
        ({"phase": Phase.COLLECTING, "lease_until": LATE}, WORKER_LOST),
        *(
            ({"phase": phase, "lease_until": LATE, "cancel_requested_by": "tenant"}, CANCELLED)
            for phase in sorted(ACTIVE)
        ),
        ({"phase": Phase.RUNNING, "cancel_requested_by": "tenant"}, None),
    ],
    ids=str,
)  # fmt: skip
def test_what_the_reconciler_does(words: dict[str, Any], decided: Any) -> None:
    found = recover(make_view(**words), now=NOON, max_queue=HOUR)

    assert _short(found) == decided


def _short(found: Recover | None) -> Any:
    if found is None:
        return None
    verdict = found.verdict
    return found.action, verdict and verdict.outcome, verdict and verdict.reason


@pytest.mark.parametrize(
    ("attempt", "asked_for_by", "counts", "reason"),
    [
        (1, None, True, None),
        (MAX_ATTEMPTS - 1, None, True, None),
        (MAX_ATTEMPTS, None, True, Reason.PROVISION_FAILED),
        (MAX_ATTEMPTS, None, False, None),
        (1, "operator", True, Reason.CANCELLED_BY_OPERATOR),
        (MAX_ATTEMPTS, "tenant", False, Reason.CANCELLED_BY_TENANT),
    ],
)
def test_a_failed_attempt_is_the_last_when_it_is_the_third_or_the_end_was_asked_for(
    attempt: int, asked_for_by: str | None, counts: bool, reason: Reason | None
) -> None:
    view = make_view(phase=Phase.PROVISIONING, attempt=attempt, cancel_requested_by=asked_for_by)
    verdict = instead_of_another_attempt(view, why="no room", counts=counts)

    assert (verdict and verdict.reason) == reason


def test_who_cancelled_is_the_reason() -> None:
    assert [cancelled(by).reason for by in ("tenant", "operator")] == [
        Reason.CANCELLED_BY_TENANT, Reason.CANCELLED_BY_OPERATOR,
    ]  # fmt: skip
