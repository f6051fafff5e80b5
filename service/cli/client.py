"""The service over HTTP, as the commands use it. Synchronous; documents come back as the service wrote them.

Exceptions
├── Problem        the service refused or failed: its problem document (RFC 9457), with the HTTP status
├── Unreachable    no answer: nothing listens there, it hung up, or what answered is not Blastdoor
└── CannotPack     (service.cli.packing) the directory is not one that can be uploaded
"""

import json
import secrets
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self
from urllib.parse import quote

import httpx

from service.cli.packing import pack_directory

Document = dict[str, Any]

ATTEMPTS = 3
LONGEST_RETRY_S = 10.0


class Problem(Exception):
    """`document` is the problem as it came; `code` the contract's stable word for it."""

    def __init__(self, status: int, document: Mapping[str, Any]) -> None:
        self.status = status
        self.document = dict(document)
        self.code = str(document.get("code", ""))
        self.detail = str(document.get("detail") or document.get("title") or f"HTTP status {status}")
        super().__init__(self.detail)

    @property
    def refused(self) -> bool:
        """The request was at fault, not the platform."""
        return self.status < 500


class Unreachable(Exception):
    """Nobody answered as Blastdoor does; the message says where and how it failed."""


class Client:
    """One key at one address. Use it in a `with` block."""

    def __init__(
        self,
        url: str,
        *,
        key: str,
        tenant: str | None = None,
        transport: httpx.BaseTransport | None = None,
        use_proxies: bool = False,
    ) -> None:
        """`tenant` names whom a service key acts for. `use_proxies`: take a proxy from the environment; never for this
        machine, where a key would leave it."""
        headers = {"Authorization": f"Bearer {key}", "Accept": "application/json"}
        if tenant is not None:
            headers["Blastdoor-Tenant"] = tenant
        self._url = url
        self._admin = "/v1/tenants" if key.startswith("bd_s_") else "/v1/admin/tenants"
        self._http = httpx.Client(
            base_url=url,
            headers=headers,
            transport=transport,
            trust_env=use_proxies,
            timeout=httpx.Timeout(90.0, connect=5.0),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    # --- runs -------------------------------------------------------------------------------------------------------

    def submit(
        self,
        directory: Path,
        *,
        scenario: Path | None = None,
        controls: Path | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Document:
        """Upload a directory and queue its run. Safe to repeat inside: every attempt carries the same Idempotency-Key.

        Raises CannotPack, OSError for a document that cannot be read, Problem, Unreachable.
        """
        fields: dict[str, tuple[str | None, bytes, str]] = {}
        if scenario is not None:
            fields["scenario"] = (scenario.name, scenario.read_bytes(), "application/yaml")
        if controls is not None:
            fields["controls"] = (controls.name, controls.read_bytes(), "application/yaml")
        if metadata:
            fields["metadata"] = (None, json.dumps(dict(metadata)).encode(), "application/json")
        with tempfile.TemporaryFile(prefix="blastdoor-") as bundle:
            pack_directory(directory, bundle)
            return self._submit_packed(bundle, fields)

    def _submit_packed(self, bundle: BinaryIO, fields: Mapping[str, tuple[str | None, bytes, str]]) -> Document:
        headers = {"Idempotency-Key": secrets.token_hex(16)}
        for attempt in range(1, ATTEMPTS + 1):
            bundle.seek(0)
            files: dict[str, Any] = {**fields, "bundle": ("bundle.tar.gz", bundle, "application/gzip")}
            try:
                return self._ask("POST", "/v1/runs", files=files, headers=headers)
            except Unreachable as error:
                if attempt == ATTEMPTS or isinstance(error.__cause__, httpx.ConnectError):
                    raise
                time.sleep(0.2)
            except Problem as problem:
                pause_s = _retry_after_s(problem)
                if attempt == ATTEMPTS or pause_s is None:
                    raise
                time.sleep(pause_s)
        raise AssertionError("the last attempt returns or raises")

    def get(self, run_id: str, *, wait_s: int = 0) -> Document:
        """The run; `wait_s` (at most 60) holds the answer until it is finished."""
        return self._ask("GET", _run(run_id), params={"wait": wait_s} if wait_s else {})

    def watch(self, run_id: str, *, every_s: int = 1) -> Iterator[Document]:
        """The run as it stands, again and again, at least every `every_s` seconds; the last one is finished."""
        while True:
            run = self.get(run_id, wait_s=every_s)
            yield run
            if run["phase"] == "finished":
                return

    def wait(self, run_id: str) -> Document:
        """The finished run. Every accepted run ends, so this does too; interrupt it to stop waiting sooner."""
        return next(run for run in self.watch(run_id, every_s=30) if run["phase"] == "finished")

    def list_runs(
        self, *, phase: str | None = None, outcome: str | None = None, limit: int = 20, cursor: str | None = None
    ) -> Document:
        """Newest first: `{items, next_cursor}`."""
        asked = {"phase": phase, "outcome": outcome, "limit": limit, "cursor": cursor}
        return self._ask("GET", "/v1/runs", params={k: v for k, v in asked.items() if v is not None})

    def cancel(self, run_id: str) -> Document:
        return self._ask("POST", _run(run_id) + "/cancel")

    def output(self, run_id: str, step: int, *, stream: str) -> AbstractContextManager[Iterator[bytes]]:
        """The stored bytes of one step's `stdout` or `stderr`, in pieces. Raises Problem, Unreachable."""
        return self._download(f"{_run(run_id)}/steps/{step}/{stream}")

    def artifact(self, run_id: str, path: str) -> AbstractContextManager[Iterator[bytes]]:
        """One artifact, in pieces; `path` as the run spells it. Raises Problem, Unreachable."""
        return self._download(f"{_run(run_id)}/artifacts/{quote(path, safe='/')}")

    def capabilities(self) -> Document:
        return self._ask("GET", "/v1/capabilities")

    def healthy(self) -> bool:
        """Whether it answers at all; never raises."""
        try:
            return self._http.get("/healthz", timeout=5.0).status_code == 200
        except httpx.HTTPError:
            return False

    # --- tenants and services ---------------------------------------------------------------------------------------

    def create_tenant(self, tenant: Mapping[str, Any]) -> Document:
        """-> `{tenant, key}`; the key is shown this once."""
        return self._ask("POST", self._admin, json=dict(tenant))

    def list_tenants(self) -> Document:
        return self._ask("GET", self._admin)

    def get_tenant(self, name: str) -> Document:
        return self._ask("GET", self._tenant(name))

    def update_tenant(self, name: str, changes: Mapping[str, Any]) -> Document:
        return self._ask("PATCH", self._tenant(name), json=dict(changes))

    def delete_tenant(self, name: str) -> None:
        self._ask("DELETE", self._tenant(name))

    def create_key(self, name: str) -> Document:
        """-> `{id, key}`; the key is shown this once."""
        return self._ask("POST", self._tenant(name) + "/keys")

    def revoke_key(self, name: str, key_id: str) -> None:
        self._ask("DELETE", f"{self._tenant(name)}/keys/{quote(key_id, safe='')}")

    def create_service(self, name: str) -> Document:
        """-> `{id, key}`; the key is shown this once."""
        return self._ask("POST", "/v1/admin/services", json={"name": name})

    def _tenant(self, name: str) -> str:
        return f"{self._admin}/{quote(name, safe='')}"

    @contextmanager
    def _download(self, path: str) -> Iterator[Iterator[bytes]]:
        headers = {"Accept": "*/*", "Accept-Encoding": "identity"}
        try:
            with self._http.stream("GET", path, headers=headers) as answer:
                if not answer.is_success:
                    answer.read()
                    document = _json_object(answer)
                    if document is not None and "code" in document:
                        raise Problem(answer.status_code, document)
                    raise Unreachable(f"{self._url} answered {answer.status_code}, but not as Blastdoor does")
                yield answer.iter_bytes()
        except httpx.HTTPError as error:
            raise Unreachable(f"{self._url} does not answer: {str(error) or type(error).__name__}") from error

    def _ask(self, method: str, path: str, **request: Any) -> Document:
        """-> the JSON object; empty for 204. Raises Problem, Unreachable."""
        try:
            answer = self._http.request(method, path, **request)
        except httpx.HTTPError as error:
            raise Unreachable(f"{self._url} does not answer: {str(error) or type(error).__name__}") from error
        document = _json_object(answer)
        if answer.is_success and (document is not None or answer.status_code == 204):
            return document or {}
        if document is not None and "code" in document:
            raise Problem(answer.status_code, document | _retry_header(answer))
        raise Unreachable(f"{self._url} answered {answer.status_code} to {method} {path}, but not as Blastdoor does")


def _run(run_id: str) -> str:
    return f"/v1/runs/{quote(run_id, safe='')}"


def _json_object(answer: httpx.Response) -> Document | None:
    try:
        document = answer.json()
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def _retry_header(answer: httpx.Response) -> Document:
    value = answer.headers.get("Retry-After", "")
    return {"retry_after_s": int(value)} if value.isdecimal() else {}


def _retry_after_s(problem: Problem) -> float | None:
    """How long to wait before the same request again; None: it will not help, or not soon."""
    seconds = problem.document.get("retry_after_s")
    if problem.status != 503 or not isinstance(seconds, int) or seconds > LONGEST_RETRY_S:
        return None
    return float(seconds)
