"""Processes of the product by themselves, with settings that `blastdoor up` would not give them: a database that is
there already, a boundary that is none."""

import http.client
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.bench.live import Client
from tests.servers import LOOPBACK, _free_port

_READY_WITHIN_S = 60.0


@contextmanager
def program(role: str, directory: Path, *, settings: Mapping[str, object]) -> Iterator[None]:
    """`api`, `worker`, `relay` or `reaper`, until the block ends; its log is left in the directory. `settings`:
    environment variables without their prefix. Its boundary is the fake one, with its world on disk."""
    added = {f"BLASTDOOR_{name.upper()}": str(value) for name, value in settings.items()}
    with (directory / f"{role}-{settings.get('port', '')}.log").open("w") as log:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", sys.executable, "-m", "tests.faults.program", role],
            env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "PAPER": "1"} | added,
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        yield
        if process.poll() is not None:
            raise SystemExit(f"the {role} has ended by itself; its log:\n{Path(log.name).read_text()[-3000:]}")
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def api(directory: Path, *, settings: Mapping[str, object]) -> Iterator[str]:
    """-> its address, once it answers."""
    port = _free_port()
    address = f"{LOOPBACK}:{port}"
    with program("api", directory, settings=dict(settings) | {"port": port}):
        deadline = time.monotonic() + _READY_WITHIN_S
        while not _answers(address):
            if time.monotonic() > deadline:
                raise SystemExit(f"the api does not answer; see {directory}")
            time.sleep(0.1)
        yield address


def _answers(address: str) -> bool:
    with suppress(OSError, http.client.HTTPException), Client(address, "") as client:
        return client.ask("GET", "/healthz")["status"] == "ok"
    return False
