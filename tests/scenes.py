"""The worker's line on the shipped fakes, with places where a test can step in while a run goes on."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from service.adapters.memory import MemoryBlobs, MemoryDoorbell, MemoryHints, MemoryStore
from service.core.boundary import (
    ArtifactLimits,
    Artifacts,
    ArtifactSink,
    BoundaryKind,
    BoundaryRef,
    BoundarySpec,
    Bundle,
    Cancellation,
    Execution,
    Listener,
    Sandbox,
    StepSpec,
)
from service.core.run import Run
from service.core.scenario import Scenario
from tests.contract.store_steps import add_run, add_tenant, types_told
from tests.factories import make_controls, make_scenario
from workers.boundaries.fake import FakeBoundary, FakeSandbox
from workers.run_scenario import Line, run_waiting
from workers.watch import WatchTimes

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
LEASE = timedelta(seconds=30)
RUN_OUT = LEASE + timedelta(seconds=1)
BRISK = WatchTimes(
    lease=LEASE,
    heartbeat=timedelta(milliseconds=5),
    self_fence=timedelta(seconds=20),
    cancel_poll=timedelta(milliseconds=1),
)
DEAF = replace(BRISK, cancel_poll=timedelta(hours=1))
"""The watch asks nothing: what is lost is learned from a write."""
MOMENTS = ("opening", "uploading", "step", "evidence", "collecting", "closed", "destroying")


def eventually(true: Callable[[], bool], *, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.001)


class Clock:
    """The database's, which moves only when it is told to."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> datetime:
        return self.now


class Stage:
    """A boundary kind, on which a test acts at a `MOMENTS` of the run and sees what was asked of it.

    `acts["step"]` is called before each step is played, the others once.
    """

    def __init__(self, boundary: FakeBoundary | None = None) -> None:
        self.behind = boundary or FakeBoundary()
        self.acts: dict[str, Callable[[], None]] = {}
        self.refs: list[BoundaryRef] = []
        self.specs: list[StepSpec] = []
        self.uploads: list[Bundle] = []
        self.destroyed: list[str] = []
        self.patterns: list[Sequence[str]] = []
        self.watch: Cancellation | None = None

    @property
    def kind(self) -> BoundaryKind:
        return self.behind.kind

    @property
    def is_empty(self) -> bool:
        return not self.behind.world.labels and not self.behind.world.running

    def act(self, moment: str) -> None:
        assert moment in MOMENTS
        self.acts.get(moment, lambda: None)()

    def saw(self) -> None:
        """Wait until the watch of the run on stage is set."""
        watch = self.watch
        assert watch is not None
        eventually(watch.is_set)

    def probe(self) -> Any:
        return self.behind.probe()

    @contextmanager
    def open(self, spec: BoundarySpec, ref: BoundaryRef, *, cancelled: Cancellation) -> Iterator[Sandbox]:
        self.refs.append(ref)
        self.watch = cancelled
        self.act("opening")
        with self.behind.open(spec, ref, cancelled=cancelled) as sandbox:
            assert isinstance(sandbox, FakeSandbox)
            yield _Staged(self, sandbox)
        self.act("closed")

    def discover(self) -> Iterator[BoundaryRef]:
        return self.behind.discover()

    def destroy(self, ref: BoundaryRef) -> None:
        self.act("destroying")
        self.behind.destroy(ref)
        self.destroyed.append(ref.name)


class _Staged:
    def __init__(self, stage: Stage, behind: FakeSandbox) -> None:
        self._stage, self._behind = stage, behind

    def upload(self, bundle: Bundle) -> None:
        self._stage.act("uploading")
        self._stage.uploads.append(bundle)
        self._behind.upload(bundle)

    def execute(self, step: StepSpec, *, listener: Listener | None = None) -> Execution:
        self._stage.specs.append(step)
        self._stage.act("step")
        return self._behind.execute(step, listener=listener)

    def evidence(self) -> Any:
        self._stage.act("evidence")
        return self._behind.evidence()

    def collect(self, patterns: Sequence[str], *, limits: ArtifactLimits, sink: ArtifactSink) -> Artifacts:
        self._stage.patterns.append(patterns)
        found = self._behind.collect(patterns, limits=limits, sink=sink)
        self._stage.act("collecting")
        return found


class Theatre:
    """One worker, its tenant, and all that they need."""

    def __init__(
        self, *, store: MemoryStore | None = None, stage: Stage | None = None, times: WatchTimes = BRISK
    ) -> None:
        self.store = store or MemoryStore()
        self.stage = stage or Stage()
        self.blobs, self.doorbell, self.hints = MemoryBlobs(), MemoryDoorbell(), MemoryHints()
        self.line = Line(
            runs=self.store,
            blobs=self.blobs,
            hints=self.hints,
            doorbell=self.doorbell,
            boundaries={self.stage.kind: self.stage},
            offered=("gvisor",),
            runtimes=("default",),
            installation="fake",
            site="host-1",
            worker_id="wrk_1",
            times=times,
        )
        add_tenant(self.store, concurrent=10)

    def submit(self, scenario: Scenario | None = None, *, limits: dict[str, Any] | None = None, **more: Any) -> Run:
        controls = make_controls(limits=limits or {})
        return add_run(self.store, scenario=scenario or make_scenario(run=["exit", "0"]), controls=controls, **more)

    def play(self, scenario: Scenario | None = None, **more: Any) -> Run:
        """Submit, hear the bell, and see what became of it."""
        run = self.submit(scenario, **more)
        assert run_waiting(self.line)
        return self.store.get_run(run.id, None)

    def told(self, run: Run) -> list[str]:
        return types_told(self.store, run.id)


def steps(*steps: list[str] | dict[str, Any], **more: Any) -> Scenario:
    """Each step is a program of the fake, or a step's whole document."""
    documents = [step if isinstance(step, dict) else {"run": step} for step in steps]
    named = [{"name": f"step {n}"} | document for n, document in enumerate(documents, start=1)]
    return make_scenario(steps=named, **more)
