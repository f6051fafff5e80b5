"""Around every request: its id, the headers of its answer, bounds on its body, one log line, and the last catch.

Plain ASGI, so that an upload streams through it and a waiting request costs no task more.
"""

import re
import time
from collections.abc import Mapping

import anyio
import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.context import Bounds
from service.api.errors import error_response, internal_error, problem_response
from service.api.metrics import ApiMetrics, route_of
from service.api.tracing import trace_of
from service.core.errors import TooLarge, Unavailable
from service.core.ids import new_id

_INCOMING_ID = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._-]{7,127}")
_STREAMED = {("POST", "/v1/runs")}
_UNCOUNTED = {"/healthz", "/readyz"}
_LOGGED_PATH = 200
"""Characters of a path in the log."""
HEADERS: Mapping[bytes, bytes] = {
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"cache-control": b"no-store",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
}

log = structlog.get_logger()


class Frame:
    def __init__(self, app: ASGIApp, *, bounds: Bounds, metrics: ApiMetrics) -> None:
        self._app = app
        self._bounds = bounds
        self._metrics = metrics
        self._at_once = 0
        metrics.watch(in_flight=lambda: self._at_once)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send)
        trace = trace_of(scope["headers"])
        scope.setdefault("state", {}).update(request_id=exchange.request_id, traceparent=trace.traceparent)
        # What is logged while the request is answered says whose it is, in threads too.
        with structlog.contextvars.bound_contextvars(request_id=exchange.request_id, trace_id=trace.trace_id):
            await self._answer(scope, exchange)

    async def _answer(self, scope: Scope, exchange: "_Exchange") -> None:
        counted = scope["path"] not in _UNCOUNTED
        if counted and self._at_once >= self._bounds.requests_at_once:
            busy = Unavailable("as many requests as fit are being served", retry_after_s=1)
            await error_response(scope, error=busy)(scope, exchange.receive, exchange.send)
            self._metrics.answered(scope, status=exchange.status, duration_s=exchange.duration_s)
            return
        self._at_once += counted
        try:
            await self._serve(scope, exchange)
        finally:
            self._at_once -= counted
            self._metrics.answered(scope, status=exchange.status, duration_s=exchange.duration_s)
            exchange.log()

    async def _serve(self, scope: Scope, exchange: "_Exchange") -> None:
        try:
            if (scope["method"], scope["path"]) not in _STREAMED and not await self._whole_body(scope, exchange):
                return
            await self._app(scope, exchange.receive, exchange.send)
        except Exception as error:
            response = internal_error(scope, error=error)
            if exchange.status is not None:
                raise  # half an answer is out; the server hangs up
            await response(scope, exchange.receive, exchange.send)

    async def _whole_body(self, scope: Scope, exchange: "_Exchange") -> bool:
        """Read a body that is not an upload, within its bounds, before anything looks at it. -> False: refused."""
        if not exchange.has_body:
            return True
        try:
            with anyio.fail_after(self._bounds.body_deadline_s):
                await exchange.read_all(self._bounds.body_max_bytes)
        except TooLarge as error:
            await error_response(scope, error=error)(scope, exchange.receive, exchange.send)
            return False
        except TimeoutError:
            response = problem_response(scope, code="upload_timed_out", detail="the body did not arrive in time")
            await response(scope, exchange.receive, exchange.send)
            return False
        return True


class _Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._started_at = time.perf_counter()
        self._replay: Message | None = None
        headers: dict[bytes, bytes] = dict(scope["headers"])
        incoming = headers.get(b"x-request-id", b"")
        self.request_id = incoming.decode("ascii") if _INCOMING_ID.fullmatch(incoming) else new_id("req")
        self.has_body = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
        self._declared = int(length) if (length := headers.get(b"content-length", b"")).isdigit() else 0
        self._body_read = not self.has_body
        self.status: int | None = None

    async def receive(self) -> Message:
        if self._replay is not None:
            message, self._replay = self._replay, None
            return message
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            self._body_read = True
        return message

    async def read_all(self, max_bytes: int) -> None:
        """Keep the whole body for the application. Raises TooLarge, before reading when the length is declared."""
        body = bytearray()
        if self._declared <= max_bytes:
            while not self._body_read and len(body) <= max_bytes:
                message = await self.receive()
                if message["type"] != "http.request":
                    break
                body += message.get("body", b"")
        if self._declared > max_bytes or len(body) > max_bytes:
            raise TooLarge(f"the body of this request may have at most {max_bytes} bytes")
        self._replay = {"type": "http.request", "body": bytes(body), "more_body": False}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            given = {name.lower() for name, _ in message.get("headers", [])}
            added = [(name, value) for name, value in HEADERS.items() if name not in given]
            added.append((b"x-request-id", self.request_id.encode()))
            if not self._body_read and b"connection" not in given:
                added.append((b"connection", b"close"))  # nobody will read the rest of that body
            message = {**message, "headers": [*message.get("headers", []), *added]}
        await self._send(message)

    @property
    def duration_s(self) -> float:
        return time.perf_counter() - self._started_at

    def log(self) -> None:
        """Paths only: a query may hold what is nobody's business. The ids of request and trace are bound already."""
        scope = self._scope
        write = log.debug if scope["path"] in _UNCOUNTED else log.info
        write(
            "request", method=scope["method"], route=route_of(scope), path=scope["path"][:_LOGGED_PATH],
            status=self.status, duration_s=round(self.duration_s, 4), key_id=scope["state"].get("key_id"),
        )  # fmt: skip
