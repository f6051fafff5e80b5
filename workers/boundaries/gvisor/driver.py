"""The gVisor boundary: one runsc sandbox per run on this host, made step by step and undone by name.

Order of making: directory with label, cgroups, tmpfs, configuration, sandbox. Undoing goes by names alone and in the
other direction, from any process; it never needs runsc, since each run has a `--root` of its own that goes with it.
"""

import errno
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import structlog

from service.core.boundary import BoundaryKind, BoundaryRef, BoundarySpec, Cancellation, Capabilities, Host, Sandbox
from service.core.errors import NotYetDestroyed, ProvisionFailed
from service.core.failpoints import Failpoint, reach
from workers.boundaries.gvisor.cgroups import CgroupTree, Group
from workers.boundaries.gvisor.control import GUEST_UID
from workers.boundaries.gvisor.evidence import identify
from workers.boundaries.gvisor.mounts import mount_points, mount_tmpfs, unmount
from workers.boundaries.gvisor.places import Place, Places
from workers.boundaries.gvisor.render import FILES_OVERHEAD, group_limits, render_argv, render_config
from workers.boundaries.gvisor.sandbox import GvisorSandbox
from workers.boundaries.gvisor.supervision import Supervised, Supervisors
from workers.proc import ProcessFailed
from workers.runtimes.store import RuntimeStore, RuntimeUnknown

log = structlog.get_logger()

_READY_S = 30.0
_CLEAR_S = 5.0
_CLEAR_AGAIN_S = 0.25
_POLL_S = 0.05
_INIT = Path(__file__).with_name("init")
_RUNSC_ENV = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}


@dataclass(frozen=True, kw_only=True)
class GvisorHost:
    """What the driver is told about where it works. `cgroup_parent`: a delegated group below each hierarchy's root.

    `directfs`, gVisor's own default, lets the sentry open the files of the run's mounts by itself. Without it every one
    of its file operations goes through the gofer and it has no file system calls of the host at all: stricter, at about
    20 % more for a short run and files made 2.4 times slower (measured; docs/adr/0001).
    """

    installation: str
    site: str
    runtime_dir: Path
    runtimes: RuntimeStore
    runsc: Path = Path("/usr/bin/runsc")
    cgroup_parent: str = ""
    directfs: bool = True
    init: Path = _INIT


