"""/v1/admin: what stands on the sites, and what operators do. Each act is in the audit log before it is done."""

import time
from datetime import timedelta
from functools import partial
from typing import Annotated, Any

import anyio
from fastapi import APIRouter, Path, Query, Response

from service.api.acting import acting
from service.api.answers import RunAnswer, run_answer
from service.api.auth import AnOperator
from service.api.context import Context, InContext
from service.api.documentation import problems
from service.api.operating import (
    AuditPage,
    BoundaryPage,
    BoundaryShown,
    CleanupAsked,
    CleanupShown,
    DrainAsked,
    PurgeAsked,
    PurgeShown,
    SiteShown,
    WorkerPage,
    WorkerShown,
)
from service.core.cleanup import CleanupPlan
from service.core.errors import NotFound
from service.core.run import Run
from service.usecases import cancel, cleanup
from service.usecases.retention import purge

router = APIRouter(prefix="/v1/admin", tags=["operators"])
_KEY = ("unauthenticated", "forbidden")
_BODY = ("request_invalid", "too_large", "upload_timed_out")
_POLL_S = 0.1
_CURSOR = r"^aud_[0-9a-f]{32}$"


@router.get(
    "/boundaries", operation_id="adminListBoundaries", summary="What stands on the sites", responses=problems(*_KEY)
)
async def list_boundaries(context: InContext, operator: AnOperator) -> BoundaryPage:
    """As each site's reaper found it when it last looked (`observed_at`)."""
    deps = context.deps
    silent_after = deps.bounds.site_silent

    def page() -> BoundaryPage:
        rows, now = cleanup.list_boundaries(deps.custody, silent_after=silent_after), deps.custody.now()
        sites = [
            SiteShown(name=s.name, last_seen_at=s.last_seen_at, silent=s.is_silent(now=now, after=silent_after))
            for s in deps.custody.sites()
        ]
        return BoundaryPage(items=[BoundaryShown.of(row, now=now) for row in rows], sites=sites)

    return await context.store(page)


@router.post(
    "/cleanup", operation_id="adminCleanup", summary="Plan a clean-up, and apply it",
    responses=problems(*_KEY, *_BODY, "not_found", "plan_not_forced")
    | {202: {"model": CleanupShown, "description": "applied; a site still works: ask for the plan by its id"}},
)  # fmt: skip
async def clean_up(context: InContext, operator: AnOperator, body: CleanupAsked, response: Response) -> CleanupShown:
    """A dry run unless `dry_run` is false: the plan is kept, and `plan` applies exactly what was shown. What is live is
    refused without `force`; with it its run ends as `cancelled_by_operator`. The sites look at each line again."""
    deps = context.deps
    if body.plan is None:
        scope = cleanup.checked_scope(body.wanted())
        await _look(context)
        plan = await context.store(
            cleanup.make_plan, deps.custody, scope=scope, force=body.force, asked_by=operator.key_id,
            silent_after=deps.bounds.site_silent,
        )  # fmt: skip
    else:
        body.check_plan()
        plan = await context.store(cleanup.checked_plan, deps.custody, plan_id=body.plan, force=body.force)
    if not body.dry_run:
        plan = await context.store(
            cleanup.apply_plan, deps.custody, plan_id=plan.id, who=operator.key_id, runs=deps.runs, hints=deps.hints
        )
        plan = await _done(context, plan)
        response.status_code = 200 if plan.done_at is not None else 202
    return CleanupShown.of(plan)


@router.get(
    "/cleanup/{plan_id}", operation_id="adminGetCleanup", summary="Read a plan and its results",
    responses=problems(*_KEY, "not_found"),
)  # fmt: skip
async def get_cleanup(context: InContext, operator: AnOperator, plan_id: str) -> CleanupShown:
    return CleanupShown.of(await context.store(context.deps.custody.get_plan, plan_id))


async def _look(context: Context) -> None:
    """Have the sites look now, so that the plan is about what stands there; one that does not answer soon is taken as
    it last was."""
    deps, deadline = context.deps, time.monotonic() + context.deps.bounds.look_deadline_s
    since = await context.store(deps.custody.ask_to_look)
    silent_after = deps.bounds.site_silent
    while not await context.store(cleanup.have_looked, deps.custody, since=since, silent_after=silent_after):
        if time.monotonic() > deadline:
            return
        await anyio.sleep(_POLL_S)


async def _done(context: Context, plan: CleanupPlan) -> CleanupPlan:
    deadline = time.monotonic() + context.deps.bounds.cleanup_wait_s
    while plan.done_at is None and time.monotonic() < deadline:
        await anyio.sleep(_POLL_S)
        plan = await context.store(context.deps.custody.get_plan, plan.id)
    return plan


