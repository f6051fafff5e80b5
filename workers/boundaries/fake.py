"""A boundary without a wall, for tests of everything around one: it plays scripted programs and misbehaves by name.

It is shipped, and it keeps every promise of the contract tests that does not need a wall. It is in no registry: no
worker can be configured to use it, since it isolates nothing and runs nothing.

A `FakeWorld` stands for the platform. Two `FakeBoundary` objects over one world are two processes on one host.
Programs (the step's argv): `exit CODE`, `signal NUMBER`, `print TEXT`, `complain TEXT` (stderr), `flood BYTES`, `echo`
(stdin to stdout), `sleep SECONDS`, `talk TEXT SECONDS TEXT` (prints, is silent, prints again), `write PATH TEXT`, `die`
(the sandbox is lost), `limit NAME`, `orphan TEXT` (prints, and leaves a child that holds stdout). Anything else is a
missing program.
"""

import fnmatch
import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

from service.core.boundary import (
    Artifact,
    ArtifactLimits,
    Artifacts,
    ArtifactSink,
    BoundaryKind,
    BoundaryRef,
    BoundarySpec,
    Bundle,
    Cancellation,
    Capabilities,
    Capture,
    Ended,
    Evidence,
    Execution,
    FileContent,
    Limit,
    Listener,
    Sandbox,
    SkippedArtifact,
    StepSpec,
    Usage,
)
from service.core.errors import BoundaryError, BoundaryLost, NotYetDestroyed, ProvisionFailed, QuotaExceeded, TooLarge
from service.core.failpoints import Failpoint, reach

_OUTPUT_FACTOR = 64


@dataclass
class FakeWorld:
    """What exists on the platform, by name; and which of it runs."""

    labels: dict[str, BoundaryRef] = field(default_factory=dict)
    running: set[str] = field(default_factory=set)


@dataclass
class _Guest:
    """One sandbox: its files, its clock, and what it has printed."""

    ref: BoundaryRef
    spec: BoundarySpec
    sleep: Callable[[float], None]
    cancelled: Cancellation
    files: dict[str, bytes] = field(default_factory=dict)
    alive: bool = True
    printed: int = 0
    listener: Listener | None = None

    def tell(self, stdout: bytes, stderr: bytes = b"") -> None:
        if self.listener is not None and stdout:
            self.listener("stdout", stdout)
        if self.listener is not None and stderr:
            self.listener("stderr", stderr)


class FakeSandbox:
    def __init__(self, guest: _Guest, world: FakeWorld) -> None:
        self._guest, self._world = guest, world
        self._collected = self._uploaded = self._played = False

    def upload(self, bundle: Bundle) -> None:
        if self._uploaded or self._played or self._collected:
            raise BoundaryError("the bundle comes once, before the first step")
        self._uploaded = True

    def execute(self, step: StepSpec, *, listener: Listener | None = None) -> Execution:
        if self._collected:
            raise BoundaryError("nothing runs after collect")
        self._played = True
        self._guest.listener = listener
        if not self._guest.alive or self._guest.ref.name not in self._world.running:
            return Execution(ended=Ended.LOST, duration_s=0, cpu_s=0, sandbox_alive=False)
        execution = self._play(step)
        self._guest.alive = execution.sandbox_alive
        if not execution.sandbox_alive:
            self._world.running.discard(self._guest.ref.name)
        return execution

    def evidence(self) -> Evidence:
        if not self._played:
            raise BoundaryLost("nothing ran that could be observed")
        limits = self._guest.spec.limits
        return Evidence(
            runtime="fake",
            runtime_version="0",
            runtime_sha256=None,
            platform=None,
            network=self._guest.spec.network.mode,
            limits={"memory_bytes": limits.memory, "disk_bytes": limits.disk, "files": limits.files},
            uid=65532,
            observed_at=datetime.now(UTC),
        )

    def collect(self, patterns: Sequence[str], *, limits: ArtifactLimits, sink: ArtifactSink) -> Artifacts:
        if self._collected:
            raise BoundaryError("collect is called once")
        self._collected = True
        self._guest.alive = False
        self._world.running.discard(self._guest.ref.name)
        kept, skipped = [], []
        left_bytes = limits.total_bytes
        for path, data in sorted(self._guest.files.items()):
            if not any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns):
                continue
            try:
                digest, size = sink.put(io.BytesIO(data), max_bytes=left_bytes)
            except TooLarge:
                skipped.append(SkippedArtifact(path=path, why="too large: the run's artifacts may come to no more"))
                continue
            except QuotaExceeded:
                skipped.append(SkippedArtifact(path=path, why="storage quota"))
                continue
            left_bytes -= size
            kept.append(Artifact(path=path, bytes=size, sha256=digest))
        expected = {path: self._expected(path) for path in limits.expected}
        return Artifacts(kept=tuple(kept), skipped=tuple(skipped), expected=expected, usage=Usage())

    def _expected(self, path: str) -> FileContent:
        data = self._guest.files.get(path)
        return FileContent(absent_why="absent") if data is None else FileContent(data=data)

    def _play(self, step: StepSpec) -> Execution:
        word, args = step.argv[0], step.argv[1:]
        program = _PROGRAMS.get(word)
        if program is None:
            return _execution(Ended.NOT_STARTED, message=f"{word}: no such program")
        if word == "sleep" and float(args[0]) > step.timeout_s:
            return self._sleep_until_told(step.timeout_s)
        execution = program(self._guest, step, args)
        self._guest.printed += execution.stdout.total_bytes + execution.stderr.total_bytes
        if self._guest.printed > _OUTPUT_FACTOR * self._guest.spec.limits.output:
            hit = execution.limits | {Limit.OUTPUT}
            update = {"ended": Ended.LIMIT, "exit_code": None, "limits": hit, "sandbox_alive": False}
            return execution.model_copy(update=update)
        return execution

    def _sleep_until_told(self, seconds: float) -> Execution:
        if self._guest.cancelled.is_set():
            return _execution(Ended.CANCELLED, sandbox_alive=False)
        self._guest.sleep(seconds)
        return _execution(Ended.STEP_TIMEOUT, duration_s=seconds)


