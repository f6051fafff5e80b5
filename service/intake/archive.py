"""Our own extractor. Regular files and directories only; reject and say which member and which rule, never sanitise.

zip, tar, tar.gz and tar.zst are told apart by their first bytes, never by a name. The whole set of headers is judged
before anything is written. The stable words of `BundleRejected.rule`:

    format, corrupt, trailing, header, overlap, zip64, encrypted, descriptor, method    what the archive is
    path, name, depth, duplicate, clash, link, type                                     what a member is
    count, size, bomb, cpu                                                              what it would cost

Memory stays below about 32 MiB whatever the archive is; reading stops as soon as a rule is broken.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from service.intake import zip as zip_format
from service.intake.beneath import Beneath, open_archive
from service.intake.members import ArchiveCaps, ArchiveSummary, Judge, Member, Meter, rejected
from service.intake.tape import FileTape, Kept, StreamTape, Tape, gunzip, unzstd
from service.intake.tar import BLOCK_BYTES, looks_like_tar, read_headers

__all__ = ["ArchiveCaps", "ArchiveSummary", "Maker", "inspect", "lay_out", "read_member", "unpack"]

_KEPT_BYTES = 8 * 2**20
_NO_CAPS = ArchiveCaps(
    total_bytes=2**50, file_bytes=2**50, entries=2**31, depth=2**10, name_bytes=2**16, path_bytes=2**16, ratio=2**40,
    cpu_s=120.0,
)  # fmt: skip
"""For an archive that was judged by the caps that hold where it came in."""
_OTHERS = {
    b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!": "rar", b"PK\x07\x08": "a split zip",
    b"!<arch>\n": "an ar archive", b"070701": "cpio",
}  # fmt: skip


class _Format(StrEnum):
    ZIP = "zip"
    TAR = "tar"
    GZIP = "tar.gz"
    ZSTD = "tar.zst"


@dataclass(frozen=True)
class _Opened:
    """An archive that is open for one question: its descriptor, its size, and what may be spent on it."""

    path: Path
    fd: int
    size: int
    format: _Format
    caps: ArchiveCaps

    def meter(self) -> Meter:
        return Meter(self.caps, archive_bytes=self.size)

    def judge(self, meter: Meter) -> Judge:
        return Judge(self.caps, meter=meter)

    def chunks(self, meter: Meter) -> Iterator[bytes]:
        return (gunzip if self.format is _Format.GZIP else unzstd)(self.fd, size=self.size, meter=meter)

    def tape(self, meter: Meter) -> Tape:
        if self.format is _Format.TAR:
            return FileTape(self.fd, size=self.size)
        return StreamTape(self.chunks(meter))


def inspect(path: Path, caps: ArchiveCaps) -> ArchiveSummary:
    """Judge the whole archive, its content and checksums too, writing nothing. Raises BundleRejected."""
    with _opened(path, caps) as archive:
        meter = archive.meter()
        judge = archive.judge(meter)
        if archive.format is _Format.ZIP:
            for member in zip_format.read_directory(archive.fd, size=archive.size, caps=caps, judge=judge):
                for _ in zip_format.content(archive.fd, member, meter):
                    pass
        else:
            for _ in read_headers(archive.tape(meter), judge):
                pass
        return judge.summary(judge.declared_bytes)


def read_member(path: Path, name: str, *, max_bytes: int) -> bytes | None:
    """One regular file of an archive that `inspect` has accepted; None when absent. Raises BundleRejected if
    larger."""
    with _opened(path, _NO_CAPS) as archive:
        meter = archive.meter()
        judge = archive.judge(meter)
        if archive.format is _Format.ZIP:
            for member in zip_format.read_directory(archive.fd, size=archive.size, caps=_NO_CAPS, judge=judge):
                if _is_wanted(member, name, max_bytes=max_bytes):
                    return b"".join(zip_format.content(archive.fd, member, meter))
            return None
        tape = archive.tape(meter)
        for member in read_headers(tape, judge):
            if _is_wanted(member, name, max_bytes=max_bytes):
                return b"".join(tape.pieces(member.size))
        return None


def unpack(path: Path, directory_fd: int, caps: ArchiveCaps, *, owner: tuple[int, int] | None = None) -> ArchiveSummary:
    """Judge again, then create every member beneath an open, empty directory, with openat2 (RESOLVE_BENEATH,
    RESOLVE_NO_SYMLINKS, RESOLVE_NO_XDEV), O_EXCL, O_NOFOLLOW; modes become 0644 or 0755 (the owner's executable bit
    is kept), directories 0755; `owner` (uid, gid) of all that is made. Times, owners and attributes are not kept.

    Raises BundleRejected; OSError when the directory cannot take it (full, not empty, no openat2). What was made until
    then is left there: the caller destroys the directory.
    """
    with Beneath(directory_fd, owner=owner) as beneath:
        return lay_out(path, beneath, caps)


class Maker(Protocol):
    """What makes the members somewhere. Paths are canonical; a parent that was not made yet is made first."""

    def make_directory(self, path: str) -> None: ...

    def make_file(self, path: str, pieces: Iterable[bytes | memoryview], *, executable: bool) -> int:
        """-> how many bytes there were in the pieces."""
        ...


def lay_out(path: Path, maker: Maker, caps: ArchiveCaps) -> ArchiveSummary:
    """Judge again, then have every member made. Raises BundleRejected, and what the maker raises."""
    with _opened(path, caps) as archive:
        meter = archive.meter()
        judge = archive.judge(meter)
        if archive.format is _Format.ZIP:
            members = zip_format.read_directory(archive.fd, size=archive.size, caps=caps, judge=judge)
            written = _make_from_zip(maker, archive, members, meter)
        else:
            written = _make_from_tar(maker, archive, judge, meter)
        return judge.summary(written)


def _make_from_zip(maker: Maker, archive: _Opened, members: list[Member], meter: Meter) -> int:
    written = 0
    for member in members:
        meter.tick()
        if member.directory:
            maker.make_directory(member.path)
        else:
            pieces = zip_format.content(archive.fd, member, meter)
            written += maker.make_file(member.path, pieces, executable=member.executable)
    return written


def _make_from_tar(maker: Maker, archive: _Opened, judge: Judge, meter: Meter) -> int:
    """Two passes: the headers, then the content. Between them stand the judged names: the second reads no header."""
    if archive.format is _Format.TAR:
        members = list(read_headers(archive.tape(meter), judge))
        return _make_members(maker, members, archive.tape(meter), meter)
    kept = Kept(archive.chunks(meter), directory=archive.path.parent, memory_bytes=_KEPT_BYTES)
    try:
        members = list(read_headers(StreamTape(iter(kept)), judge))
        second = meter.again()
        return _make_members(maker, members, kept.tape() or archive.tape(second), second)
    finally:
        kept.close()


def _make_members(maker: Maker, members: list[Member], tape: Tape, meter: Meter) -> int:
    written = 0
    for member in members:
        meter.tick()
        if member.directory:
            maker.make_directory(member.path)
        else:
            tape.skip(member.offset - tape.position)
            written += maker.make_file(member.path, tape.pieces(member.size), executable=member.executable)
    return written


def _is_wanted(member: Member, name: str, *, max_bytes: int) -> bool:
    if member.path != name or member.directory:
        return False
    if member.size > max_bytes:
        raise rejected("size", f"is {member.size} bytes; at most {max_bytes}", member=name)
    return True


@contextmanager
def _opened(path: Path, caps: ArchiveCaps) -> Iterator[_Opened]:
    fd = open_archive(path)
    try:
        size = os.fstat(fd).st_size
        yield _Opened(path, fd, size, _recognised(os.pread(fd, BLOCK_BYTES, 0)), caps)
    finally:
        os.close(fd)


def _recognised(head: bytes) -> _Format:
    if zip_format.looks_like_zip(head):
        return _Format.ZIP
    if head[:2] == b"\x1f\x8b":
        return _Format.GZIP
    if head[:4] == b"\x28\xb5\x2f\xfd":
        return _Format.ZSTD
    if looks_like_tar(head):
        return _Format.TAR
    found = next((name for magic, name in _OTHERS.items() if head.startswith(magic)), "not an archive that is known")
    raise rejected("format", f"is {found}; .zip, .tar, .tar.gz and .tar.zst are accepted")
