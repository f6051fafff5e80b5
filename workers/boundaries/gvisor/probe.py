"""What this host can enforce, measured now: by looking, and by one real sandbox (the canary).

The canary matters most for the control protocol, which gVisor does not promise to keep: a release that speaks another
one must show up here as a missing capability, never as a wrong result of somebody's run.
"""

import os
import re
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from service.core.boundary import BoundaryKind, BoundaryRef, BoundarySpec, Capabilities, Ended, Execution, StepSpec
from service.core.controls import Limits, Network
from service.core.errors import BlastdoorError
from service.core.ids import new_run_id
from workers.boundaries.gvisor.evidence import RuntimeBinary, identify
from workers.proc import ProcessFailed
from workers.runtimes.store import DEFAULT

if TYPE_CHECKING:
    from workers.boundaries.gvisor.driver import GvisorBoundary

_CANARY_VALID_S = 600.0
_HOW_TO_GET_RUNSC = "apt install runsc (Debian trixie or bookworm-backports), or gVisor's own release"
_RELEASE = re.compile(r"20[0-9]{6}(\.[0-9]+)?")
"""gVisor's releases are dates; distributions put words of their own around them."""
_ADVISORIES = (
    ("20250301", "CVE-2025-2713: a local user of the host may gain rights through runsc's file handling"),
    ("20260901", "CVE-2026-96812: a device node in a root file system reaches the host (Blastdoor's have none)"),
)
"""(release that is no longer affected, what is known of older ones)"""
_passed: dict[tuple[str, str], float] = {}


class _Never:
    def is_set(self) -> bool:
        return False


def probe(boundary: "GvisorBoundary") -> Capabilities:
    """Never raises for what a host lacks: it says so in `missing`."""
    missing = list(boundary.cgroups.missing)
    if os.geteuid() != 0:
        missing.append("root (namespaces, cgroups and mounts need it)")
    if not boundary.host.init.exists():
        missing.append("the compiled init beside init.c (install the package again; it needs a C compiler)")
    binary = _identify(boundary, missing)
    runtimes: dict[str, str] = {}
    try:
        runtimes = dict(boundary.host.runtimes.offered())
    except (BlastdoorError, OSError) as error:
        missing.append(f"root filesystems: {error}")
    if not missing and binary is not None:
        why = _canary(boundary, binary)
        if why is not None:
            missing.append(why)
    version = binary.version if binary else None
    return Capabilities(
        boundary=BoundaryKind.GVISOR.value,
        available=not missing,
        missing=tuple(missing),
        runtimes=runtimes,
        versions={"runsc": _release(version)} if version else {},
        advisories=_advisories(version),
    )


def _identify(boundary: "GvisorBoundary", missing: list[str]) -> RuntimeBinary | None:
    try:
        binary = identify(boundary.host.runsc)
    except (OSError, ProcessFailed):
        missing.append(f"{boundary.host.runsc} ({_HOW_TO_GET_RUNSC})")
        return None
    if binary.version is None:
        missing.append(f"{boundary.host.runsc} does not say its version ({_HOW_TO_GET_RUNSC})")
    return binary


def _advisories(version: str | None) -> tuple[str, ...]:
    release = _release(version or "")
    return tuple(said for fixed_in, said in _ADVISORIES if _RELEASE.match(release) and release < fixed_in)


def _release(version: str) -> str:
    """`0.0~20240729.0` and `release-20240729.0` are 20240729.0, so that a policy's minimum compares."""
    found = _RELEASE.search(version)
    return found[0] if found else version


def _canary(boundary: "GvisorBoundary", binary: RuntimeBinary) -> str | None:
    """One real sandbox, at most every ten minutes for each runsc binary. -> what is wrong with it."""
    key = (boundary.host.installation, binary.sha256)
    if time.monotonic() - _passed.get(key, -_CANARY_VALID_S) < _CANARY_VALID_S:
        return None
    why = _play_canary(boundary)
    if why is None:
        _passed[key] = time.monotonic()
    return why


def _play_canary(boundary: "GvisorBoundary") -> str | None:
    ref = BoundaryRef(
        installation=boundary.host.installation,
        kind=BoundaryKind.GVISOR,
        site=boundary.host.site,
        tenant="_canary",
        run_id=new_run_id(),
        fence=0,
        expires_at=datetime.now(UTC) + timedelta(seconds=60),
    )
    spec = BoundarySpec(limits=Limits(), network=Network(), runtime=DEFAULT)
    try:
        with boundary.open(spec, ref, cancelled=_Never()) as sandbox:
            exited = sandbox.execute(_shell(1, "id -u; exit 139"))
            signalled = sandbox.execute(_shell(2, "kill -SEGV $$"))
            absent = sandbox.execute(_step(3, ("/nonexistent",)))
            evidence = sandbox.evidence()
        boundary.destroy(ref)
    except (BlastdoorError, OSError) as error:
        return f"a sandbox that works: the canary failed ({error})"
    speaks = (
        _is(exited, Ended.EXITED, exit_code=139)
        and exited.stdout.data == b"65532\n"
        and _is(signalled, Ended.EXITED, signal=11)
        and _is(absent, Ended.NOT_STARTED)
    )
    if not speaks:
        return "a runsc whose control protocol we know (tested: release 20240729); the canary's results were wrong"
    if evidence.network != "none" or evidence.platform != "systrap" or evidence.uid != 65532:
        return f"isolation as asked for: network {evidence.network}, platform {evidence.platform}, uid {evidence.uid}"
    return None


def _is(execution: Execution, ended: Ended, *, exit_code: int | None = None, signal: int | None = None) -> bool:
    return (execution.ended, execution.exit_code, execution.signal) == (ended, exit_code, signal)


def _shell(n: int, command: str) -> StepSpec:
    return _step(n, ("/bin/sh", "-c", command))


def _step(n: int, argv: tuple[str, ...]) -> StepSpec:
    return StepSpec(n=n, argv=argv, env={"PATH": "/usr/bin:/bin"}, timeout_s=20)
