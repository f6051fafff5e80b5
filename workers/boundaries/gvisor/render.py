"""PURE: what is asked of gVisor. Reviewers read the isolation policy here, and in the golden files of the tests.

Nothing of the run's tenant, bundle or steps is in it: what is rendered does not depend on who runs what.
"""

from pathlib import Path
from typing import Any

from service.core.boundary import BoundarySpec
from workers.boundaries.gvisor.cgroups import GroupLimits
from workers.boundaries.gvisor.control import CONTAINER
from workers.runtimes.store import INIT_AT, RootFilesystem

NAMESPACES = ("pid", "network", "ipc", "mount", "uts")
_PAGE = 4096
"""A file may grow by one page more than /work can hold: a full disk says ENOSPC, not SIGXFSZ; a sparse file stays
bounded."""
FILES_OVERHEAD = 3
"""Inodes of the run's tmpfs that are ours: its root, `work` and `tmp`."""


def render_config(spec: BoundarySpec, root: RootFilesystem, *, init: Path, work: Path, tmp: Path) -> dict[str, Any]:
    """The OCI configuration. The container's process is our init, uid 0 without any capability; steps come later,
    as another uid, and inherit its rlimits."""
    limits = spec.limits
    mounts = [_bind(source, at, writable=False) for source, at in root.binds]
    mounts += [
        {"destination": str(at), "type": "tmpfs", "source": "tmpfs", "options": ["ro", "mode=755", "size=4096"]}
        for at in root.masks
    ]
    mounts += [_bind(init, INIT_AT, writable=False), _bind(work, Path("/work"), writable=True)]
    mounts += [_bind(tmp, Path("/tmp"), writable=True)]  # noqa: S108 - the guest's own
    nothing: list[str] = []
    return {
        "ociVersion": "1.0.2",
        "root": {"path": str(root.path), "readonly": True},
        "hostname": "sandbox",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": [str(INIT_AT)],
            "env": [],
            "cwd": "/",
            "noNewPrivileges": True,
            "capabilities": dict.fromkeys(("bounding", "effective", "inheritable", "permitted", "ambient"), nothing),
            "rlimits": [
                _rlimit("CORE", 0),
                _rlimit("FSIZE", limits.disk + _PAGE),
                _rlimit("NOFILE", limits.open_files),
                _rlimit("NPROC", limits.pids),
            ],
        },
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}, *mounts],
        "linux": {"namespaces": [{"type": name} for name in NAMESPACES]},
    }


def render_argv(runsc: Path, *, directfs: bool) -> list[str]:
    """The command, run in the run's own directory: `--root` is found through the working directory, since the control
    socket's whole path has to fit in 107 bytes. runsc runs in the foreground as our child, never detached."""
    return [
        str(runsc),
        "--root=/proc/self/cwd/runsc",
        "--platform=systrap",
        "--network=none",
        "--overlay2=none",
        "--host-uds=none",
        "--host-fifo=none",
        f"--directfs={'true' if directfs else 'false'}",
        "--ignore-cgroups",  # it is started inside the run's cgroups, whose counters must outlive it
        "run",
        "--bundle=/proc/self/cwd/bundle",
        CONTAINER,
    ]


def group_limits(spec: BoundarySpec) -> GroupLimits:
    """The memory limit is exact: guest memory, its files and the sandbox's own share count in it. Host tasks are the
    second wall behind RLIMIT_NPROC: an idle sandbox has about 22, a guest's thread makes 1.4 to 2; hitting it ends the
    sentry."""
    return GroupLimits(memory_bytes=spec.limits.memory, tasks=96 + 3 * spec.limits.pids, cpus=spec.limits.cpu)


def _bind(source: Path, at: Path, *, writable: bool) -> dict[str, Any]:
    return {
        "destination": str(at),
        "type": "bind",
        "source": str(source),
        "options": ["bind", "rw", "nosuid", "nodev"] if writable else ["rbind", "ro", "nosuid", "nodev"],
    }


def _rlimit(name: str, value: int) -> dict[str, Any]:
    return {"type": f"RLIMIT_{name}", "hard": value, "soft": value}
