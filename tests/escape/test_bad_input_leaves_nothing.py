"""Whatever is refused at the door leaves nothing behind it: no file, process, mount, control group, nor a row of any
kind. Each kind of refusal is sent to a whole `blastdoor up`, which is looked over before and after.

Uploads that crawl, stop half-way or hang up end by their deadline; what is received at once is bounded, on disk too.
"""

import gzip
import json
import os
import random
import socket
import sqlite3
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.archives import (
    GNU,
    ZipMember,
    directory,
    gzipped,
    long_name,
    tar,
    tar_header,
    tar_member,
    zip_archive,
)
from tests.escape.whole_way import new_token
from tests.stack import NoStack, Stack, eventually, finished, run_stack, submit
from tests.summary import ran
from tests.sweep import sweep

MIB = 2**20
CAP, DEADLINE_S, AT_ONCE = 4 * MIB, 2, 4
pytestmark = pytest.mark.timeout(240)
SCENARIO = "name: hello\nsteps: [{name: only, run: 'true'}]\n"
FORM = "multipart/form-data; boundary=b"
HEAD = b'--b\r\nContent-Disposition: form-data; name="bundle"; filename="x"\r\n\r\n'


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Takes 4 MiB, for two seconds, four at a time. Nothing runs in it but what a test submits: its one canary run is
    over when it is handed out."""
    bounds = {
        "UPLOAD_MAX_BYTES": str(CAP), "UPLOAD_DEADLINE_S": str(DEADLINE_S), "UPLOADS_AT_ONCE": str(AT_ONCE),
        "CANARY_S": "86400",
    }  # fmt: skip
    try:
        directory_ = tmp_path_factory.mktemp("narrow")
        with run_stack(directory_, **{f"BLASTDOOR_{name}": value for name, value in bounds.items()}) as stack:
            ran("database", f"sqlite {sqlite3.sqlite_version}")
            stack.new_tenant("refused")
            stack.new_tenant("poor", storage_bytes=1000)
            stack.new_tenant("busy", concurrent=1, queued=1)
            for run_id in [submit(stack.tenant, "sleep 0.2") for _ in range(4)]:
                finished(stack.tenant, run_id)
            assert eventually(lambda: httpx.get(f"{stack.ready['url']}/readyz").status_code == 200)
            assert eventually(lambda: all_is_over(stack), within_s=30)
            yield stack
    except NoStack as missing:
        pytest.skip(str(missing))


# --- the look ---


@dataclass(frozen=True)
class Look:
    files: frozenset[str]
    rows: Counter[str]
    host: frozenset[str]

    def more_than(self, before: "Look") -> list[str]:
        rows = [f"{count} rows more in {table}" for table, count in (self.rows - before.rows).items()]
        return sorted(self.files - before.files) + sorted(self.host - before.host) + rows


OURS = ("audit", "inventory", "site", "worker", "relay_state")
"""Tables that change by themselves as time goes by."""


def look(stack: Stack) -> Look:
    files = set()
    for root in (stack.state, stack.runtime_dir):
        for top, names, others in os.walk(root):
            names[:] = [
                name for name in names if f"{top}/{name}" not in (f"{stack.state}/logs", f"{stack.state}/redis")
            ]
            files |= {f"{top}/{name}" for name in (*names, *others) if not name.startswith("blastdoor.db")}
    files -= {entry.path for entry in os.scandir(stack.state / "blobs")}  # a tenant's directory stays: it is no trace
    with closing(sqlite3.connect(f"file:{stack.state / 'blastdoor.db'}?mode=ro", uri=True)) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        rows = Counter({
            table: database.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in tables if table not in OURS
        })  # fmt: skip
    host = {f"worker process {pid}" for pid in stack.worker_processes()}
    host |= {str(found) for found in sweep(stack.installation) if found.kind != "process"}
    return Look(frozenset(files), rows, frozenset(host))


def all_is_over(stack: Stack) -> bool:
    """Whether every run has ended, and the wall of each that had one is known to be gone."""
    unfinished = "phase <> 'finished' OR (started_at IS NOT NULL AND boundary_destroyed_at IS NULL)"
    with closing(sqlite3.connect(f"file:{stack.state / 'blastdoor.db'}?mode=ro", uri=True)) as database:
        left: int = database.execute(f"SELECT count(*) FROM run WHERE {unfinished}").fetchone()[0]
    return left == 0


def is_still(stack: Stack) -> bool:
    """Whether nothing has changed for half a second, whatever goes on."""
    before = look(stack)
    time.sleep(0.5)
    return look(stack) == before


@contextmanager
def nothing_left(stack: Stack) -> Iterator[None]:
    """The request's directory goes when its answer is out, so the last look may have to wait for a moment."""
    before = look(stack)
    yield
    left: list[str] = []

    def is_clean() -> bool:
        left[:] = look(stack).more_than(before)
        return not left

    assert eventually(is_clean, within_s=10), left


