"""The one abstraction: a wall around untrusted code, and what is said and seen of it.

A boundary kind is one folder that implements `Boundary`; everything here is frozen data that another process can
read back. The values that come out of a sandbox are observations from the host's side, never the guest's word.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from service.core.controls import PLATFORM_CEILINGS, Limits, Need, Network
from service.core.tenancy import Quota


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BoundaryKind(StrEnum):
    """Folder = enum value = queue suffix = label value."""

    GVISOR = "gvisor"
    MICROVM = "microvm"
    NAMESPACE = "namespace"
    CLUSTER = "cluster"


class Kernel(StrEnum):
    SHARED = "shared"
    SANDBOXED = "sandboxed"
    DEDICATED = "dedicated"


class Nodes(StrEnum):
    SHARED = "shared"
    DEDICATED = "dedicated"


class ControlPlane(StrEnum):
    SHARED = "shared"
    ISOLATED = "isolated"
    DEDICATED = "dedicated"


class Guarantees(_Frozen):
    """What a wall promises. Each enum is written weakest first; its order is the order of strength."""

    kernel: Kernel
    nodes: Nodes
    control_plane: ControlPlane


class Capabilities(_Frozen):
    """What one host can enforce now, for one boundary (`gvisor`, `namespace/runc`), as its probe measured it.

    `missing`: in plain words, why it is not available, and how to get it. `guarantees`: only where the probe found
    less than the table promises. `abilities`: extra words such as `egress-allow-list`. `node_groups`: tenants' groups
    that have a node. `runtimes`: offered root filesystems, name to digest. `versions`: of what builds the wall.
    """

    boundary: str
    available: bool
    missing: tuple[str, ...] = ()
    guarantees: Guarantees | None = None
    abilities: frozenset[str] = frozenset()
    node_groups: frozenset[str] = frozenset()
    runtimes: Mapping[str, str] = {}
    versions: Mapping[str, str] = {}
    advisories: tuple[str, ...] = ()


class BoundaryRef(_Frozen):
    """Enough for another process to destroy what it names. The same fields stand on the resource as labels."""

    installation: str
    kind: BoundaryKind
    variant: str = ""
    site: str
    tenant: str
    run_id: str
    fence: int
    expires_at: datetime
    created_at: datetime | None = None
    """When its run was claimed; None where the label does not say it."""

    @property
    def boundary(self) -> str:
        """Kind and variant, e.g. `namespace/gvisor`."""
        return f"{self.kind}/{self.variant}" if self.variant else str(self.kind)

    @property
    def name(self) -> str:
        """DNS-safe, and different for each attempt: a stale worker cannot collide with a newer one."""
        return boundary_name(self.run_id, self.fence)

    def is_of(self, tenant: str) -> bool:
        """Of a reference that was read back from a shared cluster the tenant is a hash: names do not leave us."""
        return self.tenant in (tenant, tenant_hash(self.installation, tenant))


def boundary_name(run_id: str, fence: int) -> str:
    return f"bd-{run_id.removeprefix('run_')}-f{fence}"


def tenant_hash(installation: str, tenant: str) -> str:
    """What stands for a tenant where others may read it: 40 hexadecimal digits."""
    return hashlib.sha256(f"{installation}/{tenant}".encode()).hexdigest()[:40]


class Share(_Frozen):
    """What the runs of one tenant may have together where they share a place: so many at once, each within `limits`."""

    runs: int = Quota().concurrent
    limits: Limits = PLATFORM_CEILINGS


STANDBY_TENANT = "_standby"
"""Of boundaries that are kept ready and are nobody's yet."""


