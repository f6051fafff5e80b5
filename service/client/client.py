"""The service over HTTP. Synchronous; documents come back as the service wrote them (see the contract)."""

import json
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import httpx

from service.client.connection import Connection, one_part
from service.client.errors import Document, NotBlastdoor, NotFinishedInTime, ServiceFailed, Unreachable
from service.client.events import Event
from service.client.packing import pack_directory
from service.client.resources import Admin, Tenants, Webhooks
from service.client.saving import checked, save_artifacts
from service.client.streaming import PATIENCE_S, QUIET_S, Following, Lost

Stream = Literal["stdout", "stderr"]
HOLD_S = 30.0
"""For so long the service is asked to hold an answer; the contract allows 60 s."""
_PAGE = 100


class Client:
    """One key at one address; use it in a `with` block, or `close` it.

        with Client("http://127.0.0.1:8700", key) as blastdoor:
            run = blastdoor.submit(Path("code"))
            for event in blastdoor.stream(run["id"]):
                ...

    Every method raises Problem (Refused, NotFound, ServiceFailed) and Unreachable; see `service.client.errors`.
    """

    def __init__(
        self,
        url: str,
        key: str,
        tenant: str | None = None,
        *,
        timeout: float = 60.0,
        transport: httpx.BaseTransport | None = None,
        use_proxies: bool = False,
        retries: int = 3,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`tenant`: whom a service key acts for. `timeout`: seconds without a byte of an answer. `use_proxies`: take a
        proxy from the environment; never for this machine, where a key would leave it. `retries`: how often what may be
        repeated is (at most 3 times, within some seconds). `transport`, `sleep`: others for tests."""
        self._connection = Connection(
            url, key=key, tenant=tenant, timeout_s=timeout, transport=transport, use_proxies=use_proxies,
            retries=retries, sleep=sleep,
        )  # fmt: skip
        self.webhooks = Webhooks(self._connection)
        self.tenants = Tenants(self._connection, "/v1/tenants" if key.startswith("bd_s_") else "/v1/admin/tenants")
        self.admin = Admin(self._connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    # --- one run after the other ------------------------------------------------------------------------------------

    def submit(
        self,
        bundle: Path | str | bytes | None = None,
        *,
        scenario: Path | str | bytes | Mapping[str, Any] | None = None,
        controls: Path | str | bytes | Mapping[str, Any] | None = None,
        metadata: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
    ) -> Document:
        """Upload and queue. -> the run, in phase `queued`.

        `bundle`: a directory, which is packed (always to the same bytes, without `.git`); the path of an archive; or an
        archive's bytes. A `str` is a path. `scenario`, `controls`: a path, the text's bytes, or a mapping; absent: the
        bundle's `scenario.yaml` and `controls.yaml`. `idempotency_key`: one is made when absent, so that an answer that
        is lost, or a 503 that says when to come again, is repeated here without a second run; give your own (kept for
        24 h) to be safe across a restart of yours as well.

        Raises CannotPack, OSError for a file that cannot be read.
        """
        parts: dict[str, Any] = {}
        for name, document in (("scenario", scenario), ("controls", controls)):
            if document is not None:
                parts[name] = _document_part(name, document)
        if metadata:
            parts["metadata"] = (None, json.dumps(dict(metadata)).encode(), "application/json")
        headers = {"Idempotency-Key": idempotency_key or secrets.token_hex(16)}
        with _bundle_part(bundle) as part:
            if part is not None:
                parts["bundle"] = part
            return self._connection.ask("POST", "/v1/runs", repeatable=True, files=parts, headers=headers)

    def get(self, run_id: str, *, wait: float = 0) -> Document:
        """The run; `wait` (seconds, at most 60) holds the answer until it is finished."""
        return self._connection.ask(
            "GET", _run(run_id), params={"wait": wait} if wait else {}, timeout=self._connection.timeout(held_s=wait)
        )

    def wait(self, run_id: str, timeout: float | None = None) -> Document:
        """The finished run. Every accepted run ends, so without a `timeout` (seconds) this does too. A service that is
        away for less than a minute is waited for. Raises NotFinishedInTime."""
        deadline = None if timeout is None else time.monotonic() + timeout
        answered_at = time.monotonic()
        while True:
            left_s = HOLD_S if deadline is None else max(min(HOLD_S, deadline - time.monotonic()), 0.0)
            try:
                run = self.get(run_id, wait=left_s)
            except (Unreachable, ServiceFailed) as error:
                passing = isinstance(error, Unreachable) or error.status == 503
                if not passing or isinstance(error, NotBlastdoor) or time.monotonic() - answered_at > PATIENCE_S:
                    raise
                self._connection.sleep(1.0)
                continue
            answered_at = time.monotonic()
            if run["phase"] == "finished":
                return run
            if deadline is not None and answered_at >= deadline:
                raise NotFinishedInTime(run)

    def stream(
        self,
        run_id: str,
        last_event_id: str | None = None,
        *,
        patience: float = PATIENCE_S,
        on_lost: Lost | None = None,
    ) -> Iterator[Event]:
        """What happens to the run, as it happens, from its beginning or after `last_event_id`; ends with the
        ResultEvent. A connection that is lost is made again with no gap and no repetition (`on_lost` is told), for
        `patience` seconds without a sign of life. Raises ValueError for what is no event's id."""
        following = Following(
            self._connection, _run(run_id) + "/events", last_event_id=last_event_id, patience_s=patience,
            on_lost=on_lost,
        )  # fmt: skip
        return iter(following)

    def events_so_far(self, run_id: str, *, quiet: float = QUIET_S) -> Iterator[Event]:
        """What has happened to the run until now: ends with the ResultEvent, or when for `quiet` seconds there was
        nothing more. One connection; raises Unreachable when it breaks."""
        following = Following(self._connection, _run(run_id) + "/events", silent_s=quiet)
        return following.so_far()

    def list(self, *, phase: str | None = None, outcome: str | None = None) -> Iterator[Document]:
        """All runs, newest first, a page at a time as they are taken."""
        cursor = None
        while True:
            page = self.page(phase=phase, outcome=outcome, limit=_PAGE, cursor=cursor)
            yield from page["items"]
            cursor = page["next_cursor"]
            if cursor is None:
                return

    def page(
        self, *, phase: str | None = None, outcome: str | None = None, limit: int = 20, cursor: str | None = None
    ) -> Document:
        """`{items, next_cursor}`, newest first; `limit` is at most 100."""
        asked = {"phase": phase, "outcome": outcome, "limit": limit, "cursor": cursor}
        return self._connection.ask("GET", "/v1/runs", params={k: v for k, v in asked.items() if v is not None})

    def cancel(self, run_id: str) -> Document:
        """From any phase, seen by the worker within 2 s; a finished run is left as it is. -> the run."""
        return self._connection.ask("POST", _run(run_id) + "/cancel", repeatable=True)

    def delete(self, run_id: str) -> None:
        """A finished run with its output and artifacts; one that is not is a Refused with `not_finished`."""
        self._connection.ask("DELETE", _run(run_id))

    # --- what it left -----------------------------------------------------------------------------------------------

    def output(self, run_id: str, step: int, stream: Stream = "stdout") -> bytes:
        """All that was kept of what a step printed (at most its `limits.output`)."""
        with self.open_output(run_id, step, stream) as pieces:
            return b"".join(pieces)

    def open_output(self, run_id: str, step: int, stream: Stream = "stdout") -> AbstractContextManager[Iterator[bytes]]:
        """The same in pieces."""
        return self._bytes_of(f"{_run(run_id)}/steps/{step}/{stream}")

    def artifact(self, run_id: str, path: str) -> bytes:
        """One artifact; `path` as the run's `artifacts` spell it. Raises CannotSave when the digest does not match."""
        with self.open_artifact(run_id, path) as pieces:
            return b"".join(pieces)

    def open_artifact(self, run_id: str, path: str) -> AbstractContextManager[Iterator[bytes]]:
        """The same in pieces. The digest is judged behind the last one."""
        return self._bytes_of(f"{_run(run_id)}/artifacts/{'/'.join(map(one_part, path.split('/')))}")

    def save_artifacts(self, run: Document, directory: Path) -> tuple[str, ...]:
        """Every artifact of a finished run, into a directory that is made for them. -> their paths in it.

        The names are the guest's, and lead nowhere else; the bytes are those of the run's record. Raises CannotSave,
        OSError (FileExistsError: the directory is there already).
        """
        open_ = partial(self.open_artifact, str(run["id"]))
        return tuple(save_artifacts(open_, run["artifacts"], directory))

    def junit(self, run_id: str) -> str:
        """A finished run as JUnit XML."""
        return self._connection.text(_run(run_id) + "/junit.xml", accept="application/xml")

    # --- the service itself -----------------------------------------------------------------------------------------

    def capabilities(self) -> Document:
        """Which walls, runtimes, limits and quota there are for this tenant."""
        return self._connection.ask("GET", "/v1/capabilities")

    def healthy(self) -> bool:
        """Whether it answers at all; never raises."""
        return self._connection.healthy()

    @contextmanager
    def _bytes_of(self, path: str) -> Iterator[Iterator[bytes]]:
        with self._connection.download(path) as answer:
            yield checked(self._connection.pieces(answer), path, header=answer.headers.get("Repr-Digest"))


def _run(run_id: str) -> str:
    return f"/v1/runs/{one_part(run_id)}"


def _document_part(name: str, document: Path | str | bytes | Mapping[str, Any]) -> tuple[str, bytes, str]:
    if isinstance(document, Mapping):
        return f"{name}.json", json.dumps(document).encode(), "application/json"
    if isinstance(document, bytes):
        return f"{name}.yaml", document, "application/yaml"
    path = Path(document)
    return path.name, path.read_bytes(), "application/yaml"


@contextmanager
def _bundle_part(bundle: Path | str | bytes | None) -> Iterator[tuple[str, Any, str] | None]:
    """httpx reads a file from its start for every attempt."""
    if bundle is None:
        yield None
    elif isinstance(bundle, bytes):
        yield "bundle", bundle, "application/octet-stream"
    elif Path(bundle).is_file():
        with open(bundle, "rb") as file:
            yield "bundle", file, "application/octet-stream"
    else:
        with tempfile.TemporaryFile(prefix="blastdoor-") as packed:
            pack_directory(Path(bundle), packed)
            packed.seek(0)  # and with it everything is in the file, whose size httpx asks the system for
            yield "bundle.tar.gz", packed, "application/gzip"
