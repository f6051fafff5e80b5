"""What tests of boundaries share: real gVisor drivers with an installation of their own, and a sweep for what is left.

Every driver here has a random installation id, so tests find and end only what they made.
"""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from service.core.boundary import ArtifactLimits, BoundaryKind, BoundaryRef, BoundarySpec, StepSpec
from service.core.controls import Limits, Network
from service.core.errors import TooLarge
from service.core.ids import new_run_id
from tests.summary import ran
from workers.boundaries.gvisor.driver import GvisorBoundary, GvisorHost
from workers.boundaries.gvisor.mounts import mount_points
from workers.runtimes.store import RuntimeStore

RUNSC = Path("/usr/bin/runsc")
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/work", "LANG": "C.UTF-8", "TMPDIR": "/tmp"}
MIB = 2**20


class Never:
    """A Cancellation that does not come."""

    def is_set(self) -> bool:
        return False


class Sink:
    """Artifacts in memory, by digest."""

    def __init__(self) -> None:
        self.stored: dict[str, bytes] = {}

    def put(self, source: BinaryIO, *, max_bytes: int) -> tuple[str, int]:
        data = source.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise TooLarge("more than allowed")
        digest = hashlib.sha256(data).hexdigest()
        self.stored[digest] = data
        return digest, len(data)


def require_gvisor() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    if not RUNSC.exists():
        pytest.skip("runsc is not installed")
    ran("boundary", "gvisor")


def make_ref(*, installation: str, run_id: str | None = None, fence: int = 1, seconds: float = 120) -> BoundaryRef:
    return BoundaryRef(
        installation=installation,
        kind=BoundaryKind.GVISOR,
        site="here",
        tenant="acme",
        run_id=run_id or new_run_id(),
        fence=fence,
        expires_at=datetime.now(UTC) + timedelta(seconds=seconds),
    )


def make_spec(**limits: Any) -> BoundarySpec:
    return BoundarySpec(limits=Limits(**limits), network=Network())


def make_step(*argv: str, stdin: bytes = b"", timeout_s: float = 20, n: int = 1, **env: str) -> StepSpec:
    return StepSpec(n=n, argv=argv, env=ENVIRONMENT | env, stdin=stdin, timeout_s=timeout_s)


def shell(command: str, *, stdin: bytes = b"", timeout_s: float = 20, n: int = 1, **env: str) -> StepSpec:
    return make_step("/bin/sh", "-c", command, stdin=stdin, timeout_s=timeout_s, n=n, **env)


def artifact_limits(*, expected: tuple[str, ...] = (), total_bytes: int = 8 * MIB, **more: Any) -> ArtifactLimits:
    return ArtifactLimits(total_bytes=total_bytes, expected=expected, **more)


def new_installation() -> str:
    return f"test{uuid.uuid4().hex[:12]}"


@contextmanager
def gvisor_boundary(runtime_dir: Path, *, store: Path, **host: Any) -> Iterator[GvisorBoundary]:
    """A driver, and afterwards the proof that nothing of its installation is left on this machine."""
    installation = new_installation()
    boundary = GvisorBoundary(
        GvisorHost(
            installation=installation, site="here", runtime_dir=runtime_dir, runtimes=RuntimeStore(store), **host
        )
    )
    try:
        yield boundary
        left = traces(installation, runtime_dir)
    finally:
        for ref in boundary.discover():
            boundary.destroy(ref)
        boundary.close()
        shutil.rmtree(runtime_dir / installation, ignore_errors=True)
    assert left == [], f"left behind: {left}"


def traces(installation: str, runtime_dir: Path) -> list[str]:
    """Everything of an installation that exists here: directories, mounts, cgroups, processes in them."""
    found: list[str] = []
    home = runtime_dir / installation
    if home.is_dir():
        found += [f"directory {entry.path}" for entry in os.scandir(home)]
    found += [f"mount {point}" for point in mount_points() if installation in str(point)]
    for root, directories, _ in os.walk("/sys/fs/cgroup"):
        for name in directories:
            if installation in name:
                pids = (Path(root) / name / "cgroup.procs").read_text().split()
                found.append(f"cgroup {root}/{name} with {len(pids)} processes")
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cgroup").read_text()
            except OSError:
                continue
            if installation in line:
                found.append(f"process {entry.name}")
    return found
