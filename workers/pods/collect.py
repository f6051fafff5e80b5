"""Reads what a dead guest has left: our program says what there is, we choose, and it sends that as a tar.

The tar goes through the extractor that judges uploads. Its members are called by their number in our own request, so
that nothing which comes out of a pod can name a file of ours; links, devices and files with two names are not asked
for.
"""

import io
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import BinaryIO, cast

from service.core.boundary import Artifact, ArtifactLimits, Artifacts, ArtifactSink, FileContent, SkippedArtifact, Usage
from service.core.errors import BoundaryLost, BundleRejected, QuotaExceeded, TooLarge
from service.core.names import written
from service.intake.archive import ArchiveCaps
from service.intake.members import Judge, Meter
from service.intake.tape import FileTape
from service.intake.tar import BLOCK_BYTES, read_headers
from workers.globs import Matcher
from workers.kube import ClusterError
from workers.pods.pod import Pod, shown
from workers.pods.protocol import Found, Listing, fetch_request, read_listing

_MAX_SKIPPED = 1000
_MAX_TOLD = 120_000
"""A little above the most files that any run may have: here they are counted, since no volume of a pod can do it."""
_MAX_LISTING_BYTES = 64 * 2**20
_DEEPEST = 64
"""As far as our program goes."""
_MORE_S = 5.0
_WHY_NOT = {"D": "directory", "L": "symlink", "P": "fifo", "S": "socket", "V": "device", "?": "not a regular file"}
_TOO_LARGE = "too large: the run's artifacts may come to no more"


@dataclass
class Chosen:
    """Which files to ask for, and what is said of the others."""

    paths: list[Found] = field(default_factory=list)
    kept: list[Found] = field(default_factory=list)
    expected: dict[str, Found] = field(default_factory=dict)
    absent: dict[str, FileContent] = field(default_factory=dict)
    skipped: list[SkippedArtifact] = field(default_factory=list)


def collect(
    pod: Pod, patterns: Sequence[str], *, limits: ArtifactLimits, sink: ArtifactSink, usage: Usage
) -> tuple[Artifacts, int]:
    """Ends the guest first. -> the artifacts, and how many files and directories there are. Raises BoundaryLost."""
    deadline = time.monotonic() + limits.seconds
    depth = str(min(limits.depth, _DEEPEST))
    try:
        said = _listing(pod, depth, limits)
    except BoundaryLost:  # it ends the guest too, but a guest may have been first
        pod.kill_guest()
        said = _listing(pod, depth, limits)
    listing = read_listing(said)
    chosen = choose(listing, patterns, limits)
    kept, contents = _fetched(pod, chosen, limits, sink, deadline=deadline)
    expected = chosen.absent | {path: contents[found.path] for path, found in chosen.expected.items()}
    artifacts = Artifacts(kept=tuple(kept), skipped=tuple(chosen.skipped), expected=expected, usage=usage)
    return artifacts, len(listing.found)


def _listing(pod: Pod, depth: str, limits: ArtifactLimits) -> bytes:
    seconds = limits.seconds + _MORE_S
    return pod.says("list", depth, str(_MAX_TOLD), most_bytes=_MAX_LISTING_BYTES, seconds=seconds)


def choose(listing: Listing, patterns: Sequence[str], limits: ArtifactLimits) -> Chosen:
    """PURE."""
    chosen = Chosen()
    by_path = {found.path: found for found in listing.found}
    for path in limits.expected:
        why = _expected_absent(by_path, path.encode(), max_bytes=limits.expected_bytes)
        if why is None:
            chosen.expected[path] = by_path[path.encode()]
        else:
            chosen.absent[path] = FileContent(absent_why=why)
    left_bytes = limits.total_bytes
    for found, why in _matching(listing, Matcher(patterns), limits.depth) if patterns else ():
        if len(chosen.skipped) >= _MAX_SKIPPED:
            break
        if len(chosen.kept) >= limits.count:
            chosen.skipped.append(_skipped(found, f"more than {limits.count} artifacts"))
            break
        if why is None and found.size > left_bytes:
            why = _TOO_LARGE
        if why is not None:
            chosen.skipped.append(_skipped(found, why))
            continue
        left_bytes -= found.size
        chosen.kept.append(found)
    if patterns and not listing.complete:
        chosen.skipped.append(SkippedArtifact(path=".", why=f"more than {_MAX_TOLD} files; nothing further was read"))
    chosen.paths = list({found.path: found for found in [*chosen.expected.values(), *chosen.kept]}.values())
    return chosen


def _skipped(found: Found, why: str) -> SkippedArtifact:
    return SkippedArtifact(path=written(found.path), why=why)


def _matching(listing: Listing, matcher: Matcher, max_depth: int) -> Iterator[tuple[Found, str | None]]:
    """What a pattern means, in order, each with why it is not taken."""
    for found in sorted(listing.found, key=lambda found: found.path.split(b"/")):
        path = os.fsdecode(found.path)
        if path.count("/") >= max_depth:
            continue
        if found.what == "D" and matcher.reaches_beneath(path):
            if path.count("/") + 1 >= max_depth:
                yield found, f"deeper than {max_depth}"
        elif matcher.matches(path):
            yield found, _why_not(found)


