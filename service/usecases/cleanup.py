"""Operators' clean-up: a plan that is then exactly what is done, by the sites' reapers, each line looked at again."""

from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta

from service.core.cleanup import (
    ActionKind,
    CleanupPlan,
    InventoryRow,
    Scope,
    plan_actions,
    shown,
)
from service.core.custody import Custody
from service.core.errors import Conflict, DocumentInvalid, NotFound
from service.core.ports.publishing import Hints
from service.core.ports.runs import RunStore
from service.usecases.audit import audited
from service.usecases.cancel import cancel_run


def list_boundaries(custody: Custody, *, silent_after: timedelta) -> Sequence[InventoryRow]:
    """All that the sites discovered, as of when each last looked."""
    return shown(custody.inventory(), custody.sites(), now=custody.now(), silent_after=silent_after)


def have_looked(custody: Custody, *, since: datetime, silent_after: timedelta) -> bool:
    """Every site that is not silent has listed its world since then."""
    now = custody.now()
    return all(s.last_seen_at >= since or s.is_silent(now=now, after=silent_after) for s in custody.sites())


def checked_scope(scope: Scope) -> Scope:
    """Raises DocumentInvalid when it says nothing: nobody cleans up everything by accident."""
    if scope.is_empty:
        message = "should say which: tenant, run, boundary, older_than_s, or orphans: true"
        raise DocumentInvalid("request", [{"path": "scope", "message": message}])
    return scope


def make_plan(custody: Custody, *, scope: Scope, force: bool, asked_by: str, silent_after: timedelta) -> CleanupPlan:
    """A dry run, kept."""
    now = custody.now()
    silent = [site.name for site in custody.sites() if site.is_silent(now=now, after=silent_after)]
    rows = list_boundaries(custody, silent_after=silent_after)
    actions = plan_actions(rows, scope, now=now, force=force, silent_sites=silent)
    return custody.store_plan(actions, asked_by=asked_by, force=force)


def apply_plan(custody: Custody, *, plan_id: str, who: str, runs: RunStore, hints: Hints) -> CleanupPlan:
    """Give its lines to the sites; one that is applied already stays as it is. Runs of forced lines are ended as
    cancelled_by_operator. Raises NotFound."""
    plan = custody.get_plan(plan_id)
    if plan.applied_at is not None:
        return plan

    def act() -> CleanupPlan:
        for line in plan.actions:
            view = custody.lease_of(line.ref.run_id) if line.action is ActionKind.KILL else None
            if view is not None and view.fence == line.ref.fence and view.is_active:
                _end_run(runs, hints, line.ref.run_id)
        return custody.apply_plan(plan_id)

    detail = {
        "force": plan.force,
        "actions": [
            {"boundary": line.ref.name, "run": line.ref.run_id, "action": line.action} for line in plan.actions
        ],
    }
    return audited(
        custody,
        act,
        who=who,
        what="cleanup.apply",
        target=plan_id,
        detail=detail,
        result=lambda applied: summary(applied),
    )


def _end_run(runs: RunStore, hints: Hints, run_id: str) -> None:
    try:
        cancel_run(runs, hints=hints, run_id=run_id, tenant=None, by="operator")
    except NotFound:
        return  # it was deleted just now; what stands is an orphan


def summary(plan: CleanupPlan) -> str:
    """`ordered: 2 destroy, 1 refuse`: what the plan comes to, for the audit log. How each line ended is in the plan."""
    counted = Counter(str(line.action) for line in plan.actions)
    return "ordered: " + (", ".join(f"{count} {word}" for word, count in sorted(counted.items())) or "nothing")


def checked_plan(custody: Custody, *, plan_id: str, force: bool) -> CleanupPlan:
    """A plan that was shown, to be applied as it is. Raises NotFound, Conflict(plan_not_forced)."""
    plan = custody.get_plan(plan_id)
    if force and not plan.force:
        raise Conflict("this plan was made without force, and is applied as it was shown", code="plan_not_forced")
    return plan
