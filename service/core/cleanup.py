"""What stands on the sites, and what becomes of it: pure deciders that take `now`, and an operator's plan.

The reaper and the operators' clean-up decide by the same words. Only the database's clock is ever passed as `now`.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from enum import StrEnum

from pydantic import BaseModel, ConfigDict

from service.core.boundary import STANDBY_TENANT, BoundaryRef
from service.core.lease import LeaseView, gone

KILL_GRACE = timedelta(seconds=3)
"""A worker that is told to end its run has so long to do it itself; then its boundary is destroyed under it."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BoundaryState(StrEnum):
    LIVE = "live"  # somebody acts on its run, under its fence
    ORPHAN = "orphan"  # no run claims it
    OVERDUE = "overdue"  # who acted on its run was lost, or its own lifetime is over
    QUARANTINED = "quarantined"  # it resists destruction past its deadline, or its site is silent


class StandbyState(StrEnum):
    """Of a boundary that was made before anybody asked."""

    BEING_MADE = "being_made"
    READY = "ready"
    CLAIMED = "claimed"  # by the run whose name it bears since then


class Observed(_Frozen):
    """One boundary as a reaper just found it. `standby`: None for one that was made for its run."""

    ref: BoundaryRef
    state: BoundaryState
    standby: StandbyState | None = None


class InventoryRow(_Frozen):
    """What is known of one discovered boundary. `resisting_since`: when its destruction was first tried in vain;
    `standby`: as `Observed` has it."""

    ref: BoundaryRef
    created_at: datetime
    observed_at: datetime
    state: BoundaryState
    resisting_since: datetime | None = None
    standby: StandbyState | None = None


class SiteRecord(_Frozen):
    """`last_seen_at`: when its reaper last listed its world."""

    name: str
    last_seen_at: datetime
    forgotten_at: datetime | None = None

    def is_silent(self, *, now: datetime, after: timedelta) -> bool:
        return now - self.last_seen_at > after


def state_of(ref: BoundaryRef, view: LeaseView | None, *, now: datetime, resists: bool = False) -> BoundaryState:
    """`view` was read after the boundary was listed, `now` before `view`. `resists`: it is known to be quarantined."""
    is_probe = ref.fence == 0  # it is trying the wall out; runs have fences from 1 on
    unwanted = now >= ref.expires_at if is_probe else gone(view, ref.fence, now=now) or _is_expired(ref, now=now)
    if not unwanted:
        return BoundaryState.LIVE
    if resists:
        return BoundaryState.QUARANTINED
    if ref.fence == 0 or view is None or view.fence != ref.fence or not view.is_active:
        return BoundaryState.ORPHAN
    return BoundaryState.OVERDUE


def _is_expired(ref: BoundaryRef, *, now: datetime) -> bool:
    """A boundary that lost its label has no lifetime that could be over, and no tenant."""
    return bool(ref.tenant) and now >= ref.expires_at


def named(ref: BoundaryRef, view: LeaseView | None) -> BoundaryRef:
    """With its tenant's name, where only a hash of that was read back and the run is known."""
    if view is None or view.tenant == ref.tenant or not ref.is_of(view.tenant):
        return ref
    return ref.model_copy(update={"tenant": view.tenant})


def resists_too_long(since: datetime, *, now: datetime, quarantine_after: timedelta) -> bool:
    return now - since >= quarantine_after


def shown(
    rows: Iterable[InventoryRow], sites: Iterable[SiteRecord], *, now: datetime, silent_after: timedelta
) -> list[InventoryRow]:
    """As operators see it: what a silent site had is quarantined until it answers."""
    silent = {site.name for site in sites if site.is_silent(now=now, after=silent_after)}
    return [
        row.model_copy(update={"state": BoundaryState.QUARANTINED}) if row.ref.site in silent else row for row in rows
    ]


# --- an operator's plan ----------------------------------------------------------------------------------------------