# --- what is sent ---


def raw(stack: Stack, *pieces: bytes, length: int = 100_000, pause_s: float = 0.0) -> socket.socket:
    """A connection on which so much of an upload was sent, and no more."""
    address = urlsplit(stack.ready["url"])
    connection = socket.create_connection((address.hostname, address.port), timeout=30)
    key = stack.new_tenant("refused").headers["authorization"]
    head = f"POST /v1/runs HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\nIdempotency-Key: {new_token()}\r\n"
    connection.sendall(f"{head}Content-Type: {FORM}\r\nContent-Length: {length}\r\n\r\n".encode())
    for piece in pieces:
        connection.sendall(piece)
        time.sleep(pause_s)
    return connection


def posted(client: httpx.Client, **parts: str | bytes) -> httpx.Response:
    files = {name: (name, part) for name, part in parts.items()}
    return client.post(
        "/v1/runs", files={"scenario": ("s", SCENARIO)} | files, headers={"Idempotency-Key": new_token()}
    )


def endless() -> Iterator[bytes]:
    yield HEAD
    while True:
        yield bytes(65536)


A = ZipMember(b"a.txt", b"hello")
ZEROS = gzip.compress(tar(tar_header(b"zeros", size=80 * MIB), bytes(80 * MIB)), 1)
NOISE = random.Random(1).randbytes(2 * MIB)
ARCHIVES: dict[str, bytes] = {
    "format": b"MZ\x90\x00" + bytes(2000),
    "corrupt": tar(tar_member(b"a", b"x" * 1000))[:-1],
    "trailing": zip_archive(A, suffix=b"x"),
    "header": tar(tar_header(patch={124: bytes(12)})),
    "overlap": zip_archive(A, gap=b"x"),
    "zip64": zip_archive(A, count=0xFFFF),
    "encrypted": zip_archive(ZipMember(A.name, A.content, flags=1)),
    "descriptor": zip_archive(ZipMember(A.name, A.content, flags=8)),
    "method": zip_archive(ZipMember(A.name, A.content, method=12)),
    "path": tar(tar_member(b"../../x", b"x")),
    "name": tar(tar_member("a\u202eb".encode(), b"x")),
    "depth": tar(long_name(b"d/" * 4999 + b"x"), tar_member(b"d/", b"deep", magic=GNU)),
    "duplicate": tar(tar_member(b"a", b"1"), tar_member(b"a", b"2")),
    "clash": tar(tar_member(b"a", b"1"), tar_member(b"A", b"2")),
    "link": tar(tar_header(b"l", kind=b"2", link=b"/etc/passwd")),
    "type": tar(tar_header(b"fifo", kind=b"6")),
    "count": gzipped(tar(*(directory(b"%d/" % n) for n in range(10_001)))),
    "size": tar(tar_header(b"large", size=65 * MIB), NOISE),
    "bomb": ZEROS,
    "files": gzipped(tar(*(directory(b"%d/" % n) for n in range(4097)))),
    "disk": tar(tar_member(b"a", NOISE[:MIB]), tar_member(b"b", NOISE[MIB:])),
}
"""By the rule that refuses it: those of `service.intake.archive`, and the two of the run's own limits."""


@pytest.mark.parametrize("rule", ARCHIVES)
def test_a_refused_bundle_leaves_nothing(narrow: Stack, rule: str) -> None:
    assert len(ARCHIVES[rule]) < CAP
    with nothing_left(narrow):
        answer = posted(narrow.new_tenant("refused"), bundle=ARCHIVES[rule], controls="limits: {disk: 1MiB}")
        assert (answer.status_code, answer.json()["code"], answer.json().get("rule")) == (422, "bundle_rejected", rule)


