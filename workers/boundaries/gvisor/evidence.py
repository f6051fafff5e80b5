"""What the wall is, observed from the host's side. Each field names its source; none is the guest's word or our own
intention read back.

    runtime, runtime_sha256   the bytes of /proc/<sandbox pid>/exe: the program that runs, not the one configured
    runtime_version           what that same file says when asked (`--version`), remembered by its identity
    platform                  the running sandbox's own command line, /proc/<pid>/cmdline
    network                   the sandbox's network namespace, /proc/<pid>/ns/net, and the interfaces in it, net/dev
    limits                    the run's cgroup files, and statfs of its tmpfs
    uid                       the sentry's process list, of a step's process while it ran, else of one started alike
"""

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from workers.proc import ProcessFailed, run

_VERSION = re.compile(r"^runsc version (\S+)", re.MULTILINE)
_remembered: dict[tuple[int, int, int, int, int], "RuntimeBinary"] = {}


@dataclass(frozen=True)
class RuntimeBinary:
    """A runsc program: what it says it is, and the digest of its bytes."""

    version: str | None
    sha256: str


@dataclass(frozen=True, kw_only=True)
class SandboxFacts:
    """Of a living sandbox process. Everything is None or "unknown" that could not be seen."""

    pid: int
    binary: RuntimeBinary
    platform: str | None
    network: str | None


def identify(program: str | Path) -> RuntimeBinary:
    """Hash and ask a runsc program; once for each file that it ever was. `program` may be a /proc/<pid>/exe. Raises
    OSError, ProcessFailed."""
    fd = os.open(program, os.O_RDONLY | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        found = os.fstat(fd)
        key = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        if key not in _remembered:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            said = _VERSION.search(run([f"/proc/{os.getpid()}/fd/{fd}", "--version"], timeout_s=10).text)
            _remembered[key] = RuntimeBinary(version=said[1] if said else None, sha256=digest)
        return _remembered[key]


def observe_sandbox(pids: Iterable[int]) -> SandboxFacts | None:
    """Find the sandbox among the processes of the run's cgroup, and look at it. None when there is none (any more)."""
    for pid in sorted(pids):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"boot" not in words:
                continue
            return SandboxFacts(
                pid=pid,
                binary=identify(f"/proc/{pid}/exe"),
                platform=_platform(words),
                network=_network(pid),
            )
        except (OSError, ProcessFailed):
            continue  # it ended while we looked
    return None


def _platform(words: list[bytes]) -> str | None:
    flags = [word.removeprefix(b"--platform=") for word in words if word.startswith(b"--platform=")]
    return flags[-1].decode("ascii", "replace") if flags else None


def _network(pid: int) -> str:
    """ "none" only when the namespace is not ours, and nothing but the loopback device exists there."""
    if os.readlink(f"/proc/{pid}/ns/net") == os.readlink("/proc/self/ns/net"):
        return "host"
    table = Path(f"/proc/{pid}/net/dev").read_text()
    devices = [line.partition(":")[0].strip() for line in table.splitlines() if ":" in line]
    return "none" if set(devices) <= {"lo"} else "devices: " + ", ".join(sorted(devices))
