"""A real `blastdoor up` for tests: every process of it, a state directory and a runtime directory of its own, its keys,
two tenants that know nothing of each other, and a look at its runs from the host's side.

It is started once for a session. When it is stopped, the whole machine is swept for what carries its mark.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from service.adapters.sql_store import SqlStore
from service.core.boundary import boundary_name
from tests.sweep import Found, pids_in_cgroups, sweep, swept
from workers.boundaries.gvisor.cgroups import CgroupTree, Group
from workers.boundaries.gvisor.places import Places

READY_WITHIN_S, STOPPED_WITHIN_S, GONE_WITHIN_S, SLOW_S = 90.0, 60.0, 15.0, 60.0
SETTINGS = {
    "BLASTDOOR_ENVIRONMENT": "test",
    "BLASTDOOR_HOUSEKEEPING_S": "1",
    "BLASTDOOR_RING_AFTER_S": "2",
    "BLASTDOOR_WORKER_CONCURRENCY": "2",
    "BLASTDOOR_CANARY_S": "600",  # one at the start; later ones would be among the runs that tests count
}
Document = dict[str, Any]


class NoStack(Exception):
    """This machine cannot run one; the message says what it lacks."""


@dataclass
class Stack:
    """A running `blastdoor up`. `token` is in the environment of its processes, and nowhere else."""

    state: Path
    runtime_dir: Path
    token: str
    process: subprocess.Popen[str]
    ready: Document = field(default_factory=dict)
    installation: str = ""
    _clients: dict[str, httpx.Client] = field(default_factory=dict)

    # --- who calls ---
    @property
    def tenant(self) -> httpx.Client:
        """The tenant `demo`, untrusted, with the default quota."""
        return self.client(self.ready["tenant_key"])

    @property
    def stranger(self) -> httpx.Client:
        """Another tenant."""
        return self.new_tenant("stranger")

    @property
    def service(self) -> httpx.Client:
        return self.client(self.ready["service_key"])

    @property
    def admin(self) -> httpx.Client:
        return self.client(self.ready["admin_key"])

    def new_tenant(self, name: str, **quota: int) -> httpx.Client:
        """The client of an untrusted tenant, made when it is not there yet."""
        if name not in self._clients:
            body = {"name": name, "trust": "untrusted"} | ({"quota": quota} if quota else {})
            answer = self.admin.post("/v1/admin/tenants", json=body)
            assert answer.status_code == 201, answer.text
            self._clients[name] = self.client(answer.json()["key"])
        return self._clients[name]

    def client(self, key: str) -> httpx.Client:
        if key not in self._clients:
            headers = {"Authorization": f"Bearer {key}"}
            self._clients[key] = httpx.Client(
                base_url=self.ready["url"], headers=headers, trust_env=False, timeout=90.0
            )
        return self._clients[key]

    # --- its processes ---
    @property
    def children(self) -> dict[str, int]:
        rows = json.loads((self.state / "up.json").read_text())["processes"]
        return {name: row["pid"] for name, row in rows.items()}

    def worker_processes(self) -> dict[int, str]:
        """The worker, the processes it forked, and what those hold (a warm supervisor each): pid to start time."""
        parents = {pid: _stat(pid) for pid in map(int, filter(str.isdigit, os.listdir("/proc")))}
        line = {self.children["worker"]}
        while more := {pid for pid, stat in parents.items() if stat and int(stat[1]) in line} - line:
            line |= more
        return {pid: stat[19] for pid in line if (stat := parents.get(pid))}

    def pool(self) -> list[int]:
        """The worker's forks, which play the runs; its warm supervisor is another program."""
        worker = self.children["worker"]
        ours = _words(worker)
        return [
            pid
            for pid in self.worker_processes()
            if (stat := _stat(pid)) and stat[1] == str(worker) and _words(pid) == ours
        ]

    @contextmanager
    def no_worker_dies(self) -> Iterator[None]:
        """The worker is the same process afterwards, with all its children. Which ones is Celery's business: it
        replaces a child after 50 runs."""
        worker, children = self.children["worker"], int(SETTINGS["BLASTDOOR_WORKER_CONCURRENCY"])
        yield
        assert self.children["worker"] == worker, "the worker itself died"
        assert eventually(lambda: len(self.pool()) == children), "its pool is not whole"

    def worker_rss_bytes(self) -> int:
        """Resident memory of the worker's own processes, the sandboxes' left out."""
        inside = pids_in_cgroups(f"blastdoor-{self.installation}")
        return sum(_rss_bytes(pid) for pid in self.worker_processes().keys() - inside)

    # --- its runs, from the host's side ---
    def mark(self, run_id: str) -> str:
        """What everything of a run on this host carries in its name."""
        return boundary_name(run_id, 1).removesuffix("1")

    def group(self, run_id: str, fence: int = 1) -> Group:
        places = Places(runtime_dir=self.runtime_dir, installation=self.installation, site=self.token)
        return CgroupTree.detect().group(places.group_name(boundary_name(run_id, fence)))

    def sentry(self, run_id: str) -> int:
        """The pid of the run's sandbox process, found by its control group."""
        found: list[int] = eventually(lambda: [pid for pid in sorted(self.group(run_id).pids()) if _is_sentry(pid)])
        assert len(found) == 1, found
        return found[0]

    def work_of(self, run_id: str) -> Path:
        """The guest's /work as this host sees it."""
        return self.runtime_dir / self.installation / boundary_name(run_id, 1) / "fs" / "work"

    def wait_for_file(self, run_id: str, name: str) -> None:
        """Until the guest has made this file in /work, by lstat alone: only then does its step play for sure."""
        assert eventually(lambda: os.path.lexists(self.work_of(run_id) / name)), f"no {name}"

    def left_of(self, run_id: str, *, within_s: float = GONE_WITHIN_S) -> list[Found]:
        return swept(self.mark(run_id), within_s=within_s)

    def sweep(self, *, within_s: float = 0.0) -> list[Found]:
        """Of the whole installation; to be asked when it has stopped."""
        marks = (self.installation, str(self.state), str(self.runtime_dir), self.token)
        return swept(*(mark for mark in marks if mark), directories=[self.runtime_dir], within_s=within_s)

    def close(self) -> None:
        for client in set(self._clients.values()):
            client.close()


