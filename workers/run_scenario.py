"""THE line: claim, record, open, play, collect, finish. Read it top to bottom; everything else serves it.

A worker may act on a run only while it holds the lease. A lost lease shows up in two ways, as LeaseLost from a write
and as a set `Watch`; both end in the same place: the `with` block of the boundary kills what it holds, and nothing
more is written.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import BinaryIO, TypeVar

import structlog

from service.core.boundary import (
    ArtifactLimits,
    Artifacts,
    Boundary,
    BoundaryKind,
    BoundaryRef,
    BoundarySpec,
    Ended,
    Execution,
    Sandbox,
    StepSpec,
)
from service.core.errors import (
    BoundaryLost,
    LeaseLost,
    NotYetDestroyed,
    ProvisionFailed,
    QuotaExceeded,
    SandboxBroken,
    StorageFull,
    TooLarge,
    Unavailable,
)
from service.core.failpoints import Failpoint, reach
from service.core.lease import cancelled as cancelled_verdict
from service.core.news import News
from service.core.ports.blobs import Blobs
from service.core.ports.publishing import Doorbell, Hints
from service.core.ports.runs import Claim, RunLine
from service.core.run import Outcome, Reason, Result, Run, Verdict, output_name
from service.core.scenario import Step
from service.core.verdict import JudgedStep, judge_files, judge_run, judge_step, skipped
from workers.live import Live
from workers.registry import Slow, Telling
from workers.watch import Watch, WatchTimes, monotonic

ALWAYS_GRACE_S = 10.0
"""Steps marked `always` still run after the run's time is over, for at most so long in all."""
_TEARDOWN_S = 60.0

log = structlog.get_logger()
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Line:
    """What a worker process has for playing runs: made once by the composition root."""

    runs: RunLine
    blobs: Blobs
    hints: Hints
    doorbell: Doorbell
    boundaries: Mapping[BoundaryKind, Boundary]
    offered: Sequence[str]
    """What this host's probe found available, as `placement.queues` has it, e.g. `gvisor`."""
    runtimes: Sequence[str]
    installation: str
    site: str
    worker_id: str
    times: WatchTimes


@dataclass
class _Storage:
    """What the run leaves goes to its tenant's blobs, as far as the quota goes: what does not fit is left out and said,
    since a full store is not the fault of the code that ran. Two runs of a tenant that end at once may both have the
    last room: the next bundle is refused then.

    A step's output is stored as soon as the step is over. A hundred steps' streams would be 200 MiB of our memory.
    """

    blobs: Blobs
    tenant: str
    left_bytes: int = 0
    used_bytes: int = 0
    outputs: dict[str, str] = field(default_factory=dict)
    output_bytes: dict[str, int] = field(default_factory=dict)

    def look(self, line: "Line", watch: Watch) -> None:
        """Ask how much there is room for; what this run has put is recorded only when it finishes."""
        self.left_bytes = _insist(watch, lambda: line.runs.storage_left(self.tenant)) - self.used_bytes

    def put(self, source: BinaryIO, *, max_bytes: int) -> tuple[str, int]:
        room = min(max_bytes, max(self.left_bytes, 0))
        try:
            digest, size = self.blobs.put_stream(self.tenant, source, max_bytes=room)
        except TooLarge as error:
            if room < max_bytes:
                raise QuotaExceeded(f"tenant {self.tenant} may keep {room} bytes more") from error
            raise
        self._count(size)
        return digest.removeprefix("sha256:"), size

    def put_output(self, n: int, execution: Execution) -> None:
        for stream, capture in (("stdout", execution.stdout), ("stderr", execution.stderr)):
            data = capture.data
            if not data or len(data) > self.left_bytes:
                continue
            try:
                digest = self.blobs.put_bytes(self.tenant, data)
            except StorageFull as error:
                log.warning("a step's output was not kept", step=n, stream=stream, error=str(error))
                continue
            self.outputs[output_name(n, stream)], self.output_bytes[output_name(n, stream)] = digest, len(data)
            self._count(len(data))

    def _count(self, size: int) -> None:
        self.left_bytes -= size
        self.used_bytes += size


