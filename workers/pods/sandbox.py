"""The inside of a pod that was opened: upload, play steps, observe, collect."""

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import IO

from service.core.boundary import (
    ArtifactLimits,
    Artifacts,
    ArtifactSink,
    BoundarySpec,
    Bundle,
    Cancellation,
    Ended,
    Evidence,
    Execution,
    FileContent,
    Listener,
    StepSpec,
    Usage,
)
from service.core.errors import BoundaryError, BoundaryLost, BundleRejected, ProvisionFailed
from service.intake.archive import ArchiveCaps, lay_out
from workers.kube import ClusterError, Manifest
from workers.pods.collect import collect
from workers.pods.evidence import Shut, network, observe
from workers.pods.pod import Pod, shown
from workers.pods.protocol import incoming_directory, incoming_end, incoming_file
from workers.pods.steps import Guest, play

_WALL_GRACE_S = 10.0
"""Steps marked `always` still run after the wall time is over, for so long in all."""
_UPLOAD_S = 120.0
_CHUNK = 256 * 1024


class PodSandbox:
    """Valid within its `with` block. Not for use by two threads."""

    def __init__(
        self, spec: BoundarySpec, *, pod: Pod, shut: Shut, cancelled: Cancellation,
        told: Callable[[Sequence[Manifest]], str] = network,
    ) -> None:  # fmt: skip
        """`told`: of `workers.pods.evidence.observe`."""
        self._spec, self._pod, self._shut, self._told = spec, pod, shut, told
        self._cancelled = cancelled
        self._evidence: Evidence | None = None
        self._first_step_at: float | None = None
        self._last_step_at: float | None = None
        self._uploaded = self._collected = False
        self._guest = Guest(pod, spec.limits, cancelled, wall_ends_at=float("inf"))

    def upload(self, bundle: Bundle) -> None:
        """Judged as a whole on this side first. Raises ProvisionFailed when it does not fit, or is not what it was."""
        if self._uploaded or self._first_step_at is not None or self._collected:
            raise BoundaryError("the bundle comes once, before the first step")
        self._uploaded = True
        if bundle.path is None:
            return
        with tempfile.TemporaryFile() as spool:
            try:
                lay_out(bundle.path, _Records(spool), ArchiveCaps())
                spool.write(incoming_end())
                spool.seek(0)
                ended = self._pod.command(
                    "upload", stdin=_pieces(spool), on_output=lambda *_: None, stop=self._cancelled.is_set,
                    deadline=time.monotonic() + _UPLOAD_S,
                )  # fmt: skip
            except (OSError, BundleRejected, ClusterError) as error:
                raise ProvisionFailed(f"the bundle cannot be unpacked: {error}") from error
        if ended.why != "exited" or ended.exit_code != 0:
            raise ProvisionFailed(f"the bundle cannot be unpacked in the pod: {shown(ended)}")

    def execute(self, step: StepSpec, *, listener: Listener | None = None) -> Execution:
        """Raises BoundaryError after `collect`."""
        if self._collected:
            raise BoundaryError("nothing runs after collect")
        if not self._guest.alive:
            return Execution(
                ended=Ended.LOST, message="the sandbox has ended", duration_s=0.0, cpu_s=0.0, sandbox_alive=False
            )
        if self._first_step_at is None:
            self._first_step_at = time.monotonic()
            wall_s = self._spec.limits.wall.total_seconds()
            self._guest.wall_ends_at = self._first_step_at + wall_s + _WALL_GRACE_S
        try:
            return play(self._guest, step, listener=listener)
        finally:
            self._last_step_at = time.monotonic()

    def evidence(self) -> Evidence:
        """As the API server has it now, while the pod is there. Raises BoundaryLost when it is not and never was
        observed."""
        if self._evidence is None:
            try:
                self._evidence = observe(self._pod, self._shut, at=datetime.now(UTC), told=self._told)
            except ClusterError as error:
                raise BoundaryLost(f"the pod could not be observed: {error}") from error
        return self._evidence

    def collect(self, patterns: Sequence[str], *, limits: ArtifactLimits, sink: ArtifactSink) -> Artifacts:
        """Raises BoundaryError the second time, BoundaryLost when a process of the guest's resists or its pod has gone
        with what it left; after a limit ended the run, there is nothing to be had and nothing is missed."""
        if self._collected:
            raise BoundaryError("collect is called once")
        self._collected = True
        usage = self._usage()
        if not self._guest.alive and self._pod.is_over():
            return _nothing_left(limits, usage)
        self._guest.alive = False
        try:
            found, _ = collect(self._pod, patterns, limits=limits, sink=sink, usage=usage)
        except BoundaryLost as error:
            raise self._pod.blamed(error) from error
        return found

    def about(self) -> bytes:
        """What the kernel in the pod says of itself, read by our own program before any guest's. Raises
        BoundaryLost."""
        return self._pod.says("about", most_bytes=64 * 1024)

    def end(self) -> None:
        """Leave nothing running. Raises BoundaryLost."""
        if not self._collected and not self._pod.is_over():
            self._guest.end()

    def _usage(self) -> Usage:
        wall_s = 0.0
        if self._first_step_at is not None and self._last_step_at is not None:
            wall_s = self._last_step_at - self._first_step_at
        return Usage(wall_s=wall_s, cpu_s=self._guest.cpu_s, peak_memory_bytes=self._guest.peak_bytes)


def _nothing_left(limits: ArtifactLimits, usage: Usage) -> Artifacts:
    """The pod's memory was all it had."""
    return Artifacts(expected={path: FileContent(absent_why="absent") for path in limits.expected}, usage=usage)


class _Records:
    """Has the members of an archive written as `init upload` reads them: each with its size before it."""

    def __init__(self, spool: IO[bytes]) -> None:
        self._spool = spool
        self._made: set[str] = {""}

    def make_directory(self, path: str) -> None:
        if path in self._made:
            return
        self.make_directory(path.rpartition("/")[0])
        self._made.add(path)
        self._spool.write(incoming_directory(path))

    def make_file(self, path: str, pieces: Iterable[bytes | memoryview], *, executable: bool) -> int:
        self.make_directory(path.rpartition("/")[0])
        head_at = self._spool.tell()
        self._spool.write(incoming_file(path, size=0, executable=executable))
        size = sum(self._spool.write(piece) for piece in pieces)
        end_at = self._spool.tell()
        self._spool.seek(head_at)
        self._spool.write(incoming_file(path, size=size, executable=executable))
        self._spool.seek(end_at)
        return size


def _pieces(spool: IO[bytes]) -> Iterator[bytes]:
    while piece := spool.read(_CHUNK):
        yield piece