class GvisorBoundary:
    """Implements `service.core.boundary.Boundary`."""

    def __init__(self, host: GvisorHost) -> None:
        self._host = host
        self._places = Places(runtime_dir=host.runtime_dir, installation=host.installation, site=host.site)
        self._cgroups = CgroupTree.detect(parent=host.cgroup_parent)
        self._supervisors = Supervisors()
        self._resisted: set[str] = set()

    @classmethod
    def for_host(cls, host: Host) -> "GvisorBoundary":
        """As the registry makes it."""
        return cls(
            GvisorHost(
                installation=host.installation,
                site=host.site,
                runtime_dir=host.runtime_dir,
                runtimes=RuntimeStore(host.state_dir / "runtimes"),
                runsc=host.runsc,
            )
        )

    @property
    def kind(self) -> BoundaryKind:
        return BoundaryKind.GVISOR

    @property
    def host(self) -> GvisorHost:
        return self._host

    @property
    def cgroups(self) -> CgroupTree:
        return self._cgroups

    def group(self, ref: BoundaryRef) -> Group:
        """The control groups of a sandbox, whether it exists or not."""
        return self._cgroups.group(self._places.group_name(ref.name))

    def warm(self) -> None:
        """Have the supervising process started before the first run asks for it. Raises ProvisionFailed."""
        self._supervisors.warm()

    def close(self) -> None:
        """End the supervising process that waits for the next run."""
        self._supervisors.close()

    def probe(self) -> Sequence[Capabilities]:
        from workers.boundaries.gvisor.probe import probe  # it plays a run through this driver

        return (probe(self),)

    @contextmanager
    def open(self, spec: BoundarySpec, ref: BoundaryRef, *, cancelled: Cancellation) -> Iterator[Sandbox]:
        self._accept(spec, ref)
        place = self._places.place(ref.name)
        reach(Failpoint.OPEN_BEFORE_CREATE)
        if cancelled.is_set():  # above all: a lease that was slept through. What stood under it is known to be gone
            raise ProvisionFailed("not wanted any more, before anything was made")
        try:
            place.make(ref)
        except OSError as error:  # above all: the name is taken, and what has it is not ours to undo
            raise ProvisionFailed(f"the sandbox could not be made: {error}") from error
        with ExitStack() as stack:
            try:
                sandbox, supervised = self._make(spec, ref, place, cancelled, stack)
                reach(Failpoint.OPEN_CREATED)
            except BaseException as error:
                stack.close()
                with suppress(NotYetDestroyed):  # the reaper has the reference
                    self.destroy(ref)
                if isinstance(error, OSError):
                    raise ProvisionFailed(f"the sandbox could not be made: {error}") from error
                raise
            stack.callback(_end_sandbox, supervised, ref)
            yield sandbox

    def discover(self) -> Iterator[BoundaryRef]:
        """From directories, cgroups and mounts; each name once. The label is made first and so is looked for last: what
        has none then has really lost it."""
        names = {
            name.removeprefix(self._places.group_prefix) for name in self._cgroups.names(self._places.group_prefix)
        }
        names |= {point.parent.name for point in mount_points() if point.parent.parent == self._places.home}
        seen: set[str] = set()
        for ref in self._places.labels():
            if ref.name not in seen:
                seen.add(ref.name)
                yield ref
        for name in sorted(names - seen):
            if self._places.is_name(name):
                yield self._places.unlabelled(name)

    def destroy(self, ref: BoundaryRef) -> None:
        """Waits a few seconds in all for the kernel to let go; hardly at all for what has resisted before, since the
        reaper comes back to it."""
        deadline = time.monotonic() + (_CLEAR_AGAIN_S if ref.name in self._resisted else _CLEAR_S)
        try:
            self._destroy(ref, deadline=deadline)
        except NotYetDestroyed:
            self._resisted.add(ref.name)
            raise
        self._resisted.discard(ref.name)

    def _destroy(self, ref: BoundaryRef, *, deadline: float) -> None:
        place = self._places.place(ref.name)
        group = self.group(ref)
        _end(group, deadline=deadline)
        try:
            self._unmount(place, deadline=deadline)
            _insist(lambda: _end_and_remove(group, deadline=deadline), deadline=deadline)
            place.remove()
        except OSError as error:
            raise NotYetDestroyed(f"{ref.name}: {error}") from error
        if group.exists or place.exists:
            raise NotYetDestroyed(f"{ref.name}: something of it is back")

    def _accept(self, spec: BoundarySpec, ref: BoundaryRef) -> None:
        """Isolation never degrades: what this wall cannot do is not done by halves. Raises ProvisionFailed."""
        if ref.kind is not BoundaryKind.GVISOR or ref.variant or ref.installation != self._host.installation:
            raise ProvisionFailed(f"{ref.name} is not for this boundary")
        if spec.network.mode != "none":
            raise ProvisionFailed("this boundary has no network to allow")
        if self._cgroups.missing:
            raise ProvisionFailed("this host cannot enforce the limits: " + "; ".join(self._cgroups.missing))

    def _make(
        self, spec: BoundarySpec, ref: BoundaryRef, place: Place, cancelled: Cancellation, stack: ExitStack
    ) -> tuple[GvisorSandbox, Supervised]:
        supervised = self._supervisors.prepare()
        stack.callback(supervised.close)
        group = self.group(ref)
        group.create(group_limits(spec))
        memory_event = group.watch_memory()
        if memory_event is not None:
            stack.callback(os.close, memory_event)
        mount_tmpfs(place.fs, size_bytes=spec.limits.disk, inodes=spec.limits.files + FILES_OVERHEAD)
        fs_fd = self._open_directory(stack, place.fs)
        _make_guest_directories(fs_fd)
        work_fd = self._open_directory(stack, "work", dir_fd=fs_fd)
        try:
            root = self._host.runtimes.get(spec.runtime)
        except RuntimeUnknown as error:
            raise ProvisionFailed(error.detail) from error
        config = render_config(spec, root, init=self._host.init, work=place.fs / "work", tmp=place.fs / "tmp")
        (place.bundle / "config.json").write_text(json.dumps(config))
        runsc_root_fd = self._open_directory(stack, place.runsc)
        reach(Failpoint.OPEN_HALF_CREATED)
        supervised.launch(
            {
                "argv": render_argv(self._host.runsc, directfs=self._host.directfs),
                "env": _RUNSC_ENV,
                "cwd": str(place.directory),
                "groups": [str(path) for path in group.directories],
                "deadline_s": max((spec.lifetime or ref.expires_at - datetime.now(UTC)).total_seconds(), 1.0),
            }
        )
        with suppress(OSError, ProcessFailed):
            identify(self._host.runsc)  # once per binary, while the sandbox starts: no step has to wait for a digest
        _wait_ready(supervised, cancelled)
        sandbox = GvisorSandbox(
            spec,
            supervised=supervised,
            group=group,
            runsc_root_fd=runsc_root_fd,
            fs_fd=fs_fd,
            work_fd=work_fd,
            memory_event=memory_event,
            cancelled=cancelled,
        )
        return sandbox, supervised

    def _open_directory(self, stack: ExitStack, path: Path | str, *, dir_fd: int | None = None) -> int:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
        stack.callback(os.close, fd)
        return fd

    def _unmount(self, place: Place, *, deadline: float) -> None:
        """As often as something is mounted there. Raises OSError."""
        while place.fs in set(mount_points()):
            _insist(lambda: unmount(place.fs), deadline=deadline)


