"""Looks over this whole machine for what carries a mark: what a boundary, a run or an installation has left behind.

A mark is text that nothing else has: an installation's id, a boundary's name, a directory of the test's own. It is
searched for where it cannot be hidden from the host: control groups, processes (of any mount namespace), mounts,
network namespaces and interfaces with a name, shared memory, directories. Nothing here ends anything.
"""

import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
_NAMED = (Path("/run/netns"), Path("/sys/class/net"), Path("/dev/shm"), Path("/dev/mqueue"))
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Found:
    """One thing that is there: `kind` is process, mount, cgroup, directory or named."""

    kind: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind} {self.what}"


def sweep(*marks: str, directories: Sequence[Path] = ()) -> list[Found]:
    """Everything that carries one of the marks, and those of `directories` that exist. This process and the ones that
    started it are no find: their command lines may name what they test."""
    assert marks, "without a mark nothing can be found"
    assert all(len(mark) >= 8 for mark in marks), "a short mark finds what is not ours"
    wanted = [os.fsencode(mark) for mark in marks]
    found = [*_cgroups(marks), *_processes(wanted), *_mounts(wanted), *_names(marks)]
    return found + [Found("directory", str(path)) for path in directories if os.path.lexists(path)]


def swept(*marks: str, directories: Sequence[Path] = (), within_s: float) -> list[Found]:
    """What is left when nothing more goes away, or `within_s` is over: teardown may take its moment."""
    deadline = time.monotonic() + within_s
    while (found := sweep(*marks, directories=directories)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def pids_in_cgroups(mark: str) -> set[int]:
    """The processes in every control group whose name has the mark."""
    return {
        int(line)
        for group in _cgroups((mark,))
        for line in _read(Path(group.what) / "cgroup.procs").split()
        if line != b"0"
    }


def _cgroups(marks: Sequence[str]) -> Iterator[Found]:
    for top, names, _ in os.walk(CGROUPS):
        for name in names:
            if any(mark in name for mark in marks):
                yield Found("cgroup", f"{top}/{name}")


def _processes(marks: Sequence[bytes]) -> Iterator[Found]:
    """Those in a marked control group, and those with the mark in what they were started with or where they work."""
    passed_over = _own_line()
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit() or int(entry.name) in passed_over:
            continue
        place = Path(entry.path)
        seen = [_read(place / name) for name in ("cgroup", "cmdline", "environ")]
        seen += [_link(place / name) for name in ("cwd", "root", "exe")]
        if any(mark in text for mark in marks for text in seen):
            command = b" ".join(seen[1].split(b"\0")).decode("utf-8", "replace")
            yield Found("process", f"{entry.name}: {command[:200]}")


def _mounts(marks: Sequence[bytes]) -> Iterator[Found]:
    """In the mount namespaces of all processes, each place once: what was unmounted here may still be held there."""
    looked_at: set[bytes] = set()
    points: dict[str, None] = {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        namespace = _link(Path(entry.path) / "ns/mnt")
        if namespace in looked_at:
            continue
        looked_at.add(namespace)
        for line in _read(Path(entry.path) / "mountinfo").splitlines():
            if any(mark in line for mark in marks):
                point = line.split(b" ")[4].decode("utf-8", "replace")
                points[_OCTAL.sub(lambda match: chr(int(match[1], 8)), point)] = None
    yield from (Found("mount", point) for point in points)


def _names(marks: Sequence[str]) -> Iterator[Found]:
    for directory in _NAMED:
        if directory.is_dir():
            for entry in os.scandir(directory):
                if any(mark in entry.name for mark in marks):
                    yield Found("named", entry.path)


def _own_line() -> set[int]:
    line, pid = set(), os.getpid()
    while pid > 0:
        line.add(pid)
        words = _read(Path(f"/proc/{pid}/stat")).rpartition(b")")[2].split()
        pid = int(words[1]) if len(words) > 1 else 0
    return line


def _read(path: Path) -> bytes:
    """Empty for what has just gone, or has no such thing."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _link(path: Path) -> bytes:
    try:
        return os.fsencode(os.readlink(path))
    except OSError:
        return b""
