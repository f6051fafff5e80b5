"""How far beyond each limit the host ever saw a run, in real gVisor sandboxes; 0 is the best there is.

Every play attacks one limit and must be seen to reach it, or the benchmark stops: a bomb that never went off overshoots
nothing. (Where others leave less of the processor than is allowed, that play gives no figure.) What is seen, by whom:

- `memory`: the control group's own peak of everything charged to it (processes, files in /work and /tmp, memfd, the
  sandbox's share, its page tables and kernel stacks as far as this kernel counts them).
- `pids`: processes and threads of the guest's uid as the sentry lists them, sampled. `host_tasks`: the kernel's own
  threads in the control group, sampled, against the cap on them (96 + 3 x pids) which is the second wall.
- `disk`, `files`: blocks and inodes taken in the run's tmpfs (statfs), sampled; files that are deleted and open too.
- `output_stored`: bytes kept of one stream; `output_printed`: bytes read in all, against 64 times `output`.
- `step_time`: from before the step is started until it is over, its processes ended, in seconds of this host's clock.
- `wall_time`: the same of all steps of a run of the whole service (`usage.wall_s`). `wall_time_at_most` has everything
  in it from `started_at` to `finished_at`: the start of the first step, ending the sandbox, collecting, two commits.
- `cpu_0.5`, `cpu_1`: CPU seconds of the control group in a wall second, over a step of 3 s whose four busy processes
  would take all there is.
"""

import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import structlog

from service.core.boundary import Ended, Execution, Limit, Sandbox, StepSpec
from tests.bench.figures import MIB, Overshoot, rate, worst
from tests.bench.live import FORM, Document, form, progress, running, scratch
from tests.sandboxes import Never, gvisor_boundary, make_ref, make_spec, make_step
from workers.boundaries.gvisor.cgroups import Group
from workers.boundaries.gvisor.control import GUEST_UID, Connection, ControlLost, ControlRefused
from workers.boundaries.gvisor.driver import GvisorBoundary
from workers.boundaries.gvisor.render import FILES_OVERHEAD, group_limits
from workers.boundaries.gvisor.steps import OUTPUT_FACTOR
from workers.conformance import programs
from workers.conformance.cases import python

RUNS = int(os.environ.get("BENCH_LIMIT_RUNS", "3"))
_LOOK_EVERY_S = 0.002
_STEP_S, _WALL_S, _BURN_S = 1.0, 2.0, 3.0
_BURNED_AT_LEAST = 0.6
"""Of the CPU time allowed: a machine that has no more to give proves nothing of a limit."""
THREAD_BOMB = """
import threading, time
while True:
    try:
        threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()
    except RuntimeError:
        time.sleep(0.05)
"""
DELETED_BUT_OPEN = """
held = []
try:
    for n in range(10**6):
        held.append(open(f"f{n}", "wb", buffering=0))
        os.unlink(f"f{n}")
        for _ in range(64):
            held[-1].write(b"x" * (1 << 16))
except OSError:
    time.sleep(0.3)
"""
BURN = """
for _ in range(3):
    if os.fork() == 0:
        break
while True:
    pass
"""
STUBBORN = """
import signal
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
for _ in range(20):
    if os.fork() == 0:
        os.setsid()
        break
while True:
    time.sleep(0.01)
"""


def measure(runsc: Path) -> Document:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    with scratch() as directory:
        runtime_dir = Path(f"/run/bd-bench-{secrets.token_hex(4)}")  # short: a socket's path in it has to fit
        try:
            with gvisor_boundary(runtime_dir, store=directory / "runtimes", runsc=runsc) as boundary:
                found = _at_the_boundary(boundary, runtime_dir)
        finally:
            with suppress(OSError):
                runtime_dir.rmdir()
    found |= _wall_time()
    return {"overshoot": {name: shot.document() for name, shot in found.items()}}


def _at_the_boundary(boundary: GvisorBoundary, runtime_dir: Path) -> dict[str, Overshoot]:
    found: dict[str, list[Overshoot]] = {}
    for number in range(RUNS):
        for play in PLAYS:
            progress(f"limits {number + 1}/{RUNS}: {play.name}")
            seen = _played(boundary, runtime_dir, play)
            if play.limit is not None and play.limit not in seen.execution.limits:
                raise SystemExit(f"{play.name} did not reach its limit: {seen.execution}")
            for name, shot in play.judged(play, seen).items():
                found.setdefault(name, []).append(shot)
    return {name: worst(shots) for name, shots in found.items()}


