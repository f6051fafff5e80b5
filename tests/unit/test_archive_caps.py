"""What an archive may cost, and what may be around the tar: compressed formats, bombs, caps, time and memory."""

import gzip
import io
import stat
import time
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import zstandard

from service.core.errors import BundleRejected
from service.intake.archive import ArchiveCaps, inspect
from tests.archives import (
    CAPS,
    ZipMember,
    directory,
    gzipped,
    padded,
    tar,
    tar_header,
    tar_member,
    unpack_into,
    write,
    zip_archive,
    zstandarded,
)

pytestmark = pytest.mark.unit

SOUND = tar(tar_member(b"a.txt", b"hello" * 1000), tar_member(b"b.txt", bytes(range(256)) * 50))
MIB = 2**20


@dataclass(frozen=True)
class Case:
    why: str
    rule: str
    hostile: bytes
    sound: bytes


def _zstd_frame(*, header: bytes, blocks: bytes) -> bytes:
    return b"\x28\xb5\x2f\xfd" + header + blocks


def _raw_block(data: bytes, *, last: bool = True, kind: int = 0, size: int | None = None) -> bytes:
    word = (len(data) if size is None else size) << 3 | kind << 1 | last
    return word.to_bytes(3, "little") + data


WRAPPED = [
    Case("two gzip members", "trailing", gzipped(SOUND) + gzipped(SOUND), gzipped(SOUND)),
    Case("a tar in two gzip members", "trailing", gzipped(SOUND[:1024]) + gzipped(SOUND[1024:]), gzipped(SOUND)),
    Case("bytes after the gzip", "trailing", gzipped(SOUND) + b"x", gzipped(SOUND)),
    Case("zeros after the gzip", "trailing", gzipped(SOUND) + bytes(512), gzipped(SOUND)),
    Case("a gzip cut by one byte", "corrupt", gzipped(SOUND)[:-1], gzipped(SOUND)),
    Case("a gzip cut in half", "corrupt", gzipped(SOUND)[: len(gzipped(SOUND)) // 2], gzipped(SOUND)),
    Case("a gzip of two bytes", "corrupt", b"\x1f\x8b", gzipped(SOUND)),
    Case("a wrong gzip CRC", "corrupt", gzipped(SOUND)[:-8] + bytes(4) + gzipped(SOUND)[-4:], gzipped(SOUND)),
    Case("a wrong gzip length", "corrupt", gzipped(SOUND)[:-4] + bytes(4), gzipped(SOUND)),
    Case("a gzip of text", "format", gzipped(b"hello"), gzipped(SOUND)),
    Case("a gzip of a page of text", "format", gzipped(b"hello " * 500), gzipped(SOUND)),
    Case("a gzip of a gzip", "format", gzipped(gzipped(SOUND)), gzipped(SOUND)),
    Case("two zstd frames", "trailing", zstandarded(SOUND) + zstandarded(SOUND), zstandarded(SOUND)),
    Case("bytes after the zstd", "trailing", zstandarded(SOUND) + b"x", zstandarded(SOUND)),
    Case(
        "a skippable frame after it",
        "trailing",
        zstandarded(SOUND) + b"\x50\x2a\x4d\x18" + bytes(4),
        zstandarded(SOUND),
    ),
    Case("a zstd cut by one byte", "corrupt", zstandarded(SOUND)[:-1], zstandarded(SOUND)),
    Case("a zstd cut in half", "corrupt", zstandarded(SOUND)[: len(zstandarded(SOUND)) // 2], zstandarded(SOUND)),
    Case("a wrong zstd checksum", "corrupt", zstandarded(SOUND)[:-4] + bytes(4), zstandarded(SOUND)),
    Case("a zstd window of 128 MiB", "format", zstandarded(SOUND, window_log=27), zstandarded(SOUND, window_log=23)),
    Case(
        "a zstd dictionary",
        "format",
        _zstd_frame(header=b"\x01\x50\x07", blocks=_raw_block(SOUND)),
        _zstd_frame(header=b"\x00\x50", blocks=_raw_block(SOUND)),
    ),
    Case(
        "a wrong zstd content size",
        "corrupt",
        _zstd_frame(header=b"\x60" + (len(SOUND) - 257).to_bytes(2, "little"), blocks=_raw_block(SOUND)),
        _zstd_frame(header=b"\x60" + (len(SOUND) - 256).to_bytes(2, "little"), blocks=_raw_block(SOUND)),
    ),
    Case(
        "a reserved zstd block",
        "corrupt",
        _zstd_frame(header=b"\x00\x50", blocks=_raw_block(SOUND, kind=3)),
        _zstd_frame(header=b"\x00\x50", blocks=_raw_block(SOUND)),
    ),
    Case(
        "no last zstd block",
        "corrupt",
        _zstd_frame(header=b"\x00\x50", blocks=_raw_block(SOUND, last=False)),
        _zstd_frame(header=b"\x00\x50", blocks=_raw_block(SOUND, last=False) + _raw_block(b"")),
    ),
    Case("bzip2", "format", b"BZh9" + bytes(600), SOUND),
    Case("xz", "format", b"\xfd7zXZ\x00" + bytes(600), SOUND),
    Case("text", "format", b"#!/bin/sh\necho not an archive\n" * 50, SOUND),
    Case("nothing", "format", b"", SOUND),
    Case("one byte", "format", b"P", SOUND),
    Case("an old tar without a magic", "format", tar(tar_header(magic=bytes(8))), tar(tar_header())),
]


@pytest.mark.parametrize("case", WRAPPED, ids=lambda case: case.why)
def test_what_is_around_the_tar_must_be_one_sound_whole(case: Case, tmp_path: Path) -> None:
    path = write(tmp_path, case.hostile)
    with pytest.raises(BundleRejected) as refused:
        inspect(path, CAPS)
    assert refused.value.rule == case.rule, refused.value.detail
    with pytest.raises(BundleRejected):
        unpack_into(tmp_path / "root", path)
    assert list((tmp_path / "root").iterdir()) == []
    assert inspect(write(tmp_path, case.sound), CAPS).entries > 0


FEW = ArchiveCaps(total_bytes=5000, file_bytes=3000, entries=5, depth=4)
FORMATS: list[Callable[[bytes], bytes]] = [bytes, gzipped, zstandarded]

LIMITED = [
    Case("a file too large", "size", tar(tar_member(b"a", b"x" * 3001)), tar(tar_member(b"a", b"x" * 3000))),
    Case(
        "too much in all",
        "size",
        tar(tar_member(b"a", b"x" * 2500), tar_member(b"b", b"x" * 2501)),
        tar(tar_member(b"a", b"x" * 2500), tar_member(b"b", b"x" * 2500)),
    ),
    Case(
        "too many files",
        "count",
        tar(*(tar_header(b"f%d" % n) for n in range(6))),
        tar(*(tar_header(b"f%d" % n) for n in range(5))),
    ),
    Case(
        "too many directories that are only implied",
        "count",
        tar(tar_header(b"a/b/c"), tar_header(b"d/e/f")),
        tar(tar_header(b"a/b/c"), tar_header(b"a/b/d"), directory(b"a")),
    ),
    Case("too deep", "depth", tar(tar_header(b"a/b/c/d/e")), tar(tar_header(b"a/b/c/d"))),
    Case(
        "too large, in a zip",
        "size",
        zip_archive(ZipMember(b"a", b"x" * 3001)),
        zip_archive(ZipMember(b"a", b"x" * 3000)),
    ),
    Case(
        "too many, in a zip",
        "count",
        zip_archive(*(ZipMember(b"f%d" % n) for n in range(6))),
        zip_archive(*(ZipMember(b"f%d" % n) for n in range(5))),
    ),
    Case(
        "too many implied, in a zip",
        "count",
        zip_archive(ZipMember(b"a/b/c"), ZipMember(b"d/e/f")),
        zip_archive(ZipMember(b"a/b/c"), ZipMember(b"a/b/d")),
    ),
]


@pytest.mark.parametrize("case", LIMITED, ids=lambda case: case.why)
def test_a_cap_is_the_most_that_is_accepted(case: Case, tmp_path: Path) -> None:
    for packed in [bytes] if case.hostile.startswith(b"PK") else FORMATS:
        with pytest.raises(BundleRejected) as refused:
            inspect(write(tmp_path, packed(case.hostile)), FEW)
        assert refused.value.rule == case.rule, refused.value.detail
        assert inspect(write(tmp_path, packed(case.sound)), FEW).entries > 0


def _gzip_bomb(head: bytes, size: int) -> bytes:
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=1, mtime=0) as stream:
        stream.write(head)
        for _ in range(size // MIB):
            stream.write(bytes(MIB))
    return out.getvalue()


def _zstd_rle_bomb(head: bytes, size: int) -> bytes:
    """128 KiB of zeros from every four bytes."""
    blocks = _raw_block(padded(head), last=False)
    blocks += _raw_block(b"\0", last=False, kind=1, size=128 * 1024) * (size // (128 * 1024))
    return _zstd_frame(header=b"\x00\x50", blocks=blocks + _raw_block(b""))


def _zip_bomb(size: int, *, declared: int) -> bytes:
    compressor = zlib.compressobj(1, zlib.DEFLATED, -15)
    packed = b"".join(compressor.compress(bytes(MIB)) for _ in range(size // MIB)) + compressor.flush()
    return zip_archive(ZipMember(b"zeros", packed=packed, size=declared))


BOMBS = [
    ("a gzip that declares it", "bomb", lambda: _gzip_bomb(tar_header(b"zeros", size=128 * MIB), 128 * MIB)),
    ("a gzip of zeros after a tar's end", "bomb", lambda: _gzip_bomb(SOUND, 100 * MIB)),
    ("a gzip of nothing but zeros", "bomb", lambda: _gzip_bomb(b"", 100 * MIB)),
    ("a zstd that declares it", "bomb", lambda: _zstd_rle_bomb(tar_header(b"zeros", size=128 * MIB), 128 * MIB)),
    ("a zstd of zeros after a tar's end", "bomb", lambda: _zstd_rle_bomb(SOUND, 1024 * MIB)),
    ("a zip that declares it", "bomb", lambda: _zip_bomb(128 * MIB, declared=128 * MIB)),
    ("a zip that lies", "corrupt", lambda: _zip_bomb(128 * MIB, declared=1000)),
]


@pytest.mark.parametrize(("rule", "bomb"), [b[1:] for b in BOMBS], ids=[b[0] for b in BOMBS])
def test_a_bomb_is_refused_before_it_has_expanded(rule: str, bomb: Callable[[], bytes], tmp_path: Path) -> None:
    path = write(tmp_path, bomb())
    tracemalloc.start()
    started = time.thread_time()
    try:
        with pytest.raises(BundleRejected) as refused:
            inspect(path, CAPS)
        spent, (_, peak) = time.thread_time() - started, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    with pytest.raises(BundleRejected):
        unpack_into(tmp_path / "root", path)
    assert refused.value.rule == rule, refused.value.detail
    assert peak < 4 * MIB
    assert spent < 2.0
    written = sum(p.lstat().st_size for p in (tmp_path / "root").iterdir())
    assert written <= 64 * 1024 if rule == "corrupt" else written == 0


def test_much_content_that_is_accepted_passes_through_little_memory(tmp_path: Path) -> None:
    """The positive control of the bombs: 60 MiB of zeros, below the ratio's floor."""
    caps = ArchiveCaps()
    for data in (
        gzipped(tar(tar_header(b"zeros", size=60 * MIB), bytes(60 * MIB))),
        zstandarded(tar(tar_header(b"zeros", size=60 * MIB), bytes(60 * MIB))),
        zip_archive(ZipMember(b"zeros", bytes(60 * MIB))),
    ):
        path = write(tmp_path, data)
        tracemalloc.start()
        try:
            assert inspect(path, caps).content_bytes == 60 * MIB
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 2 * MIB


def test_reading_stops_when_the_processor_time_is_spent(tmp_path: Path) -> None:
    nothing = ArchiveCaps(cpu_s=0.0)
    many = [b"f%04d" % n for n in range(40)]
    archives = [packed(tar(*(tar_header(name) for name in many))) for packed in FORMATS]
    archives.append(zip_archive(*(ZipMember(name, b"x") for name in many)))
    archives.append(_zstd_frame(header=b"\x00\x50", blocks=_raw_block(b"", last=False) * 100_000))
    for data in archives:
        with pytest.raises(BundleRejected) as refused:
            inspect(write(tmp_path, data), nothing)
        assert refused.value.rule == "cpu"


def test_a_central_directory_is_bounded_before_it_is_read(tmp_path: Path) -> None:
    wide = [ZipMember(b"f%d" % n, extra=b"\x09\0\xf0\xff" + bytes(0xFFF0)) for n in range(300)]
    with pytest.raises(BundleRejected) as refused:
        inspect(write(tmp_path, zip_archive(*wide)), CAPS)
    assert refused.value.rule == "size"
    assert inspect(write(tmp_path, zip_archive(*wide[:10])), CAPS).files == 10


def test_names_are_kept_in_little_memory(tmp_path: Path) -> None:
    """Ten thousand paths of 1,024 bytes, each in directories of its own, would be 320,000 directories."""
    names = [b"/".join(b"%05d-%02d-" % (n, level) + b"n" * 22 for level in range(31)) for n in range(10_000)]
    path = write(tmp_path, zstandarded(tar(*map(_long, names))))
    tracemalloc.start()
    try:
        with pytest.raises(BundleRejected) as refused:
            inspect(path, CAPS)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert refused.value.rule == "count"
    assert peak < 16 * MIB


def _long(name: bytes) -> bytes:
    long_name = tar_member(b"././@LongLink", name + b"\0", kind=b"L", magic=b"ustar  \0")
    return long_name + tar_header(b"x", magic=b"ustar  \0")


def test_a_zstd_bomb_would_expand_in_a_decompressor_that_is_not_bounded() -> None:
    """The positive control: the same blocks are sound zstd, and small input really makes large output."""
    bomb = _zstd_rle_bomb(SOUND, 64 * MIB)
    assert len(bomb) < 64 * 1024
    assert len(zstandard.ZstdDecompressor().decompressobj().decompress(bomb)) > 64 * MIB


def test_a_special_mode_is_not_kept(tmp_path: Path) -> None:
    unpack_into(tmp_path / "root", write(tmp_path, tar(tar_member(b"s", b"x", mode=0o7777))))
    assert stat.S_IMODE((tmp_path / "root/s").stat().st_mode) == 0o755