@dataclass
class _Played:
    """What the steps came to; filled as the run goes on, so that an interruption keeps what was seen."""

    steps: list[JudgedStep] = field(default_factory=list)
    lost: str | None = None


def run_waiting(line: Line) -> bool:
    """Claim the fairest waiting run that this worker can build, and see it through. -> False when nothing waited.

    When another run could be claimed afterwards, the doorbell is rung for it: a ring that found its tenant at its cap
    was used up, so whoever frees the place passes the ring on.
    """
    asked = monotonic()
    claim = line.runs.claim(
        worker_id=line.worker_id,
        site=line.site,
        boundaries=line.offered,
        runtimes=line.runtimes,
        lease=line.times.lease,
    )
    if claim is None:
        return False
    reach(Failpoint.CLAIM_AFTER)
    run, fence = claim.run, claim.fence
    line.hints.hint("outbox", run.id)
    logger = log.bind(run_id=run.id, fence=fence, boundary=run.placement.boundary)
    ref = _ref(line, claim)
    boundary = line.boundaries[ref.kind]
    output = run.controls.limits.output
    with (
        structlog.contextvars.bound_contextvars(run_id=run.id, trace_id=claim.trace_id),
        Watch(line.runs, run_id=run.id, fence=fence, times=line.times, since=asked) as watch,
        Live(line.runs, line.hints, run_id=run.id, fence=fence, head_bytes=output - output // 2) as live,
    ):
        try:
            _play_through(line, claim, boundary, ref, watch, live)
        except LeaseLost as error:
            logger.warning("lease lost; the boundary was killed and nothing was written", error=str(error))
        finally:
            _tear_down(line, boundary, ref, logger)
    _pass_on(line, run.placement.queue, logger)
    return True


def _play_through(line: Line, claim: Claim, boundary: Boundary, ref: BoundaryRef, watch: Watch, live: Live) -> None:
    run, fence = claim.run, claim.fence
    logger = log.bind(run_id=run.id, fence=fence)
    played = _Played()
    storage = _Storage(line.blobs, run.tenant)
    spec = BoundarySpec(
        limits=run.controls.limits,
        network=run.controls.network,
        needs=tuple(run.controls.needs),
        runtime=claim.scenario.runtime,
        lifetime=line.times.lease + _lifetime(line, run),
        node_group=run.placement.node_group,
        share=claim.share,
    )
    try:
        live.progress("boundary", "started", text=run.placement.boundary)
        if isinstance(boundary, Telling):
            boundary = boundary.telling(lambda text: live.progress("boundary", "started", text=text))
        with boundary.open(spec, ref, cancelled=watch) as sandbox:
            if claim.bundle is not None:
                bundle_path = line.blobs.path(run.tenant, claim.bundle.digest)
                sandbox.upload(claim.bundle.model_copy(update={"path": bundle_path}))
            reach(Failpoint.UPLOAD_AFTER)
            live.progress("boundary", "done", text=run.placement.boundary)
            _move(watch, live, lambda news: line.runs.mark_running(run.id, fence, news=news))
            reach(Failpoint.RUNNING_AFTER)
            line.hints.hint("outbox", run.id)
            storage.look(line, watch)
            live.keep_within(storage.left_bytes)
            _play(claim, sandbox, watch, played, storage, live)
            watch.raise_if_lost()
            _move(watch, live, lambda news: line.runs.mark_collecting(run.id, fence, news=news))
            live.progress("collect", "started")
            reach(Failpoint.COLLECT_BEFORE)
            storage.look(line, watch)
            result = _collected(claim, sandbox, watch, played, storage)
            live.progress("collect", "done")
            reach(Failpoint.COLLECT_AFTER)
        reach(Failpoint.FINISH_BEFORE)
        _move(watch, live, lambda news: line.runs.finish(run.id, fence, result, news=news))
        reach(Failpoint.FINISH_AFTER)
    except ProvisionFailed as failed:
        watch.raise_if_lost()
        why = str(failed)
        live.progress("boundary", "failed", text=why)
        if watch.cancelled_by is not None:
            cancelled = Result(verdict=cancelled_verdict(watch.cancelled_by))
            _move(watch, live, lambda news: line.runs.finish(run.id, fence, cancelled, news=news))
        else:
            logger.warning("provisioning failed", error=why)
            _move(watch, live, lambda news: line.runs.requeue(run.id, fence, why=why, news=news))
    except LeaseLost:
        raise
    except Exception as error:
        # Ours to answer for: the owner learns `internal`, the operator reads the traceback.
        logger.exception("the worker failed on this run")
        errored = Result(
            verdict=_errored(error), steps=tuple(s.result for s in played.steps), outputs=storage.outputs,
            output_bytes=storage.output_bytes,
        )  # fmt: skip
        _move(watch, live, lambda news: line.runs.finish(run.id, fence, errored, news=news))
    finally:
        line.hints.hint("run", run.id)
        line.hints.hint("outbox", run.id)


def _insist(watch: Watch, ask: Callable[[], T]) -> T:
    """A database that is away for a moment is no reason to throw a run away: again, for as long as the lease is ours.
    Raises LeaseLost, also when the answer to a write that was made got lost."""
    while True:
        try:
            return ask()
        except Unavailable as error:
            log.warning("cannot write now; again in a moment", error=str(error))
            watch.raise_if_lost()
            watch.pause()


def _move(watch: Watch, live: Live, write: Callable[[tuple[News, ...]], T]) -> T:
    """End the phase, and with it what is still to be told of it."""
    with live.ending_phase() as news:
        return _insist(watch, lambda: write(news))


def _errored(error: Exception) -> Verdict:
    if isinstance(error, SandboxBroken):
        return Verdict(outcome=Outcome.FAILED, reason=Reason.EXIT_CODE, message=str(error))
    if isinstance(error, BoundaryLost):
        return Verdict(outcome=Outcome.ERRORED, reason=Reason.BOUNDARY_LOST, message=str(error))
    return Verdict(outcome=Outcome.ERRORED, reason=Reason.INTERNAL, message="an error inside the platform")


def _play(claim: Claim, sandbox: Sandbox, watch: Watch, played: _Played, storage: _Storage, live: Live) -> None:
    """One step after another. Wall time counts from here; what of it is left bounds each step."""
    scenario, wall_s = claim.scenario, claim.run.controls.limits.wall.total_seconds()
    started = time.monotonic()
    stopped = dead = False
    for n, step in enumerate(scenario.steps, start=1):
        if dead or watch.is_set() or (stopped and not step.always):
            played.steps.append(skipped(n, step))
            live.progress("step", "skipped", step=n, steps=len(scenario.steps), name=step.name)
            continue
        left_s = wall_s - (time.monotonic() - started)
        timeout_s, wall_is_next = allowed(step, left_s=left_s, stopped=stopped)
        spec = StepSpec(
            n=n, argv=step.argv, env=scenario.environment(step), stdin=step.stdin.encode(), timeout_s=timeout_s
        )
        live.progress("step", "started", step=n, steps=len(scenario.steps), name=step.name)
        with live.step(n) as listener:
            execution = sandbox.execute(spec, listener=listener)
        reach(Failpoint.STEP_AFTER)
        if wall_is_next and execution.ended is Ended.STEP_TIMEOUT:
            execution = execution.model_copy(update={"ended": Ended.WALL_TIMEOUT})
        storage.put_output(n, execution)
        judged = judge_step(n, step, execution)
        played.steps.append(judged)
        live.progress(
            "step", judged.result.outcome.value, step=n, steps=len(scenario.steps), name=step.name, text=judged.message
        )
        stopped = stopped or judged.stops
        dead = not execution.sandbox_alive
        if execution.ended is Ended.LOST and not watch.is_set():
            played.lost = execution.message or "the sandbox ended during the step, and nothing the host saw explains it"


def allowed(step: Step, *, left_s: float, stopped: bool) -> tuple[float, bool]:
    """-> (seconds the step may take, whether it is the run's time that ends first). `left_s` is below zero when the
    run's time is over: then, after a failure, `always` steps share `ALWAYS_GRACE_S`."""
    if stopped:
        left_s = min(max(left_s, ALWAYS_GRACE_S), left_s + ALWAYS_GRACE_S)
    own_s = step.timeout.total_seconds() if step.timeout is not None else left_s
    return max(min(own_s, left_s), 0.001), own_s >= left_s


def _collected(claim: Claim, sandbox: Sandbox, watch: Watch, played: _Played, storage: _Storage) -> Result:
    """End the guest, read what it left, and judge. A cancelled run has no artifacts, however late that was said."""
    try:
        evidence = sandbox.evidence().model_dump(mode="json")
    except BoundaryLost:
        evidence = None  # it ended before anything could be looked at
    expected = tuple(path for step in claim.scenario.steps for path in step.expect.files)
    limits = ArtifactLimits(total_bytes=claim.run.controls.limits.artifacts, expected=expected)
    patterns = () if watch.cancelled_by else claim.scenario.artifacts
    found: Artifacts = sandbox.collect(patterns, limits=limits, sink=storage)
    steps = [
        judge_files(judged, step, found.expected)
        for judged, step in zip(played.steps, claim.scenario.steps, strict=True)
    ]
    watch.raise_if_lost()
    cancelled_by = watch.cancelled_by
    return Result(
        verdict=judge_run(steps, cancelled_by=cancelled_by, lost=played.lost),
        steps=tuple(step.result for step in steps),
        usage=found.usage,
        artifacts=() if cancelled_by else found.kept,
        skipped_artifacts=() if cancelled_by else found.skipped,
        evidence=evidence,
        outputs=storage.outputs,
        output_bytes=storage.output_bytes,
    )


def _tear_down(line: Line, boundary: Boundary, ref: BoundaryRef, logger: structlog.stdlib.BoundLogger) -> None:
    """Reap our own run at once. What resists is the reaper's; it is not recorded as gone before it is."""
    reach(Failpoint.DESTROY_BEFORE)
    try:
        boundary.destroy(ref)
    except NotYetDestroyed as error:
        logger.warning("not yet destroyed; left to the reaper", error=str(error))
        return
    reach(Failpoint.DESTROY_AFTER)
    try:
        recorded = line.runs.record_destroyed(ref.run_id, ref.fence)
    except Unavailable as error:
        logger.warning("destroyed, and not recorded; left to the reaper", error=str(error))
        return
    if recorded:
        line.hints.hint("outbox", ref.run_id)


def _pass_on(line: Line, queue: str, logger: structlog.stdlib.BoundLogger) -> None:
    """The bell, to whoever can take the next run."""
    try:
        if line.runs.waiting(line.offered):
            line.doorbell.ring(queue)
    except Unavailable as error:
        logger.warning("the bell was not passed on; the reconciler rings again", error=str(error))


def _ref(line: Line, claim: Claim) -> BoundaryRef:
    run = claim.run
    return BoundaryRef(
        installation=line.installation,
        kind=run.placement.kind,
        variant=run.placement.variant,
        site=line.site,
        tenant=run.tenant,
        run_id=run.id,
        fence=claim.fence,
        expires_at=claim.lease_until + _lifetime(line, run),
        created_at=claim.lease_until - line.times.lease,
    )


def _lifetime(line: Line, run: Run) -> timedelta:
    """Of a boundary, beyond the lease that it was claimed with: never less than making it and playing in it may take,
    or it would be reaped under its run."""
    boundary = line.boundaries[run.placement.kind]
    making_s = boundary.making_s(run.placement.variant) if isinstance(boundary, Slow) else 0.0
    return run.controls.limits.wall + timedelta(seconds=2 * _TEARDOWN_S + making_s)