@router.post(
    "/runs/{run_id}/kill", status_code=202, operation_id="adminKillRun", summary="Cancel any tenant's run",
    responses=problems(*_KEY, "not_found"), response_model=Run,
)  # fmt: skip
async def kill_run(context: InContext, operator: AnOperator, run_id: str) -> RunAnswer:
    """From any phase; a finished run is left as it is."""
    deps = context.deps
    kill = partial(cancel.cancel_run, deps.runs, hints=deps.hints, run_id=run_id, tenant=None, by="operator")
    return run_answer(await acting(context, operator, "run.kill", run_id, kill), status=202)


@router.get("/workers", operation_id="adminListWorkers", summary="List live workers", responses=problems(*_KEY))
async def list_workers(context: InContext, operator: AnOperator) -> WorkerPage:
    """With what each can enforce, as its probe last measured it, and what it plays."""
    return WorkerPage(items=await context.store(_workers, context))


@router.post(
    "/drain", status_code=202, operation_id="adminDrainWorker", summary="Let a worker take nothing more",
    responses=problems(*_KEY, *_BODY, "not_found"),
)  # fmt: skip
async def drain_worker(context: InContext, operator: AnOperator, body: DrainAsked) -> WorkerShown:
    """From now on it claims no run; it finishes those that it plays, and then is `drained`. A restarted worker is a new
    one."""
    drain = partial(context.deps.custody.drain_worker, body.worker)
    await acting(context, operator, "worker.drain", body.worker, drain)
    worker = await context.store(context.deps.workers.get_worker, body.worker)
    if worker is None:
        raise NotFound
    playing = await context.store(context.deps.custody.playing)
    return WorkerShown.of(worker, playing=playing.get(worker.id, 0))


def _workers(context: Context) -> list[WorkerShown]:
    deps = context.deps
    live = deps.workers.live_workers(fresh=deps.bounds.worker_fresh)
    playing = deps.custody.playing()
    return [WorkerShown.of(worker, playing=playing.get(worker.id, 0)) for worker in live]


@router.delete(
    "/sites/{site}", status_code=204, operation_id="adminForgetSite", summary="Forget a site that will not come back",
    responses=problems(*_KEY, "not_found", "site_alive", "request_invalid"), response_class=Response,
)  # fmt: skip
async def forget_site(
    context: InContext, operator: AnOperator, site: Annotated[str, Path(max_length=255)],
    force: Annotated[bool, Query(description="also one that has answered lately")] = False,
) -> None:  # fmt: skip
    """What it had counts as gone from now on, without anybody having seen that: runs that waited for it can be claimed
    again. If it does come back, what it still has is destroyed."""
    unless = timedelta(0) if force else context.deps.bounds.site_silent
    forget = partial(context.deps.custody.forget_site, site, unless_seen_within=unless)
    await acting(
        context, operator, "site.forget", site, forget, detail={"force": force},
        result=lambda fences: f"done: {fences} boundaries count as gone",
    )  # fmt: skip


@router.post(
    "/purge", operation_id="adminPurge", summary="Give up finished runs of an age",
    responses=problems(*_KEY, *_BODY),
)  # fmt: skip
async def purge_runs(context: InContext, operator: AnOperator, body: PurgeAsked) -> PurgeShown:
    """Finished runs older than that, with output and artifacts; and of that age events and deliveries that are told and
    done. A dry run unless `dry_run` is false."""
    deps, age = context.deps, timedelta(seconds=body.older_than_s)

    def give_up() -> PurgeShown:
        purged = purge(
            deps.retention, deps.blobs, older_than=age, blobs_older_than=age, deliveries_older_than=age,
            dry_run=body.dry_run,
        )  # fmt: skip
        events = deps.leftovers.purge_events(older_than=age, dry_run=body.dry_run)
        return PurgeShown(
            **vars(purged) | {"dry_run": body.dry_run, "older_than_s": age.total_seconds(), "events": events}
        )

    if body.dry_run:
        return await context.store(give_up)
    return await acting(
        context, operator, "purge", "", give_up, detail={"older_than_s": body.older_than_s},
        result=lambda done: f"done: {done.runs} runs, {done.blobs} blobs, {done.events} events",
    )  # fmt: skip


@router.get(
    "/audit", operation_id="adminListAudit", summary="Who did what", responses=problems(*_KEY, "request_invalid")
)
async def list_audit(
    context: InContext, operator: AnOperator, limit: Annotated[int, Query(ge=1, le=100)] = 50,
    cursor: Annotated[str | None, Query(pattern=_CURSOR)] = None,
) -> AuditPage:  # fmt: skip
    """Newest first. `result` is null while the act goes on, and when its end was not seen."""
    entries, more = await context.store(context.deps.custody.list_acts, limit=limit, before=cursor)
    items: list[Any] = list(entries)
    return AuditPage(items=items, next_cursor=more)
