"""Control groups, version 1 and 2, for the run's limits and counters. What a host cannot enforce is named in `missing`.

A run's group is `blastdoor-<installation>.<name>` directly below the hierarchy's root (or below the parent that the
operator delegates), one flat directory per controller: its name alone is enough for any process to find and end it.
Sources: Documentation/admin-guide/cgroup-v1/memory.rst, cgroup-v2.rst.
"""

import errno
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from workers.boundaries.gvisor.supervisor import end_group, members

_V1_CONTROLLERS = ("memory", "pids", "cpu", "cpuacct")
_V2_CONTROLLERS = ("memory", "pids", "cpu")
_PERIOD_US = 100_000
_NEARLY_ALL = 0.97


@dataclass(frozen=True, kw_only=True)
class GroupLimits:
    """`tasks` counts host threads, which is more than the guest's own; `cpus` may be a fraction."""

    memory_bytes: int
    tasks: int
    cpus: float


class CgroupTree:
    """The host's hierarchies, as /proc/self/mountinfo shows them."""

    def __init__(self, *, version: int, roots: Mapping[str, Path], missing: tuple[str, ...]) -> None:
        self.version = version
        self.roots = dict(roots)
        self.missing = missing

    @classmethod
    def detect(cls, *, parent: str = "", mountinfo: Path = Path("/proc/self/mountinfo")) -> "CgroupTree":
        """`parent`: a delegated group below the root in which runs' groups are made; it must exist."""
        legacy: dict[str, Path] = {}
        unified: Path | None = None
        for line in mountinfo.read_text().splitlines():
            left, _, right = line.partition(" - ")
            kind, _, options = right.split(" ", 2)
            point = Path(left.split(" ")[4]) / parent
            if kind == "cgroup":
                legacy.update((name, point) for name in options.split(",") if name in _V1_CONTROLLERS)
            elif kind == "cgroup2":
                unified = point
        if "memory" in legacy or unified is None:
            return cls._version_1(legacy)
        return cls._version_2(unified)

    @classmethod
    def _version_1(cls, roots: dict[str, Path]) -> "CgroupTree":
        missing = [f"the cgroup controller {name} (mount it)" for name in _V1_CONTROLLERS if name not in roots]
        swap_limit = roots.get("memory", Path("/")) / "memory.memsw.limit_in_bytes"
        if not swap_limit.exists() and _swap_in_use():
            missing.append("a limit of swap (boot with swapaccount=1, or turn swap off)")
        missing += [f"the cgroup directory {path} (make it)" for path in set(roots.values()) if not path.is_dir()]
        return cls(version=1, roots=roots, missing=tuple(missing))

    @classmethod
    def _version_2(cls, root: Path) -> "CgroupTree":
        """Children get a controller only when the parent hands it down: done here when we may."""
        missing: list[str] = []
        for name in _V2_CONTROLLERS:
            try:
                if name not in (root / "cgroup.subtree_control").read_text().split():
                    (root / "cgroup.subtree_control").write_text(f"+{name}")
            except OSError as error:
                why = "processes live in that group itself" if error.errno == errno.EBUSY else error.strerror
                missing.append(f"the cgroup controller {name} below {root} ({why})")
        return cls(version=2, roots=dict.fromkeys(("memory", "pids", "cpu", "cpuacct"), root), missing=tuple(missing))

    def group(self, name: str) -> "Group":
        return Group(version=self.version, paths={kind: root / name for kind, root in self.roots.items()})

    def names(self, prefix: str) -> Iterator[str]:
        """Groups that exist in any hierarchy, by name."""
        found = {entry.name for root in set(self.roots.values()) if root.is_dir() for entry in os.scandir(root)}
        yield from sorted(name for name in found if name.startswith(prefix))


def _swap_in_use() -> bool:
    return len(Path("/proc/swaps").read_text().splitlines()) > 1