class FakeBoundary:
    """Behaves. Its subclasses do not, each in one way."""

    def __init__(
        self,
        *,
        installation: str = "fake",
        site: str = "here",
        world: FakeWorld | None = None,
        sleep: Callable[[float], None] = lambda _: None,
    ) -> None:
        self.world = FakeWorld() if world is None else world
        self._installation, self._site, self._sleep = installation, site, sleep

    @property
    def kind(self) -> BoundaryKind:
        return BoundaryKind.GVISOR

    def probe(self) -> Sequence[Capabilities]:
        digest = "sha256:" + hashlib.sha256(b"fake").hexdigest()
        return (Capabilities(boundary=self.kind.value, available=True, runtimes={"default": digest}),)

    @contextmanager
    def open(self, spec: BoundarySpec, ref: BoundaryRef, *, cancelled: Cancellation) -> Iterator[Sandbox]:
        if ref.name in self.world.labels:
            raise ProvisionFailed(f"{ref.name} exists")
        reach(Failpoint.OPEN_BEFORE_CREATE)
        if cancelled.is_set():
            raise ProvisionFailed("not wanted any more, before anything was made")
        self.world.labels[ref.name] = ref
        try:
            reach(Failpoint.OPEN_HALF_CREATED)
            self.world.running.add(ref.name)
            self._before_ready()
            reach(Failpoint.OPEN_CREATED)
        except BaseException:
            self.world.running.discard(ref.name)
            self.world.labels.pop(ref.name, None)
            raise
        try:
            yield self._sandbox(_Guest(ref=ref, spec=spec, sleep=self._sleep, cancelled=cancelled))
        finally:
            self.world.running.discard(ref.name)

    def discover(self) -> Iterator[BoundaryRef]:
        yield from [ref for ref in list(self.world.labels.values()) if ref.installation == self._installation]

    def destroy(self, ref: BoundaryRef) -> None:
        self.world.running.discard(ref.name)
        self.world.labels.pop(ref.name, None)

    def _before_ready(self) -> None:
        """For those that misbehave."""

    def _sandbox(self, guest: _Guest) -> FakeSandbox:
        return FakeSandbox(guest, self.world)


class SlowBoundary(FakeBoundary):
    """Takes `open_s` until it is ready; `sleep` says how time passes."""

    open_s = 5.0

    def _before_ready(self) -> None:
        self._sleep(self.open_s)


class NeverReadyBoundary(FakeBoundary):
    """Is started and never becomes ready."""

    def _before_ready(self) -> None:
        raise ProvisionFailed("the sandbox was not ready in time")


class DyingBoundary(FakeBoundary):
    """Every sandbox is lost in its first step."""

    def _sandbox(self, guest: _Guest) -> FakeSandbox:
        return _DyingSandbox(guest, self.world)