def _end(group: Group, *, deadline: float) -> None:
    """`deadline` is monotonic. Raises NotYetDestroyed."""
    left = group.kill(timeout_s=max(deadline - time.monotonic(), 0.0))
    if left:
        raise NotYetDestroyed(f"processes do not end: {sorted(left)}")


def _end_and_remove(group: Group, *, deadline: float) -> None:
    """Together: a worker that dies just now may have started something meanwhile. Raises NotYetDestroyed, OSError."""
    _end(group, deadline=deadline)
    group.remove()


def _insist(act: Callable[[], None], *, deadline: float) -> None:
    """The kernel lets go of what a killed process held a moment after it is gone. Raises OSError (EBUSY)."""
    while True:
        try:
            act()
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.002)
        else:
            return


def _make_guest_directories(fs_fd: int) -> None:
    """One tmpfs for /work and /tmp: so the limits of bytes and of files hold for both together, exactly."""
    os.mkdir("work", 0o700, dir_fd=fs_fd)
    os.chown("work", GUEST_UID, GUEST_UID, dir_fd=fs_fd)
    os.mkdir("tmp", dir_fd=fs_fd)
    os.chmod("tmp", 0o1777, dir_fd=fs_fd)  # noqa: S103 - as any /tmp; in a directory that only root can pass


def _end_sandbox(supervised: Supervised, ref: BoundaryRef) -> None:
    """Leave nothing running, and say how long runsc was there: what a run cost beside it is ours (`make bench`)."""
    gone = supervised.end(timeout_s=_CLEAR_S)
    log.info("sandbox_ended", run_id=ref.run_id, fence=ref.fence, why=gone.why, runsc_lived=gone.lived)


def _wait_ready(supervised: Supervised, cancelled: Cancellation) -> None:
    """Raises ProvisionFailed: it ended, took too long, or is not wanted any more."""
    deadline = time.monotonic() + _READY_S
    while not supervised.ready:
        if supervised.gone is not None:
            gone = supervised.gone
            said = gone.stderr.strip()[-500:] or f"{gone.why}, status {gone.status}"
            raise ProvisionFailed(f"runsc did not start the sandbox: {said}")
        if cancelled.is_set():
            raise ProvisionFailed("cancelled while the sandbox started")
        if time.monotonic() > deadline:
            raise ProvisionFailed(f"the sandbox was not ready within {_READY_S:g} s")
        supervised.listen(timeout_s=_POLL_S)
