"""Reads what a dead guest has left. It runs after the last guest process is proven gone, and distrusts all it finds.

Everything starts at a descriptor of the run's /work and resolves beneath it, through no link (`open_beneath`). A
regular file with one name is copied; everything else is skipped, and said, whatever its name: it is written down by
the rule of `service.core.names`. Caps on files, bytes, depth and time; the reading of a hostile tree costs a bounded
amount.
"""

import errno
import os
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from service.core.boundary import Artifact, ArtifactLimits, ArtifactSink, FileContent, SkippedArtifact
from service.core.errors import QuotaExceeded, TooLarge
from service.core.names import written
from workers.boundaries.gvisor.mounts import open_beneath
from workers.globs import Matcher

_MAX_SKIPPED = 1000
_SPECIAL = {
    stat.S_IFLNK: "symlink",
    stat.S_IFDIR: "directory",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}
_REFUSED = {
    errno.ENOENT: "absent",
    errno.ENOTDIR: "absent",
    errno.ELOOP: "symlink",
    errno.ENXIO: "socket",
    errno.EACCES: "device",  # we are root: only `nodev` refuses us
}


@dataclass
class Collected:
    kept: list[Artifact] = field(default_factory=list)
    skipped: list[SkippedArtifact] = field(default_factory=list)
    expected: dict[str, FileContent] = field(default_factory=dict)


def collect_tree(root_fd: int, patterns: Sequence[str], *, limits: ArtifactLimits, sink: ArtifactSink) -> Collected:
    """Copy what matches a pattern into the sink, and read the files that expectations name."""
    collected = Collected()
    deadline = time.monotonic() + limits.seconds
    for path in limits.expected:
        if time.monotonic() > deadline:
            collected.expected[path] = FileContent(absent_why="out of time")
        else:
            collected.expected[path] = _read_expected(root_fd, path, max_bytes=limits.expected_bytes)
    if patterns:
        _copy_matches(root_fd, Matcher(patterns), limits, sink, collected, deadline=deadline)
    return collected


def _copy_matches(
    root_fd: int,
    matcher: Matcher,
    limits: ArtifactLimits,
    sink: ArtifactSink,
    collected: Collected,
    *,
    deadline: float,
) -> None:
    left_bytes = limits.total_bytes
    for path, found in _walk(root_fd, matcher, limits.depth, deadline=deadline):
        shown = written(os.fsencode(path))
        why: str | None
        if len(collected.kept) >= limits.count:
            collected.skipped.append(SkippedArtifact(path=shown, why=f"more than {limits.count} artifacts"))
            return
        if isinstance(found, str):
            why = found
        else:
            why, size, digest = _copy(root_fd, path, sink, max_bytes=left_bytes)
            if why is None:
                collected.kept.append(Artifact(path=shown, bytes=size, sha256=digest))
                left_bytes -= size
                continue
        collected.skipped.append(SkippedArtifact(path=shown, why=why))
        if len(collected.skipped) >= _MAX_SKIPPED:
            return


def _walk(
    root_fd: int, matcher: Matcher, max_depth: int, *, deadline: float
) -> Iterator[tuple[str, os.stat_result | str]]:
    """Entries that match, in order: (path, its status, or why it is skipped). Directories only as far as a pattern can
    match beneath them; links are never followed, not even to look."""
    pending: list[str] = [""]
    while pending:
        directory = pending.pop()
        if time.monotonic() > deadline:
            yield directory or ".", "out of time; nothing further was read"
            return
        try:
            fd = open_beneath(root_fd, directory or ".", os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            yield directory, f"not readable: {error.strerror}"
            continue
        try:
            with os.scandir(fd) as listing:
                names = sorted(entry.name for entry in listing)
            deeper: list[str] = []
            for name in names:
                path = f"{directory}/{name}" if directory else name
                found = os.stat(name, dir_fd=fd, follow_symlinks=False)
                is_directory = stat.S_ISDIR(found.st_mode)
                if is_directory and matcher.reaches_beneath(path):
                    if path.count("/") + 1 >= max_depth:
                        yield path, f"deeper than {max_depth}"
                    else:
                        deeper.append(path)
                elif matcher.matches(path):
                    yield path, _why_not(found) or found
            pending += reversed(deeper)
        finally:
            os.close(fd)


def _why_not(found: os.stat_result) -> str | None:
    """None for a regular file with one name: only that is what it seems to be."""
    if not stat.S_ISREG(found.st_mode):
        return _SPECIAL.get(stat.S_IFMT(found.st_mode), "not a regular file")
    return "hard link" if found.st_nlink != 1 else None


def _open_regular(root_fd: int, path: str) -> tuple[int, os.stat_result] | str:
    """A descriptor and its own status, judged after the opening; or why there is none."""
    try:
        fd = open_beneath(root_fd, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        return _REFUSED.get(error.errno or 0) or f"not readable: {error.strerror}"
    found = os.fstat(fd)
    why = _why_not(found)
    if why is not None:
        os.close(fd)
        return why
    return fd, found


def _copy(root_fd: int, path: str, sink: ArtifactSink, *, max_bytes: int) -> tuple[str | None, int, str]:
    """-> (why it was not copied, bytes, sha256)."""
    opened = _open_regular(root_fd, path)
    if isinstance(opened, str):
        return opened, 0, ""
    fd, found = opened
    with os.fdopen(fd, "rb") as source:
        if found.st_size > max_bytes:
            return "too large: the run's artifacts may come to no more", 0, ""
        try:
            digest, size = sink.put(source, max_bytes=max_bytes)
        except TooLarge:
            return "too large: the run's artifacts may come to no more", 0, ""
        except QuotaExceeded:
            return "storage quota", 0, ""
    return None, size, digest


def _read_expected(root_fd: int, path: str, *, max_bytes: int) -> FileContent:
    opened = _open_regular(root_fd, path)
    if isinstance(opened, str):
        return FileContent(absent_why=opened)
    with os.fdopen(opened[0], "rb") as source:
        data = source.read(max_bytes + 1)
    if len(data) > max_bytes:
        return FileContent(absent_why=f"too large: more than {max_bytes} bytes")
    return FileContent(data=data)


__all__ = ["Collected", "collect_tree"]
