"""Archives made byte by byte, as no ordinary tool writes them. Any field can be wrong; left alone, all are right."""

import gzip
import os
import stat
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import zstandard

from service.intake.archive import ArchiveCaps, ArchiveSummary, unpack

POSIX, GNU = b"ustar\x0000", b"ustar  \x00"
CAPS = ArchiveCaps()

Tree = dict[str, tuple[int, bytes | None]]
"""Path to (permission bits, content); None for a directory."""


# --- tar -------------------------------------------------------------------------------------------------------------


def tar_header(
    name: bytes = b"a.txt", *, size: int = 0, kind: bytes = b"0", mode: int = 0o644, magic: bytes = POSIX,
    prefix: bytes = b"", link: bytes = b"", patch: Mapping[int, bytes] | None = None, checksum: int | None = None,
) -> bytes:  # fmt: skip
    """`patch`: bytes by offset, written before the checksum is computed. `checksum`: instead of the right one."""
    block = bytearray(512)
    block[0 : len(name)] = name
    block[100:108] = b"%07o\0" % mode
    block[108:116] = block[116:124] = b"%07o\0" % 0
    block[124:136] = b"%011o\0" % size
    block[136:148] = b"%011o\0" % 0
    block[156:157] = kind
    block[157 : 157 + len(link)] = link
    block[257:265] = magic
    block[345 : 345 + len(prefix)] = prefix
    for offset, data in (patch or {}).items():
        block[offset : offset + len(data)] = data
    assert len(block) == 512
    return with_checksum(bytes(block), checksum)


def with_checksum(block: bytes, checksum: int | None = None) -> bytes:
    right = sum(block[:148]) + 8 * 0x20 + sum(block[156:512])
    return block[:148] + b"%06o\0 " % (right if checksum is None else checksum) + block[156:]


def tar_member(name: bytes = b"a.txt", content: bytes = b"", **fields: object) -> bytes:
    header = tar_header(name, **{"size": len(content)} | fields)  # type: ignore[arg-type]
    return header + padded(content)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def directory(name: bytes) -> bytes:
    return tar_header(name, kind=b"5", mode=0o755)


def pax_record(key: bytes, value: bytes) -> bytes:
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest) + len(str(len(rest)))
    if len(str(length)) + len(rest) != length:
        length += 1
    return str(length).encode() + rest


def pax(*records: bytes, kind: bytes = b"x") -> bytes:
    return tar_member(b"PaxHeaders/a", b"".join(records), kind=kind)


def long_name(name: bytes) -> bytes:
    return tar_member(b"././@LongLink", name + b"\0", kind=b"L", magic=GNU)


def tar(*members: bytes, end: bytes = bytes(1024)) -> bytes:
    return b"".join(members) + end


def gzipped(data: bytes) -> bytes:
    return gzip.compress(data, 6, mtime=0)


def zstandarded(data: bytes, *, window_log: int | None = None) -> bytes:
    if window_log is None:
        return zstandard.ZstdCompressor(write_checksum=True).compress(data)
    parameters = zstandard.ZstdCompressionParameters(window_log=window_log, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return stream.compress(data) + stream.flush()


# --- zip -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ZipMember:
    """`local` overrides fields of the local header only: flags, method, crc, packed, size, name, extra."""

    name: bytes = b"a.txt"
    content: bytes = b""
    deflate: bool = True
    method: int | None = None
    flags: int = 0
    version: int = 20
    crc: int | None = None
    size: int | None = None
    packed_size: int | None = None
    mode: int = stat.S_IFREG | 0o644
    dos: int = 0
    made_on: int = 3
    extra: bytes = b""
    comment: bytes = b""
    disk: int = 0
    packed: bytes | None = None
    after: bytes = b""
    offset: int | None = None
    local: Mapping[str, object] = field(default_factory=dict)

    def data(self) -> bytes:
        if self.packed is not None:
            return self.packed
        if not self.deflate:
            return self.content
        compressor = zlib.compressobj(6, zlib.DEFLATED, -15)
        return compressor.compress(self.content) + compressor.flush()

    def values(self) -> dict[str, object]:
        return {
            "flags": self.flags,
            "method": (8 if self.deflate else 0) if self.method is None else self.method,
            "crc": zlib.crc32(self.content) if self.crc is None else self.crc,
            "packed": len(self.data()) if self.packed_size is None else self.packed_size,
            "size": len(self.content) if self.size is None else self.size,
            "name": self.name,
            "extra": self.extra,
        }


def zip_directory(name: bytes, **fields: object) -> ZipMember:
    return ZipMember(name=name, **{"deflate": False, "mode": stat.S_IFDIR | 0o755, "dos": 0x10} | fields)  # type: ignore[arg-type]


def zip_archive(
    *members: ZipMember, prefix: bytes = b"", gap: bytes = b"", before_end: bytes = b"", comment: bytes = b"",
    suffix: bytes = b"", count: int | None = None, comment_bytes: int | None = None, directory_at: int | None = None,
    disk: int = 0,
) -> bytes:  # fmt: skip
    """`prefix`: before the first member, offsets adjusted to it; `gap`: before the central directory."""
    out, central = bytearray(prefix), bytearray()
    for member in members:
        told = member.values()
        offset = len(out) if member.offset is None else member.offset
        out += _local_header(told | dict(member.local)) + member.data() + member.after
        central += _central_header(told, member, offset)
    out += gap
    total = len(members) if count is None else count
    at = len(out) if directory_at is None else directory_at
    length = len(comment) if comment_bytes is None else comment_bytes
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", disk, disk, total, total, len(central), at, length)
    return bytes(out + central) + before_end + end + comment + suffix


def _local_header(told: Mapping[str, object]) -> bytes:
    name, extra = told["name"], told["extra"]
    assert isinstance(name, bytes)
    assert isinstance(extra, bytes)
    fields = (told["flags"], told["method"], 0, 0x21, told["crc"], told["packed"], told["size"], len(name), len(extra))
    return struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", 20, *fields) + name + extra


def _central_header(told: Mapping[str, object], member: ZipMember, offset: int) -> bytes:
    name, extra = told["name"], told["extra"]
    assert isinstance(name, bytes)
    assert isinstance(extra, bytes)
    lengths = (len(name), len(extra), len(member.comment), member.disk, 0, member.mode << 16 | member.dos, offset)
    fields = (told["flags"], told["method"], 0, 0x21, told["crc"], told["packed"], told["size"])
    head = struct.pack("<4sBBHHHHHIIIHHHHHII", b"PK\x01\x02", 20, member.made_on, member.version, *fields, *lengths)
    return head + name + extra + member.comment


def extra_field(identity: int, value: bytes) -> bytes:
    return struct.pack("<HH", identity, len(value)) + value


# --- what becomes of them --------------------------------------------------------------------------------------------


def write(directory_path: Path, data: bytes) -> Path:
    path = directory_path / "upload"
    path.write_bytes(data)
    return path


def unpack_into(root: Path, archive: Path, caps: ArchiveCaps = CAPS) -> ArchiveSummary:
    root.mkdir(mode=0o700)
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return unpack(archive, fd, caps)
    finally:
        os.close(fd)


def tree(root: Path) -> Tree:
    """Everything beneath root, by lstat: a link or a special file is an error."""
    found: Tree = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        assert stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode), path
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else None
        found[str(path.relative_to(root))] = (stat.S_IMODE(status.st_mode), content)
    return found
