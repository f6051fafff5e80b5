"""Each boundary kind as the contract tests see it: how to make one, and how to say a few programs to it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from service.core.boundary import Boundary, BoundaryRef, StepSpec
from tests.sandboxes import Never, gvisor_boundary, make_ref, make_spec, make_step, require_gvisor, shell
from tests.summary import ran
from workers.boundaries.fake import FakeBoundary, FakeWorld
from workers.boundaries.gvisor.driver import GvisorBoundary


class Kind(Protocol):
    """`programs`: what a guest is told to do, in this kind's own words."""

    boundary: Boundary
    installation: str

    def ref(self, *, run_id: str | None = None, fence: int = 1) -> BoundaryRef:
        """Of a new run, or another attempt at one."""
        ...

    def as_discovered(self, ref: BoundaryRef) -> BoundaryRef:
        """What of a reference can be read back from the platform."""
        ...

    def exits(self, code: int) -> StepSpec: ...
    def segfaults(self) -> StepSpec: ...
    def missing(self) -> StepSpec: ...
    def prints(self, text: str) -> StepSpec: ...
    def complains(self, text: str) -> StepSpec: ...
    def floods(self, size: int) -> StepSpec: ...
    def echoes(self, stdin: bytes) -> StepSpec: ...
    def sleeps(self, seconds: float, *, timeout_s: float) -> StepSpec: ...
    def talks(self, first: str, seconds: float, second: str) -> StepSpec: ...
    def writes(self, path: str, text: str) -> StepSpec: ...
    def leaves_a_child_holding_stdout(self, text: str) -> StepSpec: ...
    def another_process(self) -> Boundary:
        """A boundary as another process of this host has it."""
        ...

    def worker_killed_in(self, ref: BoundaryRef) -> None:
        """Open `ref` in a worker that is then killed without a chance to clean up."""
        ...

    def running(self, ref: BoundaryRef) -> bool:
        """Whether anything of the guest still runs."""
        ...


class FakeKind:
    installation = "fake"

    def __init__(self, world: FakeWorld) -> None:
        self._world = world
        self.boundary = FakeBoundary(world=world)
        self._abandoned: list[object] = []

    def ref(self, *, run_id: str | None = None, fence: int = 1) -> BoundaryRef:
        return make_ref(installation=self.installation, run_id=run_id, fence=fence)

    def as_discovered(self, ref: BoundaryRef) -> BoundaryRef:
        return ref

    def exits(self, code: int) -> StepSpec:
        return make_step("exit", str(code))

    def segfaults(self) -> StepSpec:
        return make_step("signal", "11")

    def missing(self) -> StepSpec:
        return make_step("/nonexistent/program")

    def prints(self, text: str) -> StepSpec:
        return make_step("print", text)

    def complains(self, text: str) -> StepSpec:
        return make_step("complain", text)

    def floods(self, size: int) -> StepSpec:
        return make_step("flood", str(size))

    def echoes(self, stdin: bytes) -> StepSpec:
        return make_step("echo", stdin=stdin)

    def sleeps(self, seconds: float, *, timeout_s: float) -> StepSpec:
        return make_step("sleep", str(seconds), timeout_s=timeout_s)

    def talks(self, first: str, seconds: float, second: str) -> StepSpec:
        return make_step("talk", first, str(seconds), second, timeout_s=2 * seconds)

    def writes(self, path: str, text: str) -> StepSpec:
        return make_step("write", path, text)

    def leaves_a_child_holding_stdout(self, text: str) -> StepSpec:
        return make_step("orphan", text)

    def another_process(self) -> Boundary:
        return FakeBoundary(world=self._world)

    def worker_killed_in(self, ref: BoundaryRef) -> None:
        opened = FakeBoundary(world=self._world).open(make_spec(), ref, cancelled=Never())
        opened.__enter__()
        self._abandoned.append(opened)  # never left, as by a worker that was killed; its supervisor ends the guest
        self._world.running.discard(ref.name)

    def running(self, ref: BoundaryRef) -> bool:
        return ref.name in self._world.running