Send = Callable[[Stack], httpx.Response]


def parts(*, tenant: str = "refused", **sent: str | bytes) -> Send:
    return lambda stack: posted(stack.new_tenant(tenant), **sent)


def body(content: Callable[[], Any], *, kind: str = FORM) -> Send:
    headers = {"Content-Type": kind, "Idempotency-Key": "body"}
    return lambda stack: stack.new_tenant("refused").post("/v1/runs", content=content(), headers=headers)


def of_a_stranger(**headers: str) -> Send:
    """Whoever it is, it is not a tenant: an operator has the best of keys."""
    given = {"Content-Type": FORM, "Idempotency-Key": "stranger"} | headers
    return lambda stack: httpx.post(f"{stack.ready['url']}/v1/runs", content=HEAD, headers=given, trust_env=False)


BUNDLE = zip_archive(A)
REFUSED: dict[str, tuple[int, str, Send]] = {
    "scenario": (422, "scenario_invalid", parts(scenario="steps: [", bundle=BUNDLE)),
    "no scenario": (422, "scenario_invalid", body(lambda: HEAD + BUNDLE + b"\r\n--b--\r\n")),
    "controls": (422, "controls_invalid", parts(controls="limits: {cpu: 99999}", bundle=BUNDLE)),
    "a limit above the ceiling": (422, "controls_invalid", parts(controls="limits: {wall: 901s}", bundle=BUNDLE)),
    "metadata": (422, "metadata_invalid", parts(metadata='{"a": 1}', bundle=BUNDLE)),
    "placement": (422, "placement_refused", parts(controls="needs: [privileged]", bundle=BUNDLE)),
    "no such runtime": (422, "placement_refused", parts(scenario=f"runtime: absent\n{SCENARIO}", bundle=BUNDLE)),
    "storage quota": (429, "quota_exceeded", parts(tenant="poor", bundle=tar(tar_member(content=NOISE[:2000])))),
    "too large, as declared": (413, "too_large", parts(bundle=bytes(CAP + 1))),
    "too large, as it comes": (413, "too_large", body(endless)),
    "an unknown part": (422, "request_invalid", parts(bundle=BUNDLE, extra="x")),
    "no closing boundary": (422, "request_invalid", body(lambda: HEAD + bytes(MIB))),
    "not a form": (422, "request_invalid", body(lambda: bytes(1000), kind="application/zip")),
    "no key": (401, "unauthenticated", of_a_stranger()),
    "a key of nobody": (401, "unauthenticated", of_a_stranger(Authorization=f"Bearer bd_t_{'x' * 43}")),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refused_submission_leaves_nothing(narrow: Stack, kind: str) -> None:
    status, code, send = REFUSED[kind]
    with nothing_left(narrow):
        answer = send(narrow)
        assert (answer.status_code, answer.json()["code"]) == (status, code)


def test_a_run_beyond_the_queues_quota_leaves_nothing(narrow: Stack) -> None:
    client = narrow.new_tenant("busy")
    running = submit(client, "touch plays; sleep 60")
    narrow.wait_for_file(running, "plays")
    queued = submit(client, "true")
    assert eventually(lambda: is_still(narrow), within_s=30)
    with nothing_left(narrow):
        answer = posted(client, bundle=zip_archive(A))
        assert (answer.status_code, answer.json()["code"]) == (429, "quota_exceeded")
    for run_id in (queued, running):
        client.post(f"/v1/runs/{run_id}/cancel")
        finished(client, run_id)
    assert eventually(lambda: all_is_over(narrow), within_s=15)


def uploads_ended(stack: Stack) -> int:
    """As the service's own log has it: one that has hung up may not even have been looked at yet."""
    lines = (json.loads(line) for line in (stack.state / "logs" / "api.log").read_text().splitlines())
    return sum(line.get("method") == "POST" and line.get("path") == "/v1/runs" for line in lines)


def test_uploads_that_hang_up_half_way_leave_nothing(narrow: Stack) -> None:
    with nothing_left(narrow):
        ended = uploads_ended(narrow)
        for pieces in ((), (HEAD,), (HEAD, bytes(90_000)), (b"--b\r\nContent-Dis",)):
            raw(narrow, *pieces).close()
        reset = raw(narrow, HEAD, bytes(50_000))
        reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        reset.close()
        assert eventually(lambda: uploads_ended(narrow) == ended + 5, within_s=30)


def test_uploads_that_crawl_or_stop_end_by_the_deadline_and_leave_nothing(narrow: Stack) -> None:
    def answer(connection: socket.socket) -> bytes:
        with connection:
            return b"".join(iter(lambda: connection.recv(65536), b""))

    def crawl() -> bytes:
        connection = raw(narrow, HEAD)
        with suppress(OSError):  # it has hung up, which is what it should do
            for _ in range(200):
                connection.sendall(b"x")
                time.sleep(0.05)
        return answer(connection)

    with nothing_left(narrow), ThreadPoolExecutor(2) as pool:
        began = time.monotonic()
        crawling = pool.submit(crawl)
        stopped = answer(raw(narrow, HEAD, bytes(50_000)))
        took_s = time.monotonic() - began
        assert stopped.startswith(b"HTTP/1.1 408"), stopped
        assert b"upload_timed_out" in stopped
        assert DEADLINE_S * 0.9 < took_s < DEADLINE_S + 8
        with suppress(ConnectionResetError):  # what was still being sent met a closed connection
            assert crawling.result(timeout=30).startswith(b"HTTP/1.1 408")


def test_control_what_is_accepted_and_what_is_planted_is_seen(narrow: Stack) -> None:
    before, client = look(narrow), narrow.new_tenant("refused")
    answer = posted(client, bundle=zip_archive(A))
    assert answer.status_code == 202
    finished(client, answer.json()["id"])
    digest = answer.json()["bundle"]["digest"].removeprefix("sha256:")
    more = look(narrow).more_than(before)
    for table in ("run", "run_input", "run_blob", "outbox", "idempotency"):
        assert any(line.endswith(f"rows more in {table}") for line in more), (table, more)
    assert any(digest in line for line in more)
    assert eventually(lambda: all_is_over(narrow), within_s=15)

    before, planted = look(narrow), narrow.state / "staging/planted"
    planted.touch()
    assert look(narrow).more_than(before) == [str(planted)]
    planted.unlink()
    assert look(narrow).more_than(before) == []


def test_at_no_moment_is_more_on_disk_or_in_memory_than_the_uploads_that_fit(narrow: Stack) -> None:
    """Ten of five tenants at once, each without an end. One tenant's share is half of the places."""
    staging, stop, peak = narrow.state / "staging", threading.Event(), Peak()
    api = narrow.children["api"]
    before = rss_bytes(api)
    clients = [narrow.new_tenant(f"flood-{n}") for n in range(5)]

    def watch() -> None:
        while not stop.wait(0.005):
            sizes = [_size(Path(top, name)) for top, _, names in os.walk(staging) for name in names]
            peak.see(disk=sum(sizes), files=len([size for size in sizes if size]), memory=rss_bytes(api))

    def flood(n: int) -> httpx.Response:
        with httpx.Client(base_url=narrow.ready["url"], headers=clients[n % 5].headers, trust_env=False) as client:
            return client.post("/v1/runs", content=endless(), headers={"Content-Type": FORM}, timeout=60)

    watcher = threading.Thread(target=watch)
    with nothing_left(narrow):
        watcher.start()
        with ThreadPoolExecutor(10) as pool:
            answers = list(pool.map(flood, range(10)))
        stop.set()
        watcher.join()
    assert {answer.status_code for answer in answers} <= {413, 503}
    assert 413 in {answer.status_code for answer in answers}
    for answer in answers:
        assert answer.status_code != 503 or int(answer.headers["retry-after"]) >= 1
    assert 0 < peak.disk <= AT_ONCE * CAP
    assert 0 < peak.files <= AT_ONCE
    assert peak.memory - before < 64 * MIB


@dataclass
class Peak:
    disk: int = 0
    files: int = 0
    memory: int = 0

    def see(self, **seen: int) -> None:
        for name, value in seen.items():
            setattr(self, name, max(getattr(self, name), value))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
