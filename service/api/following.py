"""/v1/runs/{id}/events: a run as it goes on, as server-sent events.

Written here and not by a library: everything sent is one page of rows as they are stored, framed by three constant
lines. sse-starlette would add four tasks and a lock to each watcher, frame each row by itself, and learn of the end of
the process by watching the server's insides; our notifier knows it already.

A frame cannot be forged: its data is JSON in ASCII on one line, whatever a guest has printed. Memory is bounded by the
page: the next one is read when the client has taken this one.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Annotated, Any

import anyio
import structlog
from fastapi import APIRouter, Header, Query, Request, Response
from starlette.types import Receive, Scope, Send

from service.api.auth import ACaller
from service.api.context import Context, InContext
from service.api.documentation import Responses, problems
from service.api.notifier import Waiter
from service.core.errors import NotFound, Unavailable
from service.core.news import Mark
from service.usecases.follow import TellingPage, Told, next_told, read_mark

MEDIA_TYPE = "text/event-stream"
KEEP_ALIVE_S = 15.0
PAGE_WITHIN_S = 60.0
"""A watcher that takes longer for one page is hung up on; it may come again, and goes on where it was."""
_AGAIN_S = 0.25
_RETRY_MS = 1000
_HELLO = f"retry: {_RETRY_MS}\n\n".encode()
_KEEP_ALIVE = b": still here\n\n"

log = structlog.get_logger()
router = APIRouter(prefix="/v1/runs", tags=["runs"])


class EventStream(Response):
    """Ends after the result, with the client, with the run (when it is deleted), with the key or with the process."""

    media_type = MEDIA_TYPE

    def __init__(
        self, context: Context, read: Callable[..., TellingPage], *, run_id: str, first: TellingPage, key_hash: str
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._context, self._read, self._run_id, self._first = context, read, run_id, first
        self._key_hash = key_hash

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with anyio.create_task_group() as group:

            async def until_gone() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                group.cancel_scope.cancel()

            group.start_soon(until_gone)
            try:
                with self._context.deps.metrics.streaming():
                    await self._tell(send)
            except TimeoutError:
                log.info("watcher_takes_nothing", run_id=self._run_id)  # the server hangs up: the answer is unfinished
            group.cancel_scope.cancel()

    async def _tell(self, send: Send) -> None:
        await _send(send, _HELLO)
        page: TellingPage | None = self._first
        with self._context.notifier.following(self._run_id, seen=self._first.after) as waiter:
            while page is not None and not self._context.notifier.closed:
                if page.items:
                    await _send(send, _frames(page.items))
                waiter.seen = page.after
                if page.ended:
                    break
                if not page.more:
                    await self._wait(send, waiter)
                waiter.event.clear()
                if not await self._context.keys.holds(self._key_hash):
                    log.info("watcher_has_no_key_any_more", run_id=self._run_id)
                    break
                page = await self._next(page.after)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _wait(self, send: Send, waiter: Waiter) -> None:
        """Until there may be more to tell, or the key is no more."""
        silent_until = anyio.current_time() + KEEP_ALIVE_S
        while (left_s := silent_until - anyio.current_time()) > 0:
            with anyio.move_on_after(min(left_s, self._context.keys.look_again_s)):
                await waiter.event.wait()
                return
            if not await self._context.keys.holds(self._key_hash):
                return
        await _send(send, _KEEP_ALIVE)

    async def _next(self, after: Mark) -> TellingPage | None:
        """`None`: the run is gone. A store that does not answer now is asked again when the next moment comes."""
        try:
            return await self._context.follow(self._read, after=after)
        except NotFound:
            return None
        except Unavailable as error:
            log.warning("news_not_read", run_id=self._run_id, error=error.detail)
            await anyio.sleep(_AGAIN_S)
            return TellingPage(items=(), after=after, more=True, ended=False)


async def _send(send: Send, body: bytes) -> None:
    """Returns when the client has taken nearly all. Raises TimeoutError: it does not."""
    with anyio.fail_after(PAGE_WITHIN_S):
        await send({"type": "http.response.body", "body": body, "more_body": True})


def _frames(items: Iterable[Told]) -> bytes:
    return "".join(
        f"id: {told.mark[0]}.{told.mark[1]}\nevent: {told.event}\ndata: {told.data}\n\n" for told in items
    ).encode("ascii")


_EXAMPLE = 'id: 3.1\nevent: output\ndata: {"step":1,"stream":"stdout","seq":0,"text":"hello\\n"}\n\n'
_STREAM: Responses = {
    200: {
        "description": (
            "`event:` is `phase`, `progress`, `output` or `result`; `data:` is JSON on one line; `id:` is where to go "
            "on after. The stream ends after `result`."
        ),
        # No type: of a stream OpenAPI 3.1 means the text, and some tools take it for that of each event.
        "content": {MEDIA_TYPE: {"schema": {"description": "server-sent events"}, "example": _EXAMPLE}},
    },
    204: {"description": "everything was told before that id, the result too: do not come again"},
}


@router.get(
    "/{run_id}/events", operation_id="watchRun", summary="Watch a run", response_class=Response,
    responses=_STREAM | problems("unauthenticated", "forbidden", "request_invalid", "not_found"),
)  # fmt: skip
async def watch_run(
    request: Request,
    context: InContext,
    caller: ACaller,
    run_id: str,
    last_event_id: Annotated[str | None, Header(alias="Last-Event-ID", description="go on after this event")] = None,
    last_event_id_query: Annotated[
        str | None, Query(alias="last_event_id", description="the same, for clients that cannot set the header")
    ] = None,
) -> Response:
    """What has happened so far at once, then what happens, as it happens. Resuming leaves out nothing and repeats
    nothing, also over a restart of ours."""
    if last_event_id is not None:
        after = read_mark(last_event_id, path="header.Last-Event-ID")
    else:
        after = read_mark(last_event_id_query, path="query.last_event_id")
    worker_fresh = context.deps.bounds.worker_fresh
    read: Any = partial(next_told, context.deps.runs, run_id=run_id, tenant=caller.tenant, worker_fresh=worker_fresh)
    first: TellingPage = await context.follow(read, after=after)
    if first.ended and not first.items:
        return Response(status_code=204)  # by the HTML standard, an EventSource stays away then
    return EventStream(context, read, run_id=run_id, first=first, key_hash=request.state.key_hash)