@contextmanager
def run_stack(directory: Path, **environment: str) -> Iterator[Stack]:
    """Start it, wait for its line, stop it, and prove that nothing is left. Raises NoStack."""
    if os.geteuid() != 0:
        raise NoStack("sandboxes need root")
    for program in ("runsc", "redis-server", "setpriv"):
        if shutil.which(program) is None:
            raise NoStack(f"{program} is not installed")
    token = f"canary{secrets.token_hex(12)}"
    runtime_dir = Path(f"/run/bd-test-{secrets.token_hex(4)}")  # short: a socket's path in it has to fit
    state, log = directory / "state", directory / "up.stderr"
    assert not sweep(str(runtime_dir), str(state), token)
    settings = SETTINGS | {"BLASTDOOR_RUNTIME_DIR": str(runtime_dir), "BLASTDOOR_SITE": token} | environment
    with log.open("w") as errors:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", sys.executable, "-I", "-m", "service.cli.main",
             "up", "--state", str(state), "--port", "0", "--json"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True,
            env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8"} | settings,
        )  # fmt: skip
    stack = Stack(state, runtime_dir, token, process)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()  # `up` itself gives up after a minute
        assert line, log.read_text()
        stack.ready = json.loads(line)
        stack.installation = _installation(state)
        yield stack
        assert process.poll() is None, f"`up` has ended by itself: {log.read_text()}"
    finally:
        stack.close()
        status = _stopped(process)
        with suppress(OSError):  # ours, since `up` may share one with others; what is in it stays to be found
            runtime_dir.rmdir()
    assert status == 0, f"`up` ended with {status}: {log.read_text()}"
    left = stack.sweep(within_s=GONE_WITHIN_S)
    assert not left, "left behind:\n" + "\n".join(map(str, left))
    assert not list((state / "staging").iterdir()), "an upload was left in staging"