def _why_not(found: Found) -> str | None:
    """None for a regular file with one name: only that is what it seems to be."""
    if found.what != "F":
        return _WHY_NOT[found.what]
    return "hard link" if found.links != 1 else None


def _expected_absent(by_path: Mapping[bytes, Found], path: bytes, *, max_bytes: int) -> str | None:
    parts = path.split(b"/")
    for depth in range(1, len(parts)):
        parent = by_path.get(b"/".join(parts[:depth]))
        if parent is None or parent.what != "D":
            return "symlink" if parent is not None and parent.what == "L" else "absent"
    found = by_path.get(path)
    if found is None:
        return "absent"
    if found.what == "F" and found.links == 1 and found.size > max_bytes:
        return f"too large: more than {max_bytes} bytes"
    return _why_not(found)


def _fetched(
    pod: Pod, chosen: Chosen, limits: ArtifactLimits, sink: ArtifactSink, *, deadline: float
) -> tuple[list[Artifact], dict[bytes, FileContent]]:
    kept: list[Artifact] = []
    contents = {found.path: FileContent(absent_why="not readable") for found in chosen.expected.values()}
    if not chosen.paths:
        return kept, contents
    expected = {found.path for found in chosen.expected.values()}
    wanted = {found.path for found in chosen.kept}
    unsent = dict.fromkeys(wanted)
    try:
        with _sent(pod, chosen.paths, deadline=deadline) as (members, fd):
            for index, offset, size in members:
                found = chosen.paths[index]
                if found.path in expected:
                    contents[found.path] = FileContent(data=os.pread(fd, size, offset))
                if found.path in wanted:
                    del unsent[found.path]
                    artifact = _put(fd, offset, size, found, sink, limits)
                    if isinstance(artifact, Artifact):
                        kept.append(artifact)
                    else:
                        chosen.skipped.append(artifact)
    except BundleRejected as error:
        raise BoundaryLost(f"what came out of the pod is not what our program writes: {error}") from error
    by_path = {found.path: found for found in chosen.kept}
    chosen.skipped += [_skipped(by_path[path], "not readable") for path in unsent]
    return kept, contents


def _put(
    fd: int, offset: int, size: int, found: Found, sink: ArtifactSink, limits: ArtifactLimits
) -> Artifact | SkippedArtifact:
    with io.BufferedReader(_Part(fd, offset, size)) as source:
        try:
            digest, stored = sink.put(cast("BinaryIO", source), max_bytes=limits.total_bytes)
        except TooLarge:
            return _skipped(found, _TOO_LARGE)
        except QuotaExceeded:
            return _skipped(found, "storage quota")
    return Artifact(path=written(found.path), bytes=stored, sha256=digest)


@contextmanager
def _sent(pod: Pod, paths: Sequence[Found], *, deadline: float) -> Iterator[tuple[Iterator[tuple[int, int, int]], int]]:
    """The files asked for, on our disk under no name -> ((index, offset, size) of each, the descriptor). Raises
    BoundaryLost, BundleRejected."""
    most = sum(BLOCK_BYTES + found.size + BLOCK_BYTES for found in paths) + 4 * BLOCK_BYTES
    with tempfile.TemporaryFile() as spool:
        came = 0

        def take(stream: str, data: bytes) -> None:
            nonlocal came
            if stream == "stdout":
                came += len(data)
                if came <= most:
                    spool.write(data)

        request = [fetch_request([found.path for found in paths])]
        try:
            ended = pod.command(
                "fetch", stdin=request, on_output=take, stop=lambda: came > most, deadline=deadline + _MORE_S
            )
        except ClusterError as error:
            raise BoundaryLost(f"the artifacts cannot be asked for: {error}") from error
        if ended.why != "exited" or ended.exit_code != 0:
            raise BoundaryLost(f"the artifacts did not come: {shown(ended)}")
        spool.flush()
        yield _members(spool.fileno(), came, paths), spool.fileno()


def _members(fd: int, size: int, paths: Sequence[Found]) -> Iterator[tuple[int, int, int]]:
    """Judged as an upload is; and each is one that was asked for, of the size that it had."""
    total = sum(found.size for found in paths)
    caps = ArchiveCaps(total_bytes=total, file_bytes=total, entries=len(paths), depth=1, ratio=2**40)
    judge = Judge(caps, meter=Meter(caps, archive_bytes=size))
    for member in read_headers(FileTape(fd, size=size), judge):
        index = int(member.path) if member.path.isascii() and member.path.isdigit() else len(paths)
        if member.directory or index >= len(paths) or member.size != paths[index].size:
            raise BoundaryLost("what came out of the pod was not asked for")
        yield index, member.offset, member.size


class _Part(io.RawIOBase):
    """Some bytes of a file, to be read as if they were all of one."""

    def __init__(self, fd: int, offset: int, size: int) -> None:
        self._fd, self._at, self._left = fd, offset, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "bytearray | memoryview", /) -> int:  # type: ignore[override]
        data = os.pread(self._fd, min(len(buffer), self._left), self._at)
        buffer[: len(data)] = data
        self._at, self._left = self._at + len(data), self._left - len(data)
        return len(data)
