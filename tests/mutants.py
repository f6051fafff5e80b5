"""Sound archives, ways to damage them, and the oracle that any extractor of ours must satisfy on what comes out.

The oracle: either `BundleRejected`, or accepted, with a tree that is exactly what the standard library reads from the
same bytes. Never another exception, nothing outside the root, nothing in it but regular files and directories.
"""

import gzip
import io
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path

import zstandard

from service.core.errors import BundleRejected
from service.intake.archive import ArchiveCaps, inspect
from tests.archives import (
    GNU,
    ZipMember,
    directory,
    extra_field,
    gzipped,
    long_name,
    pax,
    pax_record,
    tar,
    tar_member,
    tree,
    unpack_into,
    with_checksum,
    zip_archive,
    zip_directory,
    zstandarded,
)

CAPS = ArchiveCaps(total_bytes=2**20, file_bytes=2**19, entries=200, ratio_floor_bytes=2**18, cpu_s=5.0)

TARS = (
    tar(
        directory(b"./"),
        tar_member(b"./a.txt", b"hello"),
        directory(b"./d"),
        tar_member(b"./d/b.sh", b"x" * 700, mode=0o755),
    ),
    tar(
        pax(pax_record(b"comment", b"0123456789"), kind=b"g"),
        pax(pax_record(b"path", b"p/" + b"n" * 120), pax_record(b"mtime", b"1.5")),
        tar_member(b"short", b"pax"),
        pax(pax_record(b"size", b"4")),
        tar_member(b"sized", b"four"),
    ),
    tar(
        long_name(b"l/" + b"n" * 120), tar_member(b"l/", b"gnu", magic=GNU), tar_member(b"f", b"in", prefix=b"pre/fix")
    ),
    tar(tar_member(b"old", b"type", kind=b"\0"), tar_member(b"empty"), directory(b"e/")) + bytes(2048),
)
ZIPS = (
    zip_archive(ZipMember(b"a.txt", b"hello " * 20), zip_directory(b"d/"), ZipMember(b"d/b", b"stored", deflate=False)),
    zip_archive(
        ZipMember("é".encode(), b"utf-8", flags=0x0800),
        ZipMember(b"x.sh", b"", extra=extra_field(0x5455, b"\1abcd")),
        comment=b"commit",
    ),
    zip_archive(),
)


class Wrapping(StrEnum):
    PLAIN = "plain"
    GZIP = "gzip"
    ZSTD = "zstd"


WRAP: dict[Wrapping, Callable[[bytes], bytes]] = {
    Wrapping.PLAIN: bytes,
    Wrapping.GZIP: gzipped,
    Wrapping.ZSTD: zstandarded,
}

Edit = tuple[int, int, int, bytes]
"""Which damage, two places (taken modulo the length), and bytes to put there."""
TOKENS = (
    b"../", b"/", b"\\", b"./", b"\0", b"\xff", b"..", b"C:", b"5", b"2", b"L", b"x", b"g", b"ustar  \0",
    b"ustar\x0000", b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"\x08\0", b"path=../x", b"00000001000\0", b"\x80",
    bytes(512),
)  # fmt: skip


def damaged(data: bytes, edits: Sequence[Edit]) -> bytes:
    out = bytearray(data)
    for which, first, second, some in edits:
        at = first % (len(out) + 1)
        to = second % (len(out) + 1)
        match which % 7:
            case 0 if out:
                out[at % len(out)] ^= 1 << second % 8
            case 1:
                out[at : at + len(some)] = some
            case 2:
                out[at:at] = some
            case 3:
                del out[at : at + second % 600]
            case 4:
                out[to:to] = out[at : at + 512]
            case 5:
                del out[at:]
            case 6:
                token = TOKENS[second % len(TOKENS)]
                out[at : at + len(token)] = token
    return bytes(out)


def with_checksums(data: bytes) -> bytes:
    """Make the checksum of every block that looks like a tar header right again, so that damage is read further."""
    blocks = [data[at : at + 512] for at in range(0, len(data), 512)]
    return b"".join(with_checksum(b) if len(b) == 512 and b[257:262] == b"ustar" else b for b in blocks)


def judge(data: bytes, scratch: Path) -> bool:
    """Put one archive before the extractor, in an empty directory. -> whether it was accepted."""
    upload, root = scratch / "upload", scratch / "root"
    upload.write_bytes(data)
    try:
        detail = ""
        try:
            told = inspect(upload, CAPS)
        except BundleRejected as refused:
            told, detail = None, refused.detail
        assert detail.isprintable()
        assert len(detail) < 600
        try:
            made = unpack_into(root, upload, CAPS)
        except BundleRejected:
            made = None
        assert made == told, f"inspect says {told}, unpack says {made}"
        assert sorted(path.name for path in scratch.iterdir()) == ["root", "upload"]
        found = {name: content for name, (_, content) in tree(root).items()}
        if told is None:
            return False
        expected = as_the_standard_library_reads_it(data)
        assert found == expected, f"made {found!r}, the standard library reads {expected!r}"
        assert told.entries == len(found)
        return True
    finally:
        shutil.rmtree(root, ignore_errors=True)


def as_the_standard_library_reads_it(data: bytes) -> dict[str, bytes | None]:
    found: dict[str, bytes | None] = {}
    if data[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for info in archive.infolist():
                assert not stat.S_ISLNK(info.external_attr >> 16)
                found[info.filename.rstrip("/")] = None if info.is_dir() else archive.read(info)
    else:
        with tarfile.open(fileobj=io.BytesIO(_decompressed(data)), mode="r:") as archive:
            for member in archive.getmembers():
                assert member.isreg() or member.isdir()
                content = archive.extractfile(member) if member.isreg() else None
                name = member.name.removeprefix("./")
                if name != ".":
                    found[name] = content.read() if content else None
    for name in list(found):
        while "/" in name:
            name = name.rpartition("/")[0]
            found.setdefault(name, None)
    return found


def _decompressed(data: bytes) -> bytes:
    if data[:2] == b"\x1f\x8b":
        return gzip.decompress(data)
    if data[:4] == b"\x28\xb5\x2f\xfd":
        return zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True).read()
    return data
