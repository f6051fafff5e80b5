"""The structure of a zip, read strictly: who reads the central directory sees what who reads the stream sees.

The local entries must tile the file from its first byte to the central directory, the directory must reach to the end
record, and that to the end of the file: nothing can hide before, between, within or after. Refused although legal:
data descriptors, encryption, ZIP64 (whatever needs it is above the caps), members' comments, methods other than stored
and deflated. Sources: APPNOTE.TXT 6.3.10 sections 4.3 to 4.5; the rules that the Python Package Index has for uploads.
"""

import os
import stat
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from service.intake.members import ArchiveCaps, Judge, Member, Meter, rejected
from service.intake.tape import CHUNK_BYTES, INPUT_BYTES, truncated

LOCAL, CENTRAL, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_LOCAL = struct.Struct("<4xHH18xHH")
_CENTRAL = struct.Struct("<4xBBHHH4xIIIHHHHHII")
_END = struct.Struct("<4xHHHHIIH")
_END_BYTES, _LOCAL_BYTES, _CENTRAL_BYTES = 22, 30, 46
_MAX_COMMENT_BYTES = 0xFFFF
_MAX_VERSION = 63
_MAX_DIRECTORY_BYTES = 16 * 2**20
_ZIP64_16, _ZIP64_32 = 0xFFFF, 0xFFFFFFFF
_STORED, _DEFLATED = 0, 8
_LEVEL_FLAGS, _UTF8_FLAG, _DESCRIPTOR_FLAG = 0x0006, 0x0800, 0x0008
_ENCRYPTION_FLAGS = 0x0001 | 0x0040 | 0x2000
_MADE_ON_UNIX = (3, 19)
_DOS_DIRECTORY, _DOS_LABEL = 0x10, 0x08
_ZIP64_EXTRA, _UNICODE_PATH_EXTRA = 0x0001, 0x7075
_LINK_EXTRAS = frozenset({0x000D, 0x756E})
"""Old Unix extras that carry a mode and a link's target of their own."""


class _End(NamedTuple):
    at: int
    entries: int
    directory_bytes: int
    directory_at: int


class _Entry(NamedTuple):
    """One central directory header. `said`: the bytes that the local header must repeat (flags, method; CRC, sizes)."""

    raw: bytes
    said: bytes
    version: int
    flags: int
    method: int
    crc: int
    packed_size: int
    size: int
    mode: int
    dos_attributes: int
    local_at: int
    unicode_path: bool
    made_on_unix: bool


def looks_like_zip(head: bytes) -> bool:
    return head[:4] in (LOCAL, END)


def read_directory(fd: int, *, size: int, caps: ArchiveCaps, judge: Judge) -> list[Member]:
    """Every member, judged, in the order of the bytes; their content is not looked at yet. Raises BundleRejected."""
    end = _find_end(fd, size=size)
    if end.entries > caps.entries:
        raise rejected("count", f"has {end.entries} members; at most {caps.entries}")
    entries = sorted(_central_headers(fd, end), key=lambda entry: entry.local_at)
    members = []
    expected_at = 0
    for entry in entries:
        if entry.local_at != expected_at:
            raise rejected("overlap", "does not start where the member before it ends", member=entry.raw)
        offset = _check_local(fd, entry)
        expected_at = offset + entry.packed_size
        if expected_at > end.directory_at:
            raise rejected("overlap", "reaches into the central directory", member=entry.raw)
        directory = entry.raw.endswith(b"/")
        _check_type(entry, directory=directory)
        executable = entry.made_on_unix and bool(entry.mode & 0o100)
        member = judge.member(entry.raw, directory=directory, executable=executable, size=entry.size, offset=offset)
        assert member is not None  # only a tar names its root
        members.append(
            member._replace(packed_size=entry.packed_size, crc=entry.crc, deflated=entry.method == _DEFLATED)
        )
    if expected_at != end.directory_at:
        raise rejected("overlap", "has bytes between its last member and its central directory")
    return members


def content(fd: int, member: Member, meter: Meter) -> Iterator[bytes]:
    """A member's bytes, in pieces. Raises BundleRejected when they are not exactly what the headers say."""
    crc = produced = 0
    for piece in _inflated(fd, member) if member.deflated else _stored(fd, member):
        produced += len(piece)
        if produced > member.size:
            raise rejected("corrupt", f"expands beyond the {member.size} bytes that it declares", member=member.path)
        meter.add(len(piece))
        crc = zlib.crc32(piece, crc)
        yield piece
    if produced != member.size or crc != member.crc:
        raise rejected("corrupt", "does not have the size or the CRC that it declares", member=member.path)


