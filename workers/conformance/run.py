"""Plays the cases over any `Boundary`. Every play has a boundary and a deadline of its own, and is always destroyed.

blocked: the promise was kept, and the control shows that the check would have seen it broken. vacuous: nothing is
shown. FAILED: the promise was broken.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO

from service.core.boundary import (
    ArtifactLimits,
    Boundary,
    BoundaryRef,
    BoundarySpec,
    Ended,
    Sandbox,
    StepSpec,
)
from service.core.controls import Limits, Network
from service.core.errors import BlastdoorError, NotYetDestroyed, TooLarge
from service.core.ids import new_run_id
from workers.conformance import host
from workers.conformance.cases import ENVIRONMENT, Case, Play, Seen
from workers.conformance.stage import Stage

_PLAY_S = 30.0
"""The longest that one play may take, the teardown apart; the boundary itself ends what lives on for twice as long."""
_NEIGHBOUR_S = 900.0
_DESTROY_S = 10.0
_GONE_S = 5.0
_POLL_S = 0.1
_ARTIFACTS = ArtifactLimits(total_bytes=64 * 2**20, count=1000)
_KEPT_BYTES = 1 << 20
_TENANT = "_conformance"
_MARKED = ("", "etc", "usr", "usr/bin", "usr/local", "var", "var/tmp", "home", "root", "run", "lib", "dev", "tmp")
"""Where on this host the mark of a guest would stand if it had got through."""


class Outcome(StrEnum):
    BLOCKED = "blocked"
    VACUOUS = "vacuous"
    FAILED = "FAILED"


@dataclass(frozen=True, kw_only=True)
class Result:
    """Of one case in one boundary (`gvisor`, `namespace/runc`). `why` is empty when it was blocked."""

    case: Case
    boundary: str
    outcome: Outcome
    why: str = ""
    seconds: float = 0.0


class _Deadline:
    """A Cancellation that comes when the time is over."""

    def __init__(self, seconds: float) -> None:
        self._at = time.monotonic() + seconds

    def is_set(self) -> bool:
        return time.monotonic() >= self._at


class _Digests:
    """An ArtifactSink that keeps the beginning of what comes, to be searched for tokens."""

    def __init__(self) -> None:
        self.texts: list[bytes] = []

    def put(self, source: BinaryIO, *, max_bytes: int) -> tuple[str, int]:
        digest, size, kept = hashlib.sha256(), 0, b""
        while chunk := source.read(1 << 16):
            size += len(chunk)
            if size > max_bytes:
                raise TooLarge(f"more than {max_bytes} bytes")
            digest.update(chunk)
            kept += chunk if len(kept) < _KEPT_BYTES else b""
        self.texts.append(kept)
        return digest.hexdigest(), size


class Arena:
    """One boundary under attack. A context: the neighbour that some cases need lives from the first of them on."""

    def __init__(
        self, boundary: Boundary, stage: Stage, *, name: str, installation: str, site: str,
        nearby: Sequence[tuple[str, int]] = (),
    ) -> None:  # fmt: skip
        """`name`: of the boundary, with its variant; `nearby`: who answers close to it, beside this host."""
        self._boundary, self._stage, self._name = boundary, replace(stage, nearby=tuple(nearby)), name
        self._installation, self._site = installation, site
        self._neighbour: Sandbox | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "Arena":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def judge(self, case: Case) -> Result:
        """Plays the attack and, if it was held, the control. Never raises for what a boundary does."""
        started = time.monotonic()
        try:
            outcome, why = self._judge(case)
        except NotYetDestroyed as error:
            outcome, why = Outcome.FAILED, f"it could not be destroyed: {error}"
        except (BlastdoorError, OSError) as error:
            outcome, why = Outcome.VACUOUS, f"it could not be played: {error}"
        seconds = time.monotonic() - started
        return Result(case=case, boundary=self._name, outcome=outcome, why=why, seconds=seconds)

    def _judge(self, case: Case) -> tuple[Outcome, str]:
        attacked = self.play(case.attack(self._stage))
        if not attacked.begun:
            said = attacked.execution.message or f"it ended as {attacked.execution.ended}"
            return Outcome.VACUOUS, f"the attack did not begin: {said}"
        if attacked.execution.ended in (Ended.LOST, Ended.CANCELLED):
            return Outcome.FAILED, f"the sandbox did not survive, unexplained: {attacked.execution.message or 'hung'}"
        if wrong := case.wrong(attacked):
            return Outcome.FAILED, wrong
        if case.ends and not attacked.to_its_end:
            return Outcome.VACUOUS, f"the attack broke off: {_last_words(attacked)}"
        opened = self.play(case.control(self._stage))
        if not opened.begun:
            return Outcome.VACUOUS, "the control did not begin"
        if not case.wrong(opened):
            return Outcome.VACUOUS, f"the control did not fire: {_last_words(opened)}"
        return Outcome.BLOCKED, ""

    def play(self, play: Play) -> Seen:
        """Raises BlastdoorError when there is no boundary to play in, NotYetDestroyed when one stays."""
        if play.neighbour:
            self._have_neighbour()
        ref = self._ref(seconds=2 * _PLAY_S)
        spec = BoundarySpec(limits=play.wanted, network=Network())
        self._stage.ears.take()
        try:
            with self._boundary.open(spec, ref, cancelled=_Deadline(_PLAY_S)) as sandbox:
                seen = self._in_sandbox(sandbox, play, ref)
        finally:
            self._destroy(ref)
        if not play.standing:
            seen = replace(seen, left=self._left(ref, within_s=_GONE_S))
        lives = self._neighbour_lives() if play.neighbour else True
        return replace(seen, neighbour_lives=lives, heard=self._stage.ears.take())

    def _in_sandbox(self, sandbox: Sandbox, play: Play, ref: BoundaryRef) -> Seen:
        here, bounded = bool(host.groups(ref.name)), play.limits.get("pids") is not None
        with host.watching_tasks(ref.name) if bounded else nullcontext(host.Peak()) as peak:
            execution = sandbox.execute(_step(1, play.argv, play))
        then = sandbox.execute(_step(2, play.then, play)) if play.then and execution.sandbox_alive else None
        grown = self._grown()
        left = self._left(ref, within_s=0) if play.standing else ()
        sink, started = _Digests(), time.monotonic()
        artifacts = sandbox.collect(play.patterns, limits=_ARTIFACTS, sink=sink)
        collect_s = time.monotonic() - started
        printed = [step.stdout.data + step.stderr.data for step in (execution, then) if step is not None]
        return Seen(
            play=play,
            execution=execution,
            then=then,
            artifacts=artifacts,
            leaks=self._stage.leaks(*printed, *sink.texts),
            left=left,
            grown=grown,
            here=here,
            peak_tasks=peak.tasks,
            collect_s=collect_s,
        )

    def _grown(self) -> tuple[str, ...]:
        """What has the stage's mark on this host; files are taken away again."""
        found = host.mounts(self._stage.mark)
        for place in _MARKED:
            path = Path("/", place, self._stage.mark)
            if path.exists():
                found.append(f"file {path}")
                path.unlink()
        return tuple(found)

    def _left(self, ref: BoundaryRef, *, within_s: float) -> tuple[str, ...]:
        deadline = time.monotonic() + within_s
        while True:
            found = host.processes(ref.name)
            found += [f"boundary {other.name}" for other in self._boundary.discover() if other.name == ref.name]
            if not found or time.monotonic() >= deadline:
                return tuple(found)
            time.sleep(_POLL_S)

    def _have_neighbour(self) -> None:
        """Another run, with a token in the memory of a process, in its environment and in a file."""
        if self._neighbour is not None:
            return
        ref = self._ref(seconds=_NEIGHBOUR_S)
        limits = Limits(wall=timedelta(seconds=_NEIGHBOUR_S))
        spec = BoundarySpec(limits=limits, network=Network())
        self._stack.callback(self._destroy, ref)
        neighbour = self._stack.enter_context(self._boundary.open(spec, ref, cancelled=_Deadline(_NEIGHBOUR_S)))
        token = self._stage.tokens["another run"]
        planted = neighbour.execute(
            _shell('printf %s "$TOKEN" > canary; sleep 900 >/dev/null 2>&1 & echo $! > pid', {"TOKEN": token})
        )
        if planted.exit_code != 0:
            raise BlastdoorError("the run beside it could not be made ready")
        self._neighbour = neighbour

    def _neighbour_lives(self) -> bool:
        """With its process and its file as they were. One that does not is not asked again."""
        assert self._neighbour is not None
        found = self._neighbour.execute(_shell('kill -0 "$(cat pid)" && cat canary', {}))
        return found.exit_code == 0 and found.stdout.data == self._stage.tokens["another run"].encode()

    def _ref(self, *, seconds: float) -> BoundaryRef:
        return BoundaryRef(
            installation=self._installation,
            kind=self._boundary.kind,
            variant=self._name.partition("/")[2],
            site=self._site,
            tenant=_TENANT,
            run_id=new_run_id(),
            fence=0,
            expires_at=datetime.now(UTC) + timedelta(seconds=seconds),
        )

    def _destroy(self, ref: BoundaryRef) -> None:
        """Raises NotYetDestroyed when it still resists after ten seconds."""
        deadline = time.monotonic() + _DESTROY_S
        while time.monotonic() < deadline:
            with suppress(NotYetDestroyed):
                self._boundary.destroy(ref)
                return
            time.sleep(_POLL_S)
        self._boundary.destroy(ref)


def judge_all(arena: Arena, cases: Iterable[Case], *, progress: Callable[[Result], None]) -> Iterator[Result]:
    """`progress` is told each result as it comes."""
    with arena:
        for case in cases:
            result = arena.judge(case)
            progress(result)
            yield result


def _step(n: int, argv: tuple[str, ...], play: Play) -> StepSpec:
    return StepSpec(n=n, argv=argv, env=ENVIRONMENT | dict(play.env), timeout_s=play.timeout_s)


def _shell(command: str, env: dict[str, str]) -> StepSpec:
    return StepSpec(n=1, argv=("/bin/sh", "-c", command), env=ENVIRONMENT | env, timeout_s=10)


def _last_words(seen: Seen) -> str:
    execution = seen.then or seen.execution
    said = execution.stderr.data.decode("utf-8", "replace").strip().splitlines()
    return said[-1][:200] if said else f"it ended as {execution.ended}, exit code {execution.exit_code}"
