"""One key at one address: sending, judging what comes back, and sending again where that is safe.

A request is repeated when the service cannot have seen it, or when seeing it twice changes nothing: a GET, or a
submission, whose Idempotency-Key stays the same. The pauses are short; who wants to sit out a restart has `wait` and
`stream`, which do.
"""

import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

from service.client.errors import Document, NotBlastdoor, Problem, ServiceFailed, Unreachable, problem

PAUSES_S = (0.2, 0.6, 1.5)
LONGEST_RETRY_S = 10.0
CONNECT_WITHIN_S = 5.0
_MAX_ANSWER_BYTES = 64 * 2**20  # a page of runs with all their text is under 8 MiB


class Connection:
    """As safe for several threads as httpx's own client is. `retries`: how often a request is repeated at most."""

    def __init__(
        self,
        url: str,
        *,
        key: str,
        tenant: str | None,
        timeout_s: float,
        transport: httpx.BaseTransport | None,
        use_proxies: bool,
        retries: int = len(PAUSES_S),
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        headers = {"Authorization": f"Bearer {key}", "Accept": "application/json", "User-Agent": "blastdoor-python"}
        if tenant is not None:
            headers["Blastdoor-Tenant"] = tenant
        self.url = url.rstrip("/")
        self.sleep = sleep
        self._pauses_s = PAUSES_S[:retries]
        self._timeout_s = timeout_s
        self._http = httpx.Client(
            base_url=self.url, headers=headers, transport=transport, trust_env=use_proxies, timeout=self.timeout()
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def timeout(self, *, held_s: float = 0.0, silent_s: float | None = None) -> httpx.Timeout:
        """`held_s`: for so long the service was asked to hold its answer. `silent_s`: how long it may be silent,
        instead of what this connection has for all."""
        whole_s = self._timeout_s
        read_s = (whole_s if silent_s is None else silent_s) + held_s
        return httpx.Timeout(whole_s, read=read_s, connect=min(CONNECT_WITHIN_S, whole_s))

    def ask(self, method: str, path: str, *, repeatable: bool | None = None, **request: Any) -> Document:
        """-> the JSON object; empty for an answer without a body. `repeatable`: seen twice it does what it does once;
        so is every GET.

        Raises Problem, Unreachable.
        """
        if repeatable is None:
            repeatable = method == "GET"
        for pause_s in self._pauses_s:
            try:
                return self._ask_once(method, path, **request)
            except Unreachable as error:
                if isinstance(error, NotBlastdoor) or not (repeatable or error.unsent):
                    raise
                self.sleep(pause_s * random.uniform(0.7, 1.3))  # noqa: S311 - spreads callers out, hides nothing
            except Problem as refusal:
                if not repeatable or (asked_s := _worth_waiting_s(refusal, pause_s)) is None:
                    raise
                self.sleep(asked_s)
        return self._ask_once(method, path, **request)

    def text(self, path: str, *, accept: str) -> str:
        """A document that is not JSON. Raises Problem, Unreachable."""
        with self.download(path, accept=accept) as answer:
            return b"".join(self.pieces(answer)).decode("utf-8")

    @contextmanager
    def download(self, path: str, *, accept: str = "*/*", **request: Any) -> Iterator[httpx.Response]:
        """An answer whose body is still to be read, with `pieces`. Raises Problem, Unreachable."""
        headers = {"Accept": accept, "Accept-Encoding": "identity"} | request.pop("headers", {})
        with self._saying_what_failed(), self._http.stream("GET", path, headers=headers, **request) as answer:
            if not answer.is_success:
                raise self._failure(answer, _limited(answer), f"GET {path}")
            yield answer

    def pieces(self, answer: httpx.Response) -> Iterator[bytes]:
        """The body as it comes. Raises Unreachable when it breaks off."""
        with self._saying_what_failed():
            yield from answer.iter_bytes()

    def healthy(self) -> bool:
        """Whether it answers at all; never raises."""
        try:
            return self._http.get("/healthz", timeout=CONNECT_WITHIN_S).status_code == 200
        except httpx.HTTPError:
            return False

    def _ask_once(self, method: str, path: str, **request: Any) -> Document:
        with self._saying_what_failed(), self._http.stream(method, path, **request) as answer:
            body = _limited(answer)
        if answer.is_success and body == b"":
            return {}
        document = _json_object(answer, body)
        if answer.is_success and document is not None:
            return document
        raise self._failure(answer, body, f"{method} {path}")

    def _failure(self, answer: httpx.Response, body: bytes | None, asked: str) -> Problem | NotBlastdoor:
        document = _json_object(answer, body)
        if document is None or "code" not in document or answer.status_code < 400:
            return NotBlastdoor(f"{self.url} answered {answer.status_code} to {asked}, but not as Blastdoor does")
        seconds = answer.headers.get("Retry-After", "")
        return problem(answer.status_code, document, retry_after_s=float(seconds) if seconds.isdecimal() else None)

    @contextmanager
    def _saying_what_failed(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPError as error:
            unsent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
            words = f"{self.url} does not answer: {str(error) or type(error).__name__}"
            raise Unreachable(words, unsent=unsent) from error


def one_part(name: str) -> str:
    """One part of a path, whatever a guest has named it; a lone `..` would be resolved on its way."""
    return quote(name, safe="").replace(".", "%2E")


def _limited(answer: httpx.Response) -> bytes | None:
    """The body; None for one that nobody of ours sends."""
    body = bytearray()
    for piece in answer.iter_bytes():
        body += piece
        if len(body) > _MAX_ANSWER_BYTES:
            return None
    return bytes(body)


def _json_object(answer: httpx.Response, body: bytes | None) -> Document | None:
    if body is None or not answer.headers.get("Content-Type", "").partition(";")[0].strip().endswith("json"):
        return None
    try:
        document = json.loads(body)
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def _worth_waiting_s(refusal: Problem, pause_s: float) -> float | None:
    """How long to wait before the same request again; None: it will not help, or not soon."""
    if refusal.code == "idempotency_in_flight":  # ours, whose answer was lost while the service still judges it
        return pause_s
    if isinstance(refusal, ServiceFailed) and refusal.status == 503 and refusal.retry_after_s is not None:
        return refusal.retry_after_s if refusal.retry_after_s <= LONGEST_RETRY_S else None
    return None