def _stored(fd: int, member: Member) -> Iterator[bytes]:
    offset, left = member.offset, member.size
    while left:
        piece = os.pread(fd, min(left, CHUNK_BYTES), offset)
        if not piece:
            raise truncated()
        offset += len(piece)
        left -= len(piece)
        yield piece


def _inflated(fd: int, member: Member) -> Iterator[bytes]:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    offset, left, pending = member.offset, member.packed_size, b""
    while not inflater.eof:
        if not pending and left:
            pending = os.pread(fd, min(left, INPUT_BYTES), offset)
            offset += len(pending)
            left -= len(pending)
        try:
            piece = inflater.decompress(pending, CHUNK_BYTES)
        except zlib.error as error:
            raise rejected("corrupt", "is not sound deflate data", member=member.path) from error
        if not pending and not piece and not inflater.eof:
            raise rejected("corrupt", "is deflate data that was cut short", member=member.path)
        pending = inflater.unconsumed_tail
        if piece:
            yield piece
    if inflater.unused_data or pending or left:
        raise rejected("corrupt", "has bytes after the end of its deflate data", member=member.path)


def _find_end(fd: int, *, size: int) -> _End:
    """The end record: the last one there is, whose comment ends where the file ends."""
    tail_at = max(0, size - _END_BYTES - _MAX_COMMENT_BYTES)
    tail = os.pread(fd, size - tail_at, tail_at)
    found = tail.rfind(END)
    if found < 0 or len(tail) - found < _END_BYTES:
        raise rejected("corrupt", "ends without a zip's end record; it was cut short, or has bytes after it")
    disk, directory_disk, here, entries, directory_bytes, directory_at, comment_bytes = _END.unpack_from(tail, found)
    end_at = tail_at + found
    if found + _END_BYTES + comment_bytes != len(tail):
        raise rejected("trailing", "has bytes after its end record, or a comment of the wrong length")
    if _ZIP64_16 in (here, entries) or _ZIP64_32 in (directory_bytes, directory_at) or _has_zip64(fd, end_at):
        raise rejected("zip64", "is a ZIP64 archive; nothing that is accepted is large enough to need one")
    if disk or directory_disk or here != entries:
        raise rejected("header", "is one part of a zip in several parts")
    if directory_bytes > _MAX_DIRECTORY_BYTES:
        raise rejected("size", f"has a central directory of {directory_bytes} bytes; at most {_MAX_DIRECTORY_BYTES}")
    if directory_at + directory_bytes != end_at:
        raise rejected("overlap", "has bytes before, or a gap after, its central directory")
    return _End(end_at, entries, directory_bytes, directory_at)


def _has_zip64(fd: int, end_at: int) -> bool:
    return end_at >= 20 and os.pread(fd, 4, end_at - 20) == b"PK\x06\x07"


def _central_headers(fd: int, end: _End) -> Iterator[_Entry]:
    at = end.directory_at
    for _ in range(end.entries):
        header = os.pread(fd, _CENTRAL_BYTES, at)
        if len(header) < _CENTRAL_BYTES or header[:4] != CENTRAL:
            raise rejected("corrupt", "has a central directory that is not well-formed")
        (
            _, made_on, version, flags, method, crc, packed_size, size, name_bytes, extra_bytes, comment_bytes, disk, _,
            attributes, local_at,
        ) = _CENTRAL.unpack(header)  # fmt: skip
        text = os.pread(fd, name_bytes + extra_bytes, at + _CENTRAL_BYTES)
        at += _CENTRAL_BYTES + name_bytes + extra_bytes + comment_bytes
        if at > end.at:
            raise rejected("corrupt", "has a central directory that reaches beyond its declared end")
        raw, extra = text[:name_bytes], text[name_bytes:]
        if disk or comment_bytes or END in header or END in text:
            why = "has a comment, another disk or the mark of an end record in its central header"
            raise rejected("header", why, member=raw)
        if _ZIP64_32 in (packed_size, size, local_at):
            raise rejected(
                "zip64", "has ZIP64 sizes; nothing that is accepted is large enough to need them", member=raw
            )
        yield _Entry(
            raw, header[8:12] + header[16:28], version, flags, method, crc, packed_size, size, attributes >> 16,
            attributes & 0xFFFF, local_at, _check_extra(extra, raw), made_on in _MADE_ON_UNIX,
        )  # fmt: skip
    if at != end.at:
        raise rejected("corrupt", "has more in its central directory than the end record counts")