class Scope(_Frozen):
    """Which boundaries; what is given is combined by AND. `boundary` is a name, `orphans` whatever is not live."""

    tenant: str | None = None
    run: str | None = None
    boundary: str | None = None
    orphans: bool = False
    older_than: timedelta | None = None

    @property
    def is_empty(self) -> bool:
        return self == Scope()

    def covers(self, row: InventoryRow, *, now: datetime) -> bool:
        ref = row.ref
        return (
            (self.tenant is None or ref.is_of(self.tenant))
            and self.run in (None, ref.run_id)
            and self.boundary in (None, ref.name)
            and not (self.orphans and row.state is BoundaryState.LIVE)
            and (self.older_than is None or now - row.created_at >= self.older_than)
        )


class ActionKind(StrEnum):
    DESTROY = "destroy"
    KILL = "kill"  # a live one: its run is ended as cancelled_by_operator, and the boundary destroyed
    REFUSE = "refuse"  # a live one, without force


class ActionResult(StrEnum):
    DESTROYED = "destroyed"  # observed: nothing of it is left
    REFUSED = "refused"
    QUARANTINED = "quarantined"  # it resists; the reaper goes on trying


class PlannedAction(_Frozen):
    """One line. `result` begins with the word of an `ActionResult`; None while its site works, or in a dry run."""

    ref: BoundaryRef
    action: ActionKind
    why: str
    result: str | None = None


class CleanupPlan(_Frozen):
    """`applied_at` is None for a dry run. What is applied are exactly these lines."""

    id: str
    asked_by: str
    at: datetime
    force: bool
    actions: tuple[PlannedAction, ...]
    applied_at: datetime | None = None
    done_at: datetime | None = None


class Order(_Frozen):
    """A line of an applied plan, for the reaper of its site. `at`: when the plan was applied."""

    plan_id: str
    n: int
    ref: BoundaryRef
    action: ActionKind
    at: datetime


def plan_actions(
    rows: Iterable[InventoryRow], scope: Scope, *, now: datetime, force: bool, silent_sites: Iterable[str] = ()
) -> Sequence[PlannedAction]:
    """What would be done about what `scope` covers, one line for each boundary."""
    silent = frozenset(silent_sites)
    return [_planned(row, force=force, silent=row.ref.site in silent) for row in rows if scope.covers(row, now=now)]


def _planned(row: InventoryRow, *, force: bool, silent: bool) -> PlannedAction:
    ref = row.ref
    if row.state is not BoundaryState.LIVE:
        return PlannedAction(ref=ref, action=ActionKind.DESTROY, why=_why(row, silent=silent))
    held = f"somebody acts on {ref.run_id} under fence {ref.fence}"
    if ref.fence == 0:
        held = "it is kept ready for a run" if ref.tenant == STANDBY_TENANT else "a worker is trying out its wall"
    if force:
        return PlannedAction(ref=ref, action=ActionKind.KILL, why=f"{held}; it is forced")
    return PlannedAction(ref=ref, action=ActionKind.REFUSE, why=f"{held}; say force to end it")


def _why(row: InventoryRow, *, silent: bool) -> str:
    ref = row.ref
    if silent:
        return f"site {ref.site} is silent; it is destroyed when the site answers"
    if row.state is BoundaryState.OVERDUE:
        return f"who acted on {ref.run_id} was lost, or its time is over"
    if row.state is BoundaryState.QUARANTINED:
        since = "" if row.resisting_since is None else f" since {row.resisting_since.isoformat(timespec='seconds')}"
        return f"it resists destruction{since}"
    return f"no run claims fence {ref.fence} of {ref.run_id}"


def recheck(order: Order, state: BoundaryState | None, *, now: datetime) -> "Check":
    """What a line of the plan comes to, now that its site has looked again; `state` None: it is not there."""
    if state is None:
        return Check.GONE
    if state is not BoundaryState.LIVE:
        return Check.DESTROY
    if order.action is not ActionKind.KILL:
        return Check.REFUSE
    return Check.DESTROY if now - order.at >= KILL_GRACE else Check.WAIT


class Check(StrEnum):
    GONE = "gone"
    DESTROY = "destroy"
    REFUSE = "refuse"
    WAIT = "wait"
