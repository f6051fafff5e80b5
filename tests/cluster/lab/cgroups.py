"""One folder of the lab's own in every control group hierarchy of this machine, and all of its groups below that."""

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PREFIX = "blastdoor-lab-"
MINE = "system"
"""The group of the lab's own processes, beside those that the kubelet makes for pods."""
INHERITED = ("cpuset.cpus", "cpuset.mems")  # empty in a new group of version 1, which then takes no process
GONE_WITHIN_S = 20.0


def hierarchies() -> Iterator[Path]:
    """Where each hierarchy is mounted: several of version 1, one of version 2, or both kinds."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.split()[0] in {"cgroup", "cgroup2"}:
            yield Path(before.split()[4])


def make(group: str) -> None:
    """`group` as the kernel names it, "/blastdoor-lab-0123abcd"."""
    for root in hierarchies():
        for folder in (_in(root, group), _in(root, group) / MINE):
            folder.mkdir()
            for name in INHERITED:
                if (folder / name).exists():
                    (folder / name).write_text((folder.parent / name).read_text())


def sweep() -> None:
    """Removes what labs left that could not do it themselves: one whose owner was killed. None may be starting."""
    for name in {folder.name for root in hierarchies() for folder in root.glob(f"{PREFIX}*")}:
        if not processes(f"/{name}"):
            remove(f"/{name}")


def join(group: str) -> None:
    for root in hierarchies():
        (_in(root, group) / MINE / "cgroup.procs").write_text("0")


def processes(group: str) -> set[int]:
    found: set[int] = set()
    for root in hierarchies():
        for folder in _groups(_in(root, group)):
            with suppress(OSError):  # a pod's groups go while we look
                found.update(int(pid) for pid in (folder / "cgroup.procs").read_text().split())
    return found


def remove(group: str) -> None:
    """Waits for the last process in it, which is being ended, to be gone. TimeoutError when one stays."""
    deadline = time.monotonic() + GONE_WITHIN_S
    while left := processes(group):
        if time.monotonic() > deadline:
            raise TimeoutError(f"still in {group}: {sorted(left)}")
        time.sleep(0.02)
    for root in hierarchies():
        for folder in reversed(_groups(_in(root, group))):
            with suppress(FileNotFoundError):  # somebody else's sweep
                folder.rmdir()


def _in(root: Path, group: str) -> Path:
    return root / group.lstrip("/")


def _groups(folder: Path) -> list[Path]:
    """The group and all below it, from the top down; none when there is no such group."""
    return [Path(path) for path, _, _ in os.walk(folder)]