def _stopped(process: subprocess.Popen[str]) -> int:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(STOPPED_WITHIN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
    finally:
        assert process.stdout is not None
        process.stdout.close()


def _installation(state: Path) -> str:
    store = SqlStore(f"sqlite:///{state / 'blastdoor.db'}")
    try:
        return store.installation_id()
    finally:
        store.close()


# --- submitting -------------------------------------------------------------------------------------------------------


def post(
    client: httpx.Client, *runs: str | Sequence[str] | Mapping[str, Any], limits: Mapping[str, Any] | None = None,
    controls: Mapping[str, Any] | None = None, bundle: bytes | None = None,
    metadata: Mapping[str, str] | None = None, **scenario: Any,
) -> httpx.Response:  # fmt: skip
    """POST a scenario whose steps are `runs`: a command, or a whole step without its name."""
    steps = [
        {"name": f"step {n}"} | (dict(run) if isinstance(run, Mapping) else {"run": run})
        for n, run in enumerate(runs, start=1)
    ]
    parts: dict[str, tuple[str, bytes]] = {}
    if steps:
        parts["scenario"] = ("scenario.json", json.dumps({"name": "a test", "steps": steps} | scenario).encode())
    if limits or controls:
        asked = dict(controls or {}) | ({"limits": dict(limits)} if limits else {})
        parts["controls"] = ("controls.json", json.dumps(asked).encode())
    if bundle is not None:
        parts["bundle"] = ("bundle", bundle)
    if metadata is not None:
        parts["metadata"] = ("metadata.json", json.dumps(dict(metadata)).encode())
    return client.post("/v1/runs", files=parts)


def submit(client: httpx.Client, *runs: str | Sequence[str] | Mapping[str, Any], **more: Any) -> str:
    """-> the id of the accepted run."""
    answer = post(client, *runs, **more)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def read(client: httpx.Client, run_id: str) -> Document:
    answer = client.get(f"/v1/runs/{run_id}")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def finished(client: httpx.Client, run_id: str, *, within_s: float = SLOW_S) -> Document:
    """The run when it is finished, by `wait`."""
    deadline = time.monotonic() + within_s
    while True:
        left_s = max(deadline - time.monotonic(), 0.0)
        answer = client.get(f"/v1/runs/{run_id}", params={"wait": min(left_s, 30.0)})
        assert answer.status_code == 200, answer.text
        run: Document = answer.json()
        if run["phase"] == "finished":
            return run
        assert left_s > 0, f"not finished within {within_s:g} s: {run}"


def played(client: httpx.Client, *runs: str | Sequence[str] | Mapping[str, Any], **more: Any) -> Document:
    """Submit, and wait for the end."""
    return finished(client, submit(client, *runs, **more))


def started(client: httpx.Client, run_id: str) -> Document:
    """The run once its first step is about to play; see `wait_for_file`."""
    run: Document | None = eventually(lambda: found if (found := read(client, run_id))["phase"] == "running" else None)
    assert run, read(client, run_id)
    return run


def python(program: str) -> list[str]:
    return ["python3", "-S", "-c", program]


# --- watching ---------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What the host's control groups said of a run while it was there."""

    tasks: int = 0
    memory_bytes: int = 0
    cpu_s: float = 0.0
    looks: int = 0


@contextmanager
def watching(stack: Stack, run_id: str) -> Iterator[Seen]:
    """Look at the run's control groups from a thread of our own, as often as the machine allows."""
    group, seen, stop = stack.group(run_id), Seen(), threading.Event()

    def look() -> None:
        while not stop.wait(0.02):
            try:
                tasks = int((group.paths["pids"] / "pids.current").read_text())
                memory, cpu_s = group.peak_memory_bytes(), group.cpu_s()
            except OSError:
                continue  # not made yet, or removed
            seen.tasks, seen.memory_bytes = max(seen.tasks, tasks), max(seen.memory_bytes, memory)
            seen.cpu_s, seen.looks = max(seen.cpu_s, cpu_s), seen.looks + 1

    thread = threading.Thread(target=look, name=f"watching-{run_id}")
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def watched(client: httpx.Client, stack: Stack, *runs: Any, **more: Any) -> tuple[Document, Seen]:
    """Submit, and watch the run from the host's side until it is finished."""
    run_id = submit(client, *runs, **more)
    with watching(stack, run_id) as seen:
        run = finished(client, run_id)
    assert seen.looks, "the run was never seen on the host"
    return run, seen


def eventually(look: Callable[[], Any], *, within_s: float = SLOW_S) -> Any:
    """The first answer that is true, or the last one."""
    deadline = time.monotonic() + within_s
    while not (found := look()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def _is_sentry(pid: int) -> bool:
    try:
        return b"boot" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def _stat(pid: int) -> list[str] | None:
    """proc(5) stat from field 3 on; None when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _words(pid: int) -> bytes:
    """Its command line; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _rss_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
