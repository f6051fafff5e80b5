"""What this machine shows of a boundary, whatever kind it is: found by the name that stands in its control groups, its
command lines, its directories and its mounts. Nothing here asks the guest, and nothing here ends anything.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_LOOK_EVERY_S = 0.02


def processes(mark: str) -> list[str]:
    """Those in a control group with the mark in its name, and those started with it or working in it."""
    wanted, own, found = os.fsencode(mark), os.getpid(), []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit() or int(entry.name) == own:
            continue
        place = Path(entry.path)
        if any(wanted in text for text in (_read(place / "cgroup"), _read(place / "cmdline"), _link(place / "cwd"))):
            found.append(f"process {entry.name}")
    return found


def mounts(mark: str) -> list[str]:
    """In the mount namespaces of all processes, each namespace once."""
    wanted, found = os.fsencode(mark), []
    looked_at: set[bytes] = set()
    for entry in os.scandir("/proc"):
        namespace = _link(Path(entry.path) / "ns/mnt") if entry.name.isdigit() else b""
        if not namespace or namespace in looked_at:
            continue
        looked_at.add(namespace)
        lines = _read(Path(entry.path) / "mountinfo").splitlines()
        found += [f"mount {line.split(b' ')[4].decode('utf-8', 'replace')}" for line in lines if wanted in line]
    return found


def groups(mark: str) -> list[Path]:
    return [Path(top, name) for top, names, _ in os.walk(_CGROUPS) for name in names if mark in name]


@dataclass
class Peak:
    """The highest number of host threads seen. None: no control group of this host with the mark counts them."""

    tasks: int | None = None


@contextmanager
def watching_tasks(mark: str) -> Iterator[Peak]:
    """Samples, and asks the kernel's own high-water mark where it keeps one (Linux 6.1, pids.peak)."""
    peak, stop = Peak(), threading.Event()
    counters = [path / "pids.current" for path in groups(mark) if (path / "pids.current").exists()]

    def look(name: str) -> None:
        for counter in counters:
            text = _read(counter.with_name(name)).strip()
            if text.isdigit():
                peak.tasks = max(peak.tasks or 0, int(text))

    def keep_looking() -> None:
        while not stop.wait(_LOOK_EVERY_S):
            look("pids.current")

    thread = threading.Thread(target=keep_looking, name="conformance-tasks", daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
        look("pids.peak")


def _read(path: Path) -> bytes:
    """Empty for what has just gone."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _link(path: Path) -> bytes:
    try:
        return os.fsencode(os.readlink(path))
    except OSError:
        return b""
