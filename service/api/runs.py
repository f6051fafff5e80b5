"""/v1/runs: submit, read, list, cancel, delete."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Annotated

import anyio
from fastapi import APIRouter, Header, Query, Request, Response

from service.api.answers import RunAnswer, run_answer
from service.api.auth import ACaller
from service.api.context import Context, InContext
from service.api.documentation import Responses, problems
from service.api.receiving import UPLOAD_BODY, receiving
from service.api.schemas import RunPage
from service.core.run import Outcome, Phase, Run
from service.usecases import cancel, fetch
from service.usecases.submit import Attempt, Submitted, begin, release, submit

router = APIRouter(prefix="/v1/runs", tags=["runs"])
MAX_WAIT_S = 60
_KEY = ("unauthenticated", "forbidden", "request_invalid")
_LOCATION = {"description": "where the run is", "schema": {"type": "string"}}
_REPLAYED = {"description": "`true`: this is the first answer, again", "schema": {"type": "string"}}
_ACCEPTED: Responses = {202: {"headers": {"Location": _LOCATION, "Idempotent-Replayed": _REPLAYED}}}


@router.post(
    "",
    status_code=202,
    operation_id="submitRun",
    summary="Submit code, controls and a scenario",
    response_model=Run,
    responses=_ACCEPTED
    | problems(
        *_KEY, "not_found", "too_large", "upload_timed_out", "bundle_rejected", "scenario_invalid", "controls_invalid",
        "metadata_invalid", "placement_refused", "idempotency_mismatch", "idempotency_in_flight", "quota_exceeded",
        "storage_full",
    ),
    openapi_extra={"requestBody": UPLOAD_BODY},
)  # fmt: skip
async def submit_run(
    request: Request,
    context: InContext,
    caller: ACaller,
    idempotency_key: Annotated[
        str | None,
        Header(
            alias="Idempotency-Key",
            min_length=1,
            max_length=255,
            pattern=r"^[\x20-\x7e]+$",
            description="kept for 24 h",
        ),
    ] = None,
) -> RunAnswer:
    """Answers as soon as the run is queued. With an Idempotency-Key, sending it again is safe."""
    with context.deps.metrics.submission() as accepted:
        submitted = await _submitted(request, context, tenant=caller.tenant, key=idempotency_key)
        accepted(replayed=submitted.replayed)
    headers = {"Location": f"/v1/runs/{submitted.run.id}"}
    if submitted.replayed:
        headers["Idempotent-Replayed"] = "true"
    return run_answer(submitted.run, status=202, headers=headers)


async def _submitted(request: Request, context: Context, *, tenant: str, key: str | None) -> Submitted:
    attempt = await _begin(context, tenant=tenant, key=key)
    try:
        async with receiving(request, context, tenant=tenant) as upload:
            return await context.judge(
                submit, context.submitting, tenant=tenant, upload=upload, attempt=attempt,
                traceparent=request.state.traceparent,
            )  # fmt: skip
    except BaseException:
        if attempt is not None:
            with anyio.CancelScope(shield=True):
                await context.store(release, context.deps.runs, tenant=tenant, attempt=attempt)
        raise


async def _begin(context: Context, *, tenant: str, key: str | None) -> Attempt | None:
    if key is None:
        return None
    return await context.store(
        begin, context.deps.runs, tenant=tenant, key=key, stale_after=context.deps.bounds.idempotency_stale_after
    )


@router.get(
    "", operation_id="listRuns", summary="List runs", response_model=RunPage, responses=problems(*_KEY, "not_found")
)
async def list_runs(
    context: InContext,
    caller: ACaller,
    phase: Annotated[Phase | None, Query()] = None,
    outcome: Annotated[Outcome | None, Query()] = None,
    limit: Annotated[int, Query(ge=1, le=fetch.MAX_PAGE)] = 20,
    cursor: Annotated[str | None, Query(max_length=200, description="`next_cursor` of the page before")] = None,
) -> Response:
    """Newest first. A page may have fewer runs than `limit`; `next_cursor` says whether there are more."""
    items, next_cursor = await context.store(
        fetch.read_page, context.deps.runs, worker_fresh=context.deps.bounds.worker_fresh, tenant=caller.tenant,
        phase=phase, outcome=outcome, limit=limit, cursor=cursor,
    )  # fmt: skip
    shown = RunPage.model_construct(items=list(items), next_cursor=next_cursor)
    return Response(shown.model_dump_json(), media_type="application/json")


@router.get(
    "/{run_id}", operation_id="getRun", summary="Read a run", response_model=Run, responses=problems(*_KEY, "not_found")
)
async def get_run(
    request: Request,
    context: InContext,
    caller: ACaller,
    run_id: str,
    wait: Annotated[
        float, Query(ge=0, le=MAX_WAIT_S, allow_inf_nan=False, description="seconds to wait for its end")
    ] = 0,
) -> RunAnswer:
    """With `wait`, the answer comes when the run is finished or the seconds are over, whichever is first."""
    runs, worker_fresh = context.deps.runs, context.deps.bounds.worker_fresh
    read = partial(fetch.read_run, runs, run_id=run_id, tenant=caller.tenant, worker_fresh=worker_fresh)
    if wait == 0:
        return run_answer(await context.store(read))
    with context.notifier.waiting(fetch.checked_run_id(run_id)) as finished:
        run = await context.store(fetch.get_run, runs, run_id=run_id, tenant=caller.tenant)
        if run.phase is not Phase.FINISHED:
            await _first(request, finished, within_s=wait)
            run = await context.store(read)
    return run_answer(run)


async def _first(request: Request, finished: asyncio.Event, *, within_s: float) -> None:
    """The run's end, the time's, or the client's: one that has hung up is not waited with."""
    with anyio.move_on_after(within_s):
        async with anyio.create_task_group() as group:

            async def until(comes: Callable[[], Awaitable[object]]) -> None:
                await comes()
                group.cancel_scope.cancel()

            group.start_soon(until, finished.wait)
            group.start_soon(until, partial(_gone, request))


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


@router.post(
    "/{run_id}/cancel", status_code=202, operation_id="cancelRun", summary="Cancel a run", response_model=Run,
    responses=problems(*_KEY, "not_found"),
)  # fmt: skip
async def cancel_run(context: InContext, caller: ACaller, run_id: str) -> RunAnswer:
    """From any phase; the worker sees it within 2 s. A finished run is left as it is."""
    deps = context.deps
    run = await context.store(
        cancel.cancel_run, deps.runs, hints=deps.hints, run_id=run_id, tenant=caller.tenant, by="tenant"
    )
    return run_answer(run, status=202)


@router.delete(
    "/{run_id}", status_code=204, operation_id="deleteRun", summary="Delete a finished run", response_class=Response,
    responses=problems(*_KEY, "not_found", "not_finished"),
)  # fmt: skip
async def delete_run(context: InContext, caller: ACaller, run_id: str) -> None:
    """Its record, output and artifacts."""
    deps = context.deps
    await context.store(cancel.delete_run, deps.runs, bundles=context.bundles, run_id=run_id, tenant=caller.tenant)
