"""The service under measurement: a real `blastdoor up`, the least of a client, and a scratch directory."""

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.bench.bare import PROGRAM

Document = dict[str, Any]
SCENARIO = json.dumps({"name": "one line", "steps": [{"name": "hello", "run": list(PROGRAM)}]})
FORM = {"Content-Type": "multipart/form-data; boundary=bench"}


class Service:
    """`blastdoor up` in a directory of its own; `settings` are environment variables without their prefix."""

    def __init__(self, state: Path, **settings: object) -> None:
        self.state = state
        self.log = state.with_name(state.name + ".stderr")
        command = [sys.executable, "-m", "service.cli.main", "up", "--json", "--state", str(state), "--port", "0"]
        added = {f"BLASTDOOR_{name.upper()}": str(value) for name, value in settings.items()}
        self.process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", *command], stdout=subprocess.PIPE, text=True, env=os.environ | added
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("`blastdoor up` did not start; see the logs in " + str(state))
        self.ready: dict[str, str] = json.loads(line)

    def client(self, key: str | None = None) -> "Client":
        return Client(self.address, key or self.ready["tenant_key"])

    @property
    def address(self) -> str:
        return urlsplit(self.ready["url"]).netloc

    def new_tenant(self, name: str, **quota: int) -> str:
        """-> its key."""
        with self.client(self.ready["admin_key"]) as operator:
            body = json.dumps({"name": name, "trust": "untrusted", "quota": quota}).encode()
            key: str = operator.ask("POST", "/v1/admin/tenants", body, **{"Content-Type": "application/json"})["key"]
        return key

    def pid(self, child: str) -> int:
        """Of one of its processes: `api`, `relay`, ..."""
        pid: int = json.loads((self.state / "up.json").read_text())["processes"][child]["pid"]
        return pid

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=60)


@contextmanager
def running(**settings: object) -> Iterator[Service]:
    """A service that ends, and its directory with it, when the block does."""
    with scratch() as directory:
        service = Service(directory / "state", **settings)
        try:
            yield service
        finally:
            service.stop()


@contextmanager
def scratch() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="blastdoor-bench-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class Client:
    """The least that a client can be, on one kept connection: what is measured is the service."""

    def __init__(self, address: str, key: str) -> None:
        self._connection = http.client.HTTPConnection(address, timeout=90)
        self._headers = {"Authorization": f"Bearer {key}"}

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Document:
        self._connection.request(method, path, body, self._headers | headers)
        answer = self._connection.getresponse()
        text = answer.read()
        if answer.status >= 300:
            raise SystemExit(f"{method} {path}: {answer.status} {text.decode()}")
        document: Document = json.loads(text) if text else {}
        return document

    def finished(self, run: Document) -> Document:
        while run["phase"] != "finished":
            run = self.ask("GET", f"/v1/runs/{run['id']}?wait=30")
        return run


def form(**parts: str) -> bytes:
    """The body of a submission without a bundle."""
    texts = [
        f'--bench\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n' for name, text in parts.items()
    ]
    return "".join([*texts, "--bench--\r\n"]).encode()


UPLOAD = form(scenario=SCENARIO)


def submit(client: Client, body: bytes = UPLOAD) -> tuple[str, float, float]:
    """One run from POST to its result; -> (id, start, end) on the monotonic clock."""
    started = time.monotonic()
    run = client.finished(client.ask("POST", "/v1/runs", body, **FORM))
    ended = time.monotonic()
    must_pass(run)
    return run["id"], started, ended


def must_pass(run: Mapping[str, Any]) -> None:
    if run["outcome"] != "passed":
        raise SystemExit(f"the benchmark's run did not pass: {json.dumps(run, indent=1)}")


def progress(text: str) -> None:
    sys.stderr.write(f"\r\033[K{text}" if sys.stderr.isatty() else "")
    sys.stderr.flush()
