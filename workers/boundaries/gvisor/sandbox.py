"""The inside of an open gVisor boundary: upload, play steps, observe, collect."""

import os
import time
from collections.abc import Sequence
from datetime import UTC, datetime

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
    Listener,
    StepSpec,
    Usage,
)
from service.core.errors import BoundaryError, BoundaryLost, BundleRejected, ProvisionFailed
from service.intake.archive import ArchiveCaps, unpack
from workers.boundaries.gvisor.cgroups import Group
from workers.boundaries.gvisor.collect import collect_tree
from workers.boundaries.gvisor.control import GUEST_UID
from workers.boundaries.gvisor.evidence import SandboxFacts, observe_sandbox
from workers.boundaries.gvisor.render import FILES_OVERHEAD
from workers.boundaries.gvisor.steps import Guest, play
from workers.boundaries.gvisor.supervision import Supervised

_END_S = 10.0
_WALL_GRACE_S = 10.0
"""Steps marked `always` still run after the wall time is over, for so long in all."""


class GvisorSandbox:
    """Valid within its `with` block. Not for use by two threads."""

    def __init__(
        self,
        spec: BoundarySpec,
        *,
        supervised: Supervised,
        group: Group,
        runsc_root_fd: int,
        fs_fd: int,
        work_fd: int,
        memory_event: int | None,
        cancelled: Cancellation,
    ) -> None:
        self._spec, self._group = spec, group
        self._work_fd, self._fs_fd = work_fd, fs_fd
        self._supervised = supervised
        self._facts: SandboxFacts | None = None
        self._facts_at: datetime | None = None
        self._first_step_at: float | None = None
        self._last_step_at: float | None = None
        self._uploaded = self._collected = False
        self._guest = Guest(
            supervised=supervised,
            group=group,
            runsc_root_fd=runsc_root_fd,
            fs_fd=fs_fd,
            memory_event=memory_event,
            pids_limit=spec.limits.pids,
            memory_limit=spec.limits.memory,
            output_limit=spec.limits.output,
            cancelled=cancelled,
            wall_ends_at=float("inf"),
            on_started=self._look,
        )

    def upload(self, bundle: Bundle) -> None:
        """Raises ProvisionFailed when it does not fit or is not what was judged."""
        if self._uploaded or self._first_step_at is not None or self._collected:
            raise BoundaryError("the bundle comes once, before the first step")
        self._uploaded = True
        if bundle.path is None:
            return
        try:
            unpack(bundle.path, self._work_fd, ArchiveCaps(), owner=(GUEST_UID, GUEST_UID))
        except (OSError, BundleRejected) as error:
            raise ProvisionFailed(f"the bundle cannot be unpacked: {error}") from error

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
        """The sandbox process as it was when a step ran, and the limits as they stand now. Raises BoundaryLost when
        there was nothing to look at."""
        if self._facts is None and self._guest.alive and not self._collected:
            self._look()
        facts = self._facts
        if facts is None:
            raise BoundaryLost("the sandbox ended before it could be observed")
        if self._guest.uid is None and self._guest.alive and not self._collected:
            self._guest.observe_uid()
        space = os.fstatvfs(self._fs_fd)
        try:
            limits = self._group.limits()
        except FileNotFoundError as error:
            raise BoundaryLost("another process has destroyed the boundary") from error
        return Evidence(
            runtime="runsc",
            runtime_version=facts.binary.version,
            runtime_sha256=facts.binary.sha256,
            platform=facts.platform,
            network=facts.network,
            limits=limits | {"disk_bytes": space.f_blocks * space.f_frsize, "files": space.f_files - FILES_OVERHEAD},
            uid=self._guest.uid,
            observed_at=datetime.now(UTC),
        )

    def collect(self, patterns: Sequence[str], *, limits: ArtifactLimits, sink: ArtifactSink) -> Artifacts:
        """Raises BoundaryError the second time, BoundaryLost when a process of the guest's resists."""
        if self._collected:
            raise BoundaryError("collect is called once")
        self._collected = True
        self._guest.alive = False
        gone = self._supervised.end(timeout_s=_END_S)
        left = self._group.kill(timeout_s=_END_S) if self._group.pids() else set(gone.left)
        if left:
            raise BoundaryLost(f"processes of the sandbox do not end: {sorted(left)}")
        usage = self._usage()
        found = collect_tree(self._work_fd, patterns, limits=limits, sink=sink)
        return Artifacts(kept=tuple(found.kept), skipped=tuple(found.skipped), expected=found.expected, usage=usage)

    def _usage(self) -> Usage:
        wall_s = 0.0
        if self._first_step_at is not None and self._last_step_at is not None:
            wall_s = self._last_step_at - self._first_step_at
        try:
            peak_bytes = self._group.peak_memory_bytes()
        except FileNotFoundError:
            peak_bytes = 0
        return Usage(wall_s=wall_s, cpu_s=self._guest.cpu_s(), peak_memory_bytes=peak_bytes)

    def _look(self) -> None:
        if self._facts is None:
            self._facts = observe_sandbox(self._group.pids())