def _check_local(fd: int, entry: _Entry) -> int:
    """The local header must say what the central one says. -> where the member's bytes start."""
    header = os.pread(fd, _LOCAL_BYTES, entry.local_at)
    if len(header) < _LOCAL_BYTES or header[:4] != LOCAL:
        raise rejected("header", "has no local header where the central directory points", member=entry.raw)
    flags: int
    name_bytes: int
    extra_bytes: int
    version, flags, name_bytes, extra_bytes = _LOCAL.unpack(header)
    text = os.pread(fd, name_bytes + extra_bytes, entry.local_at + _LOCAL_BYTES)
    if len(text) < name_bytes + extra_bytes:
        raise truncated()
    raw, extra = text[:name_bytes], text[name_bytes:]
    if raw != entry.raw:
        raise rejected("header", "has another name in its local header", member=entry.raw)
    if max(version, entry.version) > _MAX_VERSION:
        raise rejected("header", "needs a later version of the format than is read here", member=raw)
    _check_flags(entry.flags | flags, raw)
    if header[6:10] + header[14:26] != entry.said:
        raise rejected("header", "has sizes, a CRC, flags or a method that differ in its two headers", member=raw)
    if entry.method not in (_STORED, _DEFLATED):
        why = f"is compressed by method {entry.method}; stored and deflated are accepted"
        raise rejected("method", why, member=raw)
    if entry.method == _STORED and entry.size != entry.packed_size:
        raise rejected("header", "is stored, with two sizes that do not agree", member=raw)
    unicode_path = _check_extra(extra, raw) and entry.unicode_path
    if not raw.isascii() and not flags & _UTF8_FLAG and not unicode_path:
        raise rejected("name", "has a name that is not ASCII, and is not marked as UTF-8", member=raw)
    return entry.local_at + _LOCAL_BYTES + name_bytes + extra_bytes


def _check_flags(flags: int, raw: bytes) -> None:
    if flags & _ENCRYPTION_FLAGS:
        raise rejected("encrypted", "is encrypted", member=raw)
    if flags & _DESCRIPTOR_FLAG:
        why = "has a data descriptor: its writer could not seek; write the zip to a file, or send a .tar.gz"
        raise rejected("descriptor", why, member=raw)
    if flags & ~(_LEVEL_FLAGS | _UTF8_FLAG):
        raise rejected("header", f"has flags that are not accepted ({flags:#06x})", member=raw)


def _check_extra(extra: bytes, raw: bytes) -> bool:
    """-> True when a Unicode path says the same name. Raises for what would make the member something else."""
    unicode_path = False
    at = 0
    while at < len(extra):
        if at + 4 > len(extra):
            raise rejected("header", "has an extra field that is not well-formed", member=raw)
        identity, length = struct.unpack_from("<HH", extra, at)
        value = extra[at + 4 : at + 4 + length]
        at += 4 + length
        if len(value) < length:
            raise rejected("header", "has an extra field that is not well-formed", member=raw)
        if identity == _ZIP64_EXTRA:
            raise rejected(
                "zip64", "has ZIP64 sizes; nothing that is accepted is large enough to need them", member=raw
            )
        if identity in _LINK_EXTRAS:
            raise rejected("header", "has an extra field that may describe a link", member=raw)
        if identity == _UNICODE_PATH_EXTRA:
            if unicode_path or value != b"\x01" + zlib.crc32(raw).to_bytes(4, "little") + raw:
                raise rejected("header", "has a second name that is not the first", member=raw)
            unicode_path = True
    return unicode_path


def _check_type(entry: _Entry, *, directory: bool) -> None:
    """The name's ending and both kinds of attributes must say one thing: a file, or a directory."""
    kind = stat.S_IFMT(entry.mode)
    if kind == stat.S_IFLNK:
        raise rejected("link", "is a symbolic link; only regular files and directories are accepted", member=entry.raw)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR) or entry.dos_attributes & _DOS_LABEL:
        raise rejected("type", "is a special file; only regular files and directories are accepted", member=entry.raw)
    says_directory = kind == stat.S_IFDIR or bool(entry.dos_attributes & _DOS_DIRECTORY)
    if kind == stat.S_IFREG if directory else says_directory:
        raise rejected("header", "is a directory by one header and a file by another", member=entry.raw)
    if directory and (entry.size or entry.packed_size or entry.crc):
        raise rejected("header", "is a directory with content", member=entry.raw)