class ClusterChoices(_Frozen):
    """How boundary `cluster` makes its clusters. `provisioners`: those to be offered, `kind` and `capi`; `images`: of
    each runtime the image, by digest; `archives`: OCI archives with those images that a node of kind does not have;
    `at_once`: clusters of each provisioner at the same time; `standby`: of kind, made before anybody asks; `ready_s`:
    a cluster of Cluster API that is not ready by then is given up; `development`: its nodes need not be machines."""

    provisioners: tuple[str, ...] = ()
    images: Mapping[str, str] = {}
    archives: tuple[Path, ...] = ()
    at_once: int = 2
    standby: int = 0
    kind: Path = Path("/usr/bin/kind")
    docker: Path = Path("/usr/bin/docker")
    docker_host: str = "unix:///var/run/docker.sock"
    node_image: str = ""
    capi_kubeconfig: Path | None = None
    capi_namespace: str = "blastdoor-clusters"
    capi_topology: Path | None = None
    ready_s: float = 900.0
    development: bool = False


NO_CLUSTERS = ClusterChoices()


class BoundarySpec(_Frozen):
    """What to build. It does not depend on the number of steps: one shape serves 1 and 100.

    `lifetime`: after so long its supervisor ends it, by a clock that nobody sets; when absent, at the reference's
    `expires_at`, by the host's own clock. `node_group`: it runs on a node of this group, and on no other. `share`: of
    the tenant. `needs`: what the code cannot do without; a boundary that does not give it refuses."""

    limits: Limits
    network: Network
    needs: tuple[Need, ...] = ()
    runtime: str = "default"
    lifetime: timedelta | None = None
    node_group: str | None = None
    share: Share = Share()


class Bundle(_Frozen):
    """The uploaded code, judged. `path` is where this host can read the archive's bytes; `bytes_` their number;
    `files` the regular files in it, `content_bytes` what they come to when unpacked."""

    digest: str
    bytes_: int
    files: int
    content_bytes: int
    path: Path | None = None


class StepSpec(_Frozen):
    """One command, ready to run: argv, the whole environment, stdin's bytes, and the time it may take in seconds."""

    n: int
    argv: tuple[str, ...]
    env: Mapping[str, str]
    stdin: bytes = b""
    timeout_s: float


class Capture(_Frozen):
    """One stream as it was kept: head and tail, each up to half of the limit; `total_bytes` counts all of it."""

    head: bytes = b""
    tail: bytes = b""
    total_bytes: int = 0

    @property
    def truncated(self) -> bool:
        return self.total_bytes > len(self.head) + len(self.tail)

    @property
    def data(self) -> bytes:
        return self.head + self.tail


class Limit(StrEnum):
    """What the host saw being hit."""

    MEMORY = "memory"
    PIDS = "pids"
    DISK = "disk"
    FILES = "files"
    OUTPUT = "output"


class Ended(StrEnum):
    """Why a step is over, as the host saw it."""

    EXITED = "exited"  # exit_code or signal says how
    NOT_STARTED = "not_started"  # no such program, or not executable: `message` says which
    STEP_TIMEOUT = "step_timeout"
    WALL_TIMEOUT = "wall_timeout"
    LIMIT = "limit"  # the host ended it; `limits` says why
    CANCELLED = "cancelled"
    BROKEN = "broken"  # the guest ended what holds or watches it: never a success, and not our failure
    LOST = "lost"  # the sandbox died, and nothing that the host saw explains it


class Execution(_Frozen):
    """What was observed of one step. `exit_code` and `signal` come from the kernel's wait status, at most one is set.
    `limits`: limits the host saw hit during the step, whether or not they ended it. Durations in seconds."""

    ended: Ended
    exit_code: int | None = None
    signal: int | None = None
    message: str = ""
    duration_s: float
    cpu_s: float
    stdout: Capture = Capture()
    stderr: Capture = Capture()
    limits: frozenset[Limit] = frozenset()
    sandbox_alive: bool = True