@dataclass
class Seen:
    """The most that the host saw of one play. `cpu`: (host's time, CPU seconds) at every look."""

    execution: Execution = field(init=False)
    took_s: float = 0.0
    tasks: int = 0
    host_tasks: int = 0
    disk_bytes: int = 0
    files: int = 0
    memory_bytes: int = 0
    cpu: list[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Play:
    """`limit`: what the host must have seen being hit; None where a time is."""

    name: str
    argv: Sequence[str]
    limits: dict[str, Any]
    limit: Limit | None
    judged: "Callable[[Play, Seen], dict[str, Overshoot]]"
    timeout_s: float = 20.0

    def shot(self, unit: str, limit: float, seen: float) -> Overshoot:
        return Overshoot(unit=unit, limit=limit, seen=seen, by=self.name)


def _played(boundary: GvisorBoundary, runtime_dir: Path, play: Play) -> Seen:
    installation = boundary.host.installation
    ref = make_ref(installation=installation)
    group = boundary.group(ref)
    step = make_step(*play.argv, timeout_s=play.timeout_s)
    try:
        with boundary.open(make_spec(**play.limits), ref, cancelled=Never()) as sandbox:
            seen = _watched(sandbox, step, _Looker(group, runtime_dir / installation / ref.name))
            seen.memory_bytes = group.peak_memory_bytes()
    finally:
        boundary.destroy(ref)
    return seen


def _watched(sandbox: Sandbox, step: StepSpec, looker: "_Looker") -> Seen:
    with looker.looking() as seen:
        started = time.monotonic()
        seen.execution = sandbox.execute(step)
        seen.took_s = time.monotonic() - started
    return seen


class _Looker:
    """Looks at a sandbox from outside while it plays."""

    def __init__(self, group: Group, place: Path) -> None:
        self._group, self._place = group, place
        self._seen = Seen()

    @contextmanager
    def looking(self) -> Iterator[Seen]:
        stop = threading.Event()
        self._look_at_host()
        threads = [
            threading.Thread(target=self._until, args=(stop, look)) for look in (self._look_at_host, self._ask_sentry)
        ]
        for thread in threads:
            thread.start()
        try:
            yield self._seen
        finally:
            with suppress(FileNotFoundError):
                self._look_at_host()
            stop.set()
            for thread in threads:
                thread.join()

    def _until(self, stop: threading.Event, look: Callable[[], None]) -> None:
        try:
            while not stop.wait(_LOOK_EVERY_S):
                look()
        except (ControlLost, ControlRefused, FileNotFoundError):
            return  # the sandbox has ended under the play

    def _look_at_host(self) -> None:
        seen, space = self._seen, os.statvfs(self._place / "fs")
        seen.disk_bytes = max(seen.disk_bytes, (space.f_blocks - space.f_bfree) * space.f_frsize)
        seen.files = max(seen.files, space.f_files - space.f_ffree - FILES_OVERHEAD)
        seen.host_tasks = max(seen.host_tasks, self._group.host_tasks())
        seen.cpu.append((time.monotonic(), self._group.cpu_s()))

    def _ask_sentry(self) -> None:
        runsc_fd = os.open(self._place / "runsc", os.O_RDONLY | os.O_DIRECTORY)
        try:
            with Connection(runsc_fd) as control:
                processes = control.processes()
        finally:
            os.close(runsc_fd)
        self._seen.tasks = max(self._seen.tasks, sum(one.threads for one in processes if one.uid == GUEST_UID))
        time.sleep(10 * _LOOK_EVERY_S)  # an answer costs the guest CPU time


# --- What is judged of a play ----------------------------------------------------------------------------------------


def _memory(play: Play, seen: Seen) -> dict[str, Overshoot]:
    return {"memory": play.shot("bytes", play.limits["memory"], seen.memory_bytes)}


def _pids(play: Play, seen: Seen) -> dict[str, Overshoot]:
    spec = make_spec(**play.limits)
    return {
        "pids": play.shot("processes and threads", spec.limits.pids, seen.tasks),
        "host_tasks": play.shot("threads of the host", group_limits(spec).tasks, seen.host_tasks),
    }


def _disk(play: Play, seen: Seen) -> dict[str, Overshoot]:
    return {"disk": play.shot("bytes", play.limits["disk"], seen.disk_bytes)}


def _files(play: Play, seen: Seen) -> dict[str, Overshoot]:
    return {"files": play.shot("files and directories", play.limits["files"], seen.files)}


def _output(play: Play, seen: Seen) -> dict[str, Overshoot]:
    limit = play.limits["output"]
    streams = (seen.execution.stdout, seen.execution.stderr)
    return {
        "output_stored": play.shot("bytes of one stream", limit, max(len(stream.data) for stream in streams)),
        "output_printed": play.shot("bytes", OUTPUT_FACTOR * limit, sum(stream.total_bytes for stream in streams)),
    }


def _step_time(play: Play, seen: Seen) -> dict[str, Overshoot]:
    _must_time_out(play, seen)
    return {"step_time": play.shot("seconds", play.timeout_s, seen.took_s)}


def _cpu(play: Play, seen: Seen) -> dict[str, Overshoot]:
    _must_time_out(play, seen)
    allowed, taken = play.limits["cpu"], rate(seen.cpu)
    if taken < _BURNED_AT_LEAST * min(allowed, os.cpu_count() or 1):
        print(f"no figure: {taken:.2f} CPU seconds a second, of {allowed:g} allowed, is all that this machine gave")
        return {}
    return {f"cpu_{allowed:g}": play.shot("CPU seconds per second", allowed, taken)}


def _must_time_out(play: Play, seen: Seen) -> None:
    if seen.execution.ended is not Ended.STEP_TIMEOUT:
        raise SystemExit(f"{play.name} did not last: {seen.execution}")


def _argv(program: str, **given: Any) -> tuple[str, ...]:
    return python(program, given=given).argv


def _own(body: str) -> tuple[str, ...]:
    return _argv("import os, time\n" + body)


PLAYS: tuple[Play, ...] = (
    Play(name="memory of a process", argv=_argv(programs.MEMORY_BOMB, mib=1024), limits={"memory": 64 * MIB},
         limit=Limit.MEMORY, judged=_memory),
    Play(name="memory in /tmp", argv=_argv(programs.TMPFS_BOMB, mib=1024, place="/tmp"),
         limits={"memory": 64 * MIB, "disk": 512 * MIB}, limit=Limit.MEMORY, judged=_memory),
    Play(name="memory in a memfd", argv=_argv(programs.MEMFD_BOMB, mib=1024), limits={"memory": 64 * MIB},
         limit=Limit.MEMORY, judged=_memory),
    Play(name="fork bomb", argv=_argv(programs.FORK_BOMB), limits={"pids": 32}, limit=Limit.PIDS, judged=_pids,
         timeout_s=3),
    Play(name="thread bomb", argv=_own(THREAD_BOMB), limits={"pids": 32}, limit=Limit.PIDS, judged=_pids,
         timeout_s=3),
    Play(name="one large file", argv=_argv(programs.FILL_DISK, mib=64), limits={"disk": 16 * MIB}, limit=Limit.DISK,
         judged=_disk),
    Play(name="files that are deleted and open", argv=_own(DELETED_BUT_OPEN), limits={"disk": 16 * MIB},
         limit=Limit.DISK, judged=_disk),
    Play(name="many files", argv=_argv(programs.FILL_INODES, count=2000), limits={"files": 256}, limit=Limit.FILES,
         judged=_files),
    Play(name="flood", argv=_argv(programs.FLOOD), limits={"output": 16 * 1024}, limit=Limit.OUTPUT, judged=_output),
    Play(name="sleep", argv=("/bin/sleep", "3600"), limits={}, limit=None, judged=_step_time, timeout_s=_STEP_S),
    Play(name="fork bomb until the time is over", argv=_argv(programs.FORK_BOMB), limits={"pids": 64}, limit=None,
         judged=_step_time, timeout_s=_STEP_S),
    Play(name="deaf to signals", argv=_own(STUBBORN), limits={}, limit=None, judged=_step_time, timeout_s=_STEP_S),
    *(Play(name="four busy processes", argv=_own(BURN), limits={"cpu": cpu}, limit=None, judged=_cpu,
           timeout_s=_BURN_S) for cpu in (0.5, 1)),
)  # fmt: skip


# --- The time of a whole run -----------------------------------------------------------------------------------------


def _wall_time() -> dict[str, Overshoot]:
    """Two steps, of which the second is in the middle when the time is over; and one that burns."""
    controls = f'{{"limits": {{"wall": "{_WALL_S:g}s"}}}}'
    scenarios = {
        "two sleeping steps": [["sleep", "1.2"], ["sleep", "3600"]],
        "four busy processes": [list(_own(BURN))],
    }
    by_usage, at_most = [], []
    with running() as service, service.client() as client:
        for number in range(RUNS):
            for name, commands in scenarios.items():
                progress(f"limits {number + 1}/{RUNS}: wall time, {name}")
                steps = [{"name": f"step {n}", "run": command} for n, command in enumerate(commands, start=1)]
                body = form(scenario=json.dumps({"name": name, "steps": steps}), controls=controls)
                run = client.finished(client.ask("POST", "/v1/runs", body, **FORM))
                if run["reason"] != "wall_timeout":
                    raise SystemExit(f"{name}: ended by {run['reason']}, not by its time")
                whole = datetime.fromisoformat(run["finished_at"]) - datetime.fromisoformat(run["started_at"])
                words = {"unit": "seconds", "limit": _WALL_S, "by": name}
                by_usage.append(Overshoot(seen=run["usage"]["wall_s"], **words))
                at_most.append(Overshoot(seen=whole.total_seconds(), **words))
    return {"wall_time": worst(by_usage), "wall_time_at_most": worst(at_most)}