@dataclass(frozen=True, kw_only=True)
class Group:
    """One run's group. Reading a counter of a removed group raises FileNotFoundError."""

    version: int
    paths: Mapping[str, Path]

    @cached_property
    def directories(self) -> tuple[Path, ...]:
        """Each once: controllers may share a hierarchy."""
        return tuple(dict.fromkeys(self.paths.values()))

    @property
    def exists(self) -> bool:
        return any(path.exists() for path in self.directories)

    def create(self, limits: GroupLimits) -> None:
        """Raises FileExistsError when the name is taken, OSError when a limit is not accepted."""
        for path in self.directories:
            path.mkdir(mode=0o755)
        memory, quota_us = str(limits.memory_bytes), str(int(limits.cpus * _PERIOD_US))
        if self.version == 1:
            self._write("memory", "memory.limit_in_bytes", memory)
            if (self.paths["memory"] / "memory.memsw.limit_in_bytes").exists():
                self._write("memory", "memory.memsw.limit_in_bytes", memory)
            # The kernel kills nothing: the guest stands still, the event comes at once, and we end it as a whole.
            # Otherwise a victim chosen by size could be the guest's or the sentry, and one look like a plain exit 1.
            self._write("memory", "memory.oom_control", "1")
            self._write("cpu", "cpu.cfs_period_us", str(_PERIOD_US))
            self._write("cpu", "cpu.cfs_quota_us", quota_us)
        else:
            self._write("memory", "memory.max", memory)
            with suppress(FileNotFoundError):  # a kernel without swap
                self._write("memory", "memory.swap.max", "0")
            self._write("memory", "memory.oom.group", "1")
            self._write("cpu", "cpu.max", f"{quota_us} {_PERIOD_US}")
        self._write("pids", "pids.max", str(limits.tasks))

    def pids(self) -> set[int]:
        return members(map(str, self.directories))

    def kill(self, *, timeout_s: float) -> set[int]:
        """SIGKILL everything in it until it is empty. -> what is left after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        return end_group([str(path) for path in self.directories], deadline=deadline, reap=lambda: None)

    def remove(self) -> None:
        """Absent is success. Raises OSError (EBUSY) while something is in it."""
        for path in self.directories:
            with suppress(FileNotFoundError):
                path.rmdir()

    # What is enforced now, read back
    def limits(self) -> dict[str, int | float]:
        if self.version == 1:
            memory = self._number("memory", "memory.limit_in_bytes")
            quota = self._number("cpu", "cpu.cfs_quota_us")
            period = self._number("cpu", "cpu.cfs_period_us")
        else:
            text = self._read("memory", "memory.max")
            memory = -1 if text == "max" else int(text)
            words = self._read("cpu", "cpu.max").split()
            quota, period = (-1 if words[0] == "max" else int(words[0])), int(words[1])
        tasks = self._read("pids", "pids.max")
        return {
            "memory_bytes": memory,
            "cpu": quota / period if quota > 0 else -1,
            "host_tasks": -1 if tasks == "max" else int(tasks),
        }

    # Counters
    def cpu_s(self) -> float:
        """CPU seconds of everything that was ever in it."""
        if self.version == 1:
            return self._number("cpuacct", "cpuacct.usage") / 1e9
        return self._field("cpu", "cpu.stat", "usage_usec") / 1e6

    def peak_memory_bytes(self) -> int:
        if self.version == 1:
            return self._number("memory", "memory.max_usage_in_bytes")
        with suppress(FileNotFoundError):  # before Linux 5.19
            return self._number("memory", "memory.peak")
        return self._number("memory", "memory.current")

    def hit_host_task_limit(self) -> bool:
        return self._field("pids", "pids.events", "max") > 0

    def out_of_memory(self) -> bool:
        """The kernel has said so: on v1 the guest stands still or was killed, on v2 it was killed."""
        if self.version == 1:
            return any(self._field("memory", "memory.oom_control", name) > 0 for name in ("under_oom", "oom_kill"))
        return any(self._field("memory", "memory.events", name) > 0 for name in ("oom", "oom_kill"))

    def memory_is_full(self, limit_bytes: int) -> bool:
        """Held by what cannot be reclaimed: then a write to /work fails with ENOMEM, and no OOM event comes with it.
        A group that is full of page cache is merely warm. One small read, until the peak comes near the limit."""
        if self.peak_memory_bytes() < _NEARLY_ALL * limit_bytes:
            return False
        legacy = self.version == 1
        usage = self._number("memory", "memory.usage_in_bytes" if legacy else "memory.current")
        names = ("total_active_file", "total_inactive_file") if legacy else ("active_file", "inactive_file")
        reclaimable = sum(self._field("memory", "memory.stat", name) for name in names)
        return usage - reclaimable >= _NEARLY_ALL * limit_bytes

    def host_tasks(self) -> int:
        """Threads of the host in it: each thread of the guest is at least one, the sandbox's own come on top."""
        return self._number("pids", "pids.current")

    def watch_memory(self) -> int | None:
        """A descriptor that becomes readable when the group runs out of memory (v1); None where it is asked (v2)."""
        if self.version != 1:
            return None
        event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            with open(self.paths["memory"] / "memory.oom_control") as control:
                self._write("memory", "cgroup.event_control", f"{event} {control.fileno()}")
        except OSError:
            os.close(event)
            raise
        return event

    def _write(self, kind: str, name: str, text: str) -> None:
        (self.paths[kind] / name).write_text(text)

    def _read(self, kind: str, name: str) -> str:
        """Several times per second and run: without pathlib and text layers, a fifth of the time."""
        fd = os.open(f"{self.paths[kind]}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(fd, 65536).decode().strip()
        finally:
            os.close(fd)

    def _number(self, kind: str, name: str) -> int:
        return int(self._read(kind, name))

    def _field(self, kind: str, name: str, field: str) -> int:
        """`field` of a file of `key value` lines; 0 where the kernel does not have it."""
        for line in self._read(kind, name).splitlines():
            key, _, value = line.partition(" ")
            if key == field:
                return int(value)
        return 0
