"""Who may act on a run, and what becomes of it when nobody does: pure deciders that take `now`.

Only the database's clock is ever passed as `now`, so that workers whose clocks differ agree.
"""

from datetime import datetime, timedelta
from enum import StrEnum

from pydantic import BaseModel, ConfigDict

from service.core.run import MAX_ATTEMPTS, Outcome, Phase, Reason, Verdict


class LeaseView(BaseModel):
    """What the store knows of one run's lease. Instants in aware UTC."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    tenant: str = ""
    phase: Phase
    boundary: str = ""
    """As queued, e.g. `namespace/gvisor`: only a reaper that can see such boundaries may call one absent."""
    attempt: int
    fence: int
    lease_until: datetime | None
    created_at: datetime
    destroyed_fence: int = 0
    """The highest fence whose boundary was observed to be gone."""
    quarantined_fence: int = 0
    """The highest fence whose boundary was said to be quarantined."""
    cancel_requested_by: str | None = None

    @property
    def is_active(self) -> bool:
        """Somebody should be acting on it."""
        return self.phase not in (Phase.QUEUED, Phase.FINISHED)


class Recovery(StrEnum):
    REQUEUE = "requeue"
    FINISH = "finish"


class Recover(BaseModel):
    model_config = ConfigDict(frozen=True)

    action: Recovery
    verdict: Verdict | None = None


def overdue(view: LeaseView, *, now: datetime) -> bool:
    """The lease has run out while somebody should be acting."""
    return view.phase not in (Phase.QUEUED, Phase.FINISHED) and view.lease_until is not None and view.lease_until < now


def gone(view: LeaseView | None, fence: int, *, now: datetime) -> bool:
    """True when the boundary of `fence` has no run that claims it, so that the reaper may destroy it."""
    if view is None or view.fence != fence or view.phase in (Phase.QUEUED, Phase.FINISHED):
        return True
    return overdue(view, now=now)


def recover(view: LeaseView, *, now: datetime, max_queue: timedelta) -> Recover | None:
    """What the reconciler does with a run: None leaves it. Untrusted code is never silently run twice."""
    if view.phase is Phase.QUEUED and now - view.created_at > max_queue:
        return _finish(
            Outcome.ERRORED, Reason.QUEUE_EXPIRED, f"no worker claimed the run within {max_queue.total_seconds():.0f} s"
        )
    if not overdue(view, now=now):
        return None
    if view.cancel_requested_by is not None:
        return Recover(action=Recovery.FINISH, verdict=cancelled(view.cancel_requested_by))
    if view.phase is Phase.PROVISIONING:
        if view.attempt < MAX_ATTEMPTS:
            return Recover(action=Recovery.REQUEUE)
        return _finish(
            Outcome.ERRORED, Reason.PROVISION_FAILED, f"the worker was lost while provisioning, attempt {view.attempt}"
        )
    return _finish(
        Outcome.ERRORED, Reason.WORKER_LOST, f"the worker was lost while the run was {view.phase}; it is not run again"
    )


def instead_of_another_attempt(view: LeaseView, *, why: str, counts: bool) -> Verdict | None:
    """Provisioning failed: the verdict that ends the run, or None when it returns to the queue. `counts=False`: the
    attempt is not held against the run."""
    if view.cancel_requested_by is not None:
        return cancelled(view.cancel_requested_by)
    if counts and view.attempt >= MAX_ATTEMPTS:
        message = f"provisioning failed {view.attempt} times; the last time: {why}"
        return Verdict(outcome=Outcome.ERRORED, reason=Reason.PROVISION_FAILED, message=message)
    return None


def cancelled(by: str) -> Verdict:
    """`by` is `tenant` or `operator`."""
    reason = Reason.CANCELLED_BY_OPERATOR if by == "operator" else Reason.CANCELLED_BY_TENANT
    return Verdict(outcome=Outcome.CANCELLED, reason=reason, message=f"cancelled by the {by}")


def _finish(outcome: Outcome, reason: Reason, message: str) -> Recover:
    return Recover(action=Recovery.FINISH, verdict=Verdict(outcome=outcome, reason=reason, message=message))