class Shelled:
    """The programs of a kind whose guest has a shell."""

    def exits(self, code: int) -> StepSpec:
        return shell(f"exit {code}")

    def segfaults(self) -> StepSpec:
        return shell("kill -SEGV $$")

    def missing(self) -> StepSpec:
        return make_step("/nonexistent/program")

    def prints(self, text: str) -> StepSpec:
        return make_step("printf", "%s", text)

    def complains(self, text: str) -> StepSpec:
        return shell('printf %s "$0" >&2'.replace("$0", text))

    def floods(self, size: int) -> StepSpec:
        return shell(f"head -c {size} /dev/zero | tr '\\0' A")

    def echoes(self, stdin: bytes) -> StepSpec:
        return make_step("cat", stdin=stdin)

    def sleeps(self, seconds: float, *, timeout_s: float) -> StepSpec:
        return make_step("sleep", str(seconds), timeout_s=timeout_s)

    def talks(self, first: str, seconds: float, second: str) -> StepSpec:
        return shell(f"printf %s {first}; sleep {seconds}; printf %s {second}", timeout_s=2 * seconds)

    def writes(self, path: str, text: str) -> StepSpec:
        return shell(f"mkdir -p $(dirname {path}) && printf %s '{text}' > {path}")

    def leaves_a_child_holding_stdout(self, text: str) -> StepSpec:
        return shell(f"(sleep 30; echo late) & printf %s '{text}'")


class GvisorKind(Shelled):
    def __init__(self, boundary: GvisorBoundary, runtime_dir: Path, store: Path) -> None:
        self.boundary = boundary
        self.installation = boundary.host.installation
        self._runtime_dir, self._store = runtime_dir, store

    def ref(self, *, run_id: str | None = None, fence: int = 1) -> BoundaryRef:
        return make_ref(installation=self.installation, run_id=run_id, fence=fence)

    def as_discovered(self, ref: BoundaryRef) -> BoundaryRef:
        return ref

    def another_process(self) -> Boundary:
        return GvisorBoundary(self.boundary.host)

    def worker_killed_in(self, ref: BoundaryRef) -> None:
        """A real process: it opens the sandbox, plays a step that does not end, and is killed in it."""
        arguments = [self.installation, str(self._runtime_dir), str(self._store), ref.model_dump_json()]
        worker = subprocess.Popen(
            [sys.executable, "-m", "tests.contract.boundary_kinds", *arguments],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        assert worker.stdout is not None
        with worker:
            assert worker.stdout.readline() == b"playing\n"
            time.sleep(0.3)
            assert self.running(ref)
            os.kill(worker.pid, signal.SIGKILL)

    def running(self, ref: BoundaryRef) -> bool:
        group = self.boundary.group(ref)
        return bool(group.pids())


@contextmanager
def fake_kind() -> Iterator[FakeKind]:
    ran("boundary", "fake")
    yield FakeKind(FakeWorld())


@contextmanager
def gvisor_kind(runtime_dir: Path, store: Path) -> Iterator[GvisorKind]:
    require_gvisor()
    with gvisor_boundary(runtime_dir, store=store) as boundary:
        yield GvisorKind(boundary, runtime_dir, store)


def _be_a_worker() -> None:
    """The process that `worker_killed_in` kills."""
    from workers.boundaries.gvisor.driver import GvisorHost
    from workers.runtimes.store import RuntimeStore

    installation, runtime_dir, store, ref = sys.argv[1:]
    host = GvisorHost(
        installation=installation, site="here", runtime_dir=Path(runtime_dir), runtimes=RuntimeStore(Path(store))
    )
    boundary = GvisorBoundary(host)
    with boundary.open(make_spec(), BoundaryRef.model_validate_json(ref), cancelled=Never()) as sandbox:
        print("playing", flush=True)
        sandbox.execute(shell("trap '' TERM INT HUP; sleep 600 & sleep 600", timeout_s=600))


__all__ = ["Kind", "fake_kind", "gvisor_kind", "make_ref"]

if __name__ == "__main__":
    _be_a_worker()