class _DyingSandbox(FakeSandbox):
    def _play(self, step: StepSpec) -> Execution:
        return _execution(Ended.LOST, message="the sandbox ended", sandbox_alive=False)


class ResistingBoundary(FakeBoundary):
    """Refuses to be destroyed `refusals` times for each name."""

    refusals = 2

    def __init__(self, *, world: FakeWorld | None = None) -> None:
        super().__init__(world=world)
        self._refused: dict[str, int] = {}

    def destroy(self, ref: BoundaryRef) -> None:
        if ref.name in self.world.labels and self._refused.get(ref.name, 0) < self.refusals:
            self._refused[ref.name] = self._refused.get(ref.name, 0) + 1
            raise NotYetDestroyed(f"{ref.name} resists")
        super().destroy(ref)


def _execution(
    ended: Ended,
    *,
    exit_code: int | None = None,
    signal: int | None = None,
    message: str = "",
    duration_s: float = 0.001,
    stdout: Capture | None = None,
    stderr: Capture | None = None,
    limits: frozenset[Limit] = frozenset(),
    sandbox_alive: bool = True,
) -> Execution:
    return Execution(
        ended=ended,
        exit_code=exit_code,
        signal=signal,
        message=message,
        duration_s=duration_s,
        cpu_s=duration_s,
        stdout=stdout or Capture(),
        stderr=stderr or Capture(),
        limits=limits,
        sandbox_alive=sandbox_alive,
    )


def _capture(guest: _Guest, data: bytes) -> Capture:
    half = guest.spec.limits.output // 2
    if len(data) <= guest.spec.limits.output:
        return Capture(head=data, total_bytes=len(data))
    return Capture(head=data[: guest.spec.limits.output - half], tail=data[-half:], total_bytes=len(data))


def _exited(guest: _Guest, *, stdout: bytes = b"", stderr: bytes = b"", code: int = 0) -> Execution:
    guest.tell(stdout, stderr)
    return _execution(Ended.EXITED, exit_code=code, stdout=_capture(guest, stdout), stderr=_capture(guest, stderr))


def _write(guest: _Guest, step: StepSpec, args: tuple[str, ...]) -> Execution:
    guest.files[args[0]] = args[1].encode()
    return _exited(guest)


def _sleep(guest: _Guest, step: StepSpec, args: tuple[str, ...]) -> Execution:
    guest.sleep(float(args[0]))
    return _execution(Ended.EXITED, exit_code=0, duration_s=float(args[0]))


def _talk(guest: _Guest, step: StepSpec, args: tuple[str, ...]) -> Execution:
    first, seconds, second = args[0].encode(), float(args[1]), args[2].encode()
    guest.tell(first)
    guest.sleep(seconds)
    if guest.cancelled.is_set():
        return _execution(Ended.CANCELLED, stdout=_capture(guest, first), sandbox_alive=False)
    guest.tell(second)
    return _execution(Ended.EXITED, exit_code=0, duration_s=seconds, stdout=_capture(guest, first + second))


def _limit(guest: _Guest, step: StepSpec, args: tuple[str, ...]) -> Execution:
    return _execution(Ended.LIMIT, limits=frozenset({Limit(args[0])}), sandbox_alive=False)


_Program = Callable[[_Guest, StepSpec, tuple[str, ...]], Execution]
_PROGRAMS: Mapping[str, _Program] = {
    "exit": lambda guest, step, args: _exited(guest, code=int(args[0])),
    "signal": lambda guest, step, args: _execution(Ended.EXITED, signal=int(args[0])),
    "print": lambda guest, step, args: _exited(guest, stdout=args[0].encode()),
    "complain": lambda guest, step, args: _exited(guest, stderr=args[0].encode()),
    "flood": lambda guest, step, args: _exited(guest, stdout=b"A" * int(args[0])),
    "echo": lambda guest, step, args: _exited(guest, stdout=step.stdin),
    "orphan": lambda guest, step, args: _exited(guest, stdout=args[0].encode()),
    "die": lambda guest, step, args: _execution(Ended.LOST, message="the sandbox ended", sandbox_alive=False),
    "write": _write,
    "sleep": _sleep,
    "talk": _talk,
    "limit": _limit,
}


__all__ = [
    "DyingBoundary",
    "FakeBoundary",
    "FakeWorld",
    "NeverReadyBoundary",
    "ResistingBoundary",
    "SlowBoundary",
]
