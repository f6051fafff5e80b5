"""What the tests share that send an attack the whole way: over HTTP, through the worker, into a real sandbox, and back.

The attacks are the corpus' own programs (`workers.conformance.programs`): what `blastdoor doctor --attack` plays at the
driver is submitted here as a tenant would. They print what they got hold of; the host looks for tokens in every byte.
"""

import hashlib
import json
import os
import secrets
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import redis

from service.core.boundary import boundary_name
from tests.stack import Document, Stack, finished, submit
from workers.conformance.programs import BEGUN

STREAM = "blastdoor:events"


def new_token() -> str:
    """In the form that the corpus' programs look for."""
    return f"bdcanary{secrets.token_hex(16)}"


def program(text: str, **given: Any) -> list[str]:
    """The argv of one of the corpus' programs, and what it is told."""
    return ["/usr/bin/env", "python3", "-I", "-S", "-c", text, json.dumps(given)]


def attacked(
    stack: Stack, *runs: list[str], client: httpx.Client | None = None, token: str | None = None, **more: Any
) -> Document:
    """The finished run of these programs. `token`: into the environment of its steps, which only controls do."""
    env = {"env": {"TOKEN": token}} if token else {}
    client = client or stack.tenant
    run = finished(client, submit(client, *runs, **env, **more))
    assert BEGUN in run["steps"][0]["stdout"]["text"], f"the attack never began: {run}"
    return run


def said(run: Document, word: str) -> list[str]:
    """What the programs printed after this word, line by line."""
    lines = [line for step in run["steps"] for line in step["stdout"]["text"].splitlines()]
    return [line.removeprefix(word).strip() for line in lines if line.startswith(f"{word} ")]


def artifact(client: httpx.Client, run_id: str, path: str) -> httpx.Response:
    answer = client.get(f"/v1/runs/{run_id}/artifacts/{quote(path, safe='/')}")
    assert answer.status_code == 200, answer.text
    return answer


def everything_of(client: httpx.Client, run: Document) -> bytes:
    """Every byte that a tenant can get of a run: its record, what its steps printed, its artifacts."""
    pieces = [json.dumps(run).encode()]
    for step in run["steps"]:
        for stream in ("stdout", "stderr"):
            pieces.append(client.get(f"/v1/runs/{run['id']}/steps/{step['n']}/{stream}").content)
    pieces += [artifact(client, run["id"], row["path"]).content for row in run["artifacts"]]
    return b"\n".join(pieces)


def insist_on_harmless_headers(answer: httpx.Response) -> None:
    """A browser takes it for nothing but bytes to save."""
    headers = answer.headers
    assert headers["content-type"] == "application/octet-stream"
    assert headers["content-disposition"].startswith("attachment;")
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-security-policy"].startswith("sandbox; default-src 'none'")


def events_of(stack: Stack, run_id: str | None = None) -> list[Document]:
    """All that stands on the bus, or all of one run."""
    with redis.Redis.from_url(stack.ready["redis_url"], decode_responses=True) as bus:
        rows: Any = bus.xrange(STREAM)
    events: list[Document] = [json.loads(fields["event"]) for _, fields in rows]
    return [event for event in events if run_id in (None, event["subject"])]


# --- the host's side ---


@dataclass(frozen=True)
class Held:
    """What a directory holds, what is mounted in it too."""

    bytes: int
    inodes: int

    def __sub__(self, other: "Held") -> "Held":
        return Held(self.bytes - other.bytes, self.inodes - other.inodes)


def held_by(stack: Stack) -> Held:
    """The installation's own directories: on a machine that others use too, free space says nothing of who took it."""
    size = inodes = 0
    for root in (stack.state, stack.runtime_dir):
        for top, names, files in os.walk(root):
            for name in (*names, *files):
                try:
                    found = os.lstat(f"{top}/{name}")
                except FileNotFoundError:
                    continue
                size, inodes = size + found.st_blocks * 512, inodes + 1
    return Held(size, inodes)


def descriptors(stack: Stack) -> int:
    """Open in the worker's own processes, the waiting supervisors among them."""
    count = 0
    for pid in stack.worker_processes():
        try:
            count += len(os.listdir(f"/proc/{pid}/fd"))
        except FileNotFoundError:
            continue
    return count


def work_of(stack: Stack, run_id: str) -> Path:
    """Where this host has the run's /work while it goes on."""
    return stack.runtime_dir / stack.installation / boundary_name(run_id, 1) / "fs/work"


def fingerprint(*roots: Path) -> str:
    """Of all that stands there: names, kinds, modes, owners, sizes, times; contents of small files."""
    digest = hashlib.sha256()
    for root in roots:
        for top, names, files in os.walk(root):
            names.sort()
            for name in sorted((*names, *files)):
                path = Path(top, name)
                found = path.lstat()
                row = (str(path), found.st_mode, found.st_uid, found.st_size, found.st_mtime_ns, found.st_nlink)
                digest.update(repr(row).encode())
                if path.is_file() and not path.is_symlink() and found.st_size < 4096:
                    digest.update(path.read_bytes())
    return digest.hexdigest()


class Wire:
    """Every packet of every interface of this host, the loopback's too (packet(7)), looked through for some text."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._packets: list[bytes] = []

    def carrying(self, text: str) -> int:
        return sum(text.encode() in packet for packet in list(self._packets))

    @contextmanager
    def tapped(self) -> Iterator["Wire"]:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as tap:
            tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**22)
            tap.settimeout(0.1)

            def listen() -> None:
                while not self._stop.is_set():
                    try:
                        self._packets.append(tap.recv(65536))
                    except TimeoutError:
                        continue

            thread = threading.Thread(target=listen, name="wire")
            thread.start()
            try:
                yield self
            finally:
                self._stop.set()
                thread.join()


@dataclass
class Neighbour:
    """Another tenant's run beside the attack. It holds a token in its environment, its memory and its files."""

    run_id: str
    token: str
    outcome: Mapping[str, Any] | None = None


_WAITING = """
import os, time
kept = os.environ["TOKEN"] * 1000
open("secret", "w").write(kept)
open("plays", "w").close()
while not os.path.exists("go"):
    time.sleep(0.02)
print("unharmed" if open("secret").read() == kept else "changed")
"""


@contextmanager
def neighbour(stack: Stack) -> Iterator[Neighbour]:
    """It lives through the block, and must pass afterwards: nobody has killed it or written into what it holds."""
    token, client = new_token(), stack.new_tenant("neighbour")
    run_id = submit(client, ["/usr/bin/env", "python3", "-I", "-S", "-c", _WAITING], env={"TOKEN": token})
    stack.wait_for_file(run_id, "plays")
    beside = Neighbour(run_id, token)
    try:
        yield beside
    finally:
        (work_of(stack, run_id) / "go").touch()
        run = finished(client, run_id)
    assert (run["outcome"], run["steps"][0]["stdout"]["text"]) == ("passed", "unharmed\n"), run