class Usage(_Frozen):
    """`wall_s` from the first step's start to the last one's end; CPU and memory are the whole sandbox's."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    peak_memory_bytes: int = 0


class Evidence(_Frozen):
    """Facts about the wall, observed from the host's side; the drivers' docstrings name the source of each.
    Kinds add fields of their own."""

    model_config = ConfigDict(frozen=True, extra="allow")

    runtime: str
    runtime_version: str | None
    runtime_sha256: str | None
    platform: str | None
    network: str | None
    limits: Mapping[str, Any]
    uid: int | None
    observed_at: datetime


class Artifact(_Frozen):
    path: str
    bytes: int
    sha256: str


class SkippedArtifact(_Frozen):
    path: str
    why: str


class FileContent(_Frozen):
    """A file that an expectation names, as it was found after every guest process had ended. `absent_why` says why
    there is no content (`absent`, `symlink`, `hard link`, `too large`, ...)."""

    data: bytes | None = None
    absent_why: str | None = None


class ArtifactLimits(_Frozen):
    """Caps on what is collected. `expected`: paths whose content expectations need, at most `expected_bytes` each."""

    total_bytes: int
    count: int = 1000
    depth: int = 32
    seconds: float = 20.0
    expected: tuple[str, ...] = ()
    expected_bytes: int = 1024 * 1024


class ArtifactSink(Protocol):
    """Where collected bytes go: content-addressed, so one that is cut short leaves nothing."""

    def put(self, source: BinaryIO, *, max_bytes: int) -> tuple[str, int]:
        """Copy until end of file; -> (sha256 hex, bytes). Raises TooLarge beyond max_bytes, and keeps nothing then;
        QuotaExceeded when the tenant's storage has no room for it, which makes it a skipped artifact and no error."""
        ...


class Artifacts(_Frozen):
    kept: tuple[Artifact, ...] = ()
    skipped: tuple[SkippedArtifact, ...] = ()
    expected: Mapping[str, FileContent] = {}
    usage: Usage = Usage()


class Cancellation(Protocol):
    """Asked often while a step runs. True ends the step: the run was cancelled, or the lease is lost."""

    def is_set(self) -> bool: ...


Listener = Callable[[Literal["stdout", "stderr"], bytes], None]
"""Is told what a step prints as it comes, in order and unchanged, from the loop that drains the guest: it returns at
once, and raises nothing."""


class Sandbox(Protocol):
    """The inside of an open boundary; valid only within its `with` block."""

    def upload(self, bundle: Bundle) -> None:
        """Unpack into the working directory (`service.intake.archive.unpack`), once, before the first guest
        instruction."""
        ...

    def execute(self, step: StepSpec, *, listener: Listener | None = None) -> Execution:
        """Play one step to its end. A non-zero exit is a result, never an exception. Raises after `collect`. What the
        `Execution` says was printed, the listener has been told by then, and what was cut from it, too."""
        ...

    def evidence(self) -> Evidence: ...

    def collect(self, patterns: Sequence[str], *, limits: ArtifactLimits, sink: ArtifactSink) -> Artifacts:
        """End every guest process, prove it, then read what was left. Called last, and once."""
        ...


class Host(Protocol):
    """What a driver is told of where it works; the composition root knows it. A driver's class has
    `for_host(host) -> Boundary`."""

    @property
    def installation(self) -> str: ...
    @property
    def site(self) -> str: ...
    @property
    def state_dir(self) -> Path: ...
    @property
    def runtime_dir(self) -> Path: ...
    @property
    def runsc(self) -> Path: ...
    @property
    def kubeconfig(self) -> Path | None: ...
    @property
    def kube_image(self) -> str: ...
    @property
    def namespace_variants(self) -> Sequence[str]: ...
    @property
    def clusters(self) -> ClusterChoices: ...


class Boundary(Protocol):
    """One way to build a wall around untrusted code. One implementation per kind."""

    @property
    def kind(self) -> BoundaryKind: ...

    def probe(self) -> Sequence[Capabilities]:
        """What this host can enforce, one row per variant; measured now, never assumed."""
        ...

    def open(self, spec: BoundarySpec, ref: BoundaryRef, *, cancelled: Cancellation) -> AbstractContextManager[Sandbox]:
        """Raises ProvisionFailed; whatever fails on the way leaves nothing running."""
        ...

    def discover(self) -> Iterator[BoundaryRef]:
        """What exists here for this installation and kind, from the platform's labels, not from our memory."""
        ...

    def destroy(self, ref: BoundaryRef) -> None:
        """Idempotent, from any process; absent is success. Raises NotYetDestroyed while something is left."""
        ...
