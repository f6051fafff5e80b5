"""D01 to D06 of the corpus, at the extractor: what hostile uploads try against whoever unpacks them.

Each attack has its positive control: the standard library's plain `extractall`, without a filter, in a directory of the
test's own, where it works. So the archives really attack, and it is our extractor that they fail against.
"""

import gzip
import io
import os
import resource
import stat
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from service.core.errors import BundleRejected
from service.intake.archive import inspect
from tests.archives import (
    CAPS,
    GNU,
    ZipMember,
    directory,
    gzipped,
    long_name,
    tar,
    tar_header,
    tar_member,
    tree,
    unpack_into,
    write,
    zip_archive,
    zstandarded,
)

pytestmark = pytest.mark.escape

MIB = 2**20


def _extract_naively(scratch: Path, archive: bytes) -> None:
    """What a service does that trusts its uploads."""
    scratch.mkdir(parents=True)
    with suppress(OSError), tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        opened.extractall(scratch, filter="fully_trusted")


def _assert_refused(tmp_path: Path, archive: bytes, rules: Sequence[str]) -> None:
    """By both questions that are asked of an archive, in each compression, with nothing made anywhere."""
    place = tmp_path / "ours"
    place.mkdir()
    for packed in (bytes, gzipped, zstandarded):
        path = write(place, packed(archive))
        with pytest.raises(BundleRejected) as refused:
            inspect(path, CAPS)
        assert refused.value.rule in rules, refused.value.detail
        root = place / "root"
        with pytest.raises(BundleRejected):
            unpack_into(root, path)
        assert tree(root) == {}
        root.rmdir()
    assert [p.name for p in place.iterdir()] == ["upload"]


@pytest.mark.parametrize("where", ["parent", "absolute", "through a directory"])
def test_d01_names_that_lead_out(where: str, tmp_path: Path) -> None:
    name = {
        "parent": b"../../x",
        "absolute": bytes(tmp_path / "naive/x"),
        "through a directory": b"a/../../../x",
    }[where]
    archive = tar(directory(b"a/"), long_name(name), tar_member(name[:99], b"escaped", magic=GNU))
    _extract_naively(tmp_path / "naive/in/root", archive)
    assert (tmp_path / "naive/x").read_bytes() == b"escaped"
    _assert_refused(tmp_path, archive, ["path"])


def test_d02_a_link_and_then_a_member_through_it(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    canary.mkdir()
    archive = tar(tar_header(b"d", kind=b"2", link=bytes(canary)), tar_member(b"d/x", b"escaped"))
    _extract_naively(tmp_path / "naive", archive)
    assert (canary / "x").read_bytes() == b"escaped"
    (canary / "x").unlink()
    before = canary.stat().st_mtime_ns
    _assert_refused(tmp_path, archive, ["link"])
    assert canary.stat().st_mtime_ns == before


def test_d02_a_link_that_stays_inside_is_refused_too(tmp_path: Path) -> None:
    archive = tar(tar_member(b"real", b"x"), tar_header(b"link", kind=b"2", link=b"real"))
    _extract_naively(tmp_path / "naive", archive)
    assert (tmp_path / "naive/link").is_symlink()
    _assert_refused(tmp_path, archive, ["link"])


def test_d03_a_hard_link_to_a_file_outside(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("secret")
    link = tar_header(b"x", kind=b"1", link=bytes(target))
    archive = tar(link, tar_member(b"x", b"overwritten"))
    _extract_naively(tmp_path / "naive", tar(link))
    assert target.stat().st_nlink == 2
    (tmp_path / "naive/x").unlink()
    _assert_refused(tmp_path, archive, ["link"])
    assert target.stat().st_nlink == 1
    assert target.read_text() == "secret"


SPECIAL = {
    "character device": (b"3", stat.S_ISCHR),
    "block device": (b"4", stat.S_ISBLK),
    "FIFO": (b"6", stat.S_ISFIFO),
}


@pytest.mark.parametrize("what", SPECIAL)
def test_d04_special_files(what: str, tmp_path: Path) -> None:
    kind, is_special = SPECIAL[what]
    archive = tar(tar_header(b"dev", kind=kind, patch={329: b"0000001\0", 337: b"0000003\0"}))
    _extract_naively(tmp_path / "naive", archive)
    if kind == b"6" or os.geteuid() == 0:
        assert is_special((tmp_path / "naive/dev").lstat().st_mode)
    _assert_refused(tmp_path, archive, ["type"])


@pytest.mark.parametrize("kind", [b"S", b"s", b"7", b"M"], ids=["sparse", "socket", "contiguous", "multi-volume"])
def test_d04_types_that_are_not_regular_files(kind: bytes, tmp_path: Path) -> None:
    _assert_refused(tmp_path, tar(tar_header(b"odd", kind=kind, magic=GNU)), ["type"])
    assert inspect(write(tmp_path, tar(tar_header(b"odd", magic=GNU))), CAPS).files == 1


def _zeros(size: int, *, head: bytes = b"") -> tuple[bytes, int]:
    """-> (deflate data, CRC) of `head` and `size` zeros: one piece that stands for itself, many times."""
    piece = bytes(MIB)
    compressor = zlib.compressobj(6, zlib.DEFLATED, -15)
    start = compressor.compress(head) + compressor.flush(zlib.Z_FULL_FLUSH)
    packed = compressor.compress(piece) + compressor.flush(zlib.Z_FULL_FLUSH)
    crc = zlib.crc32(head)
    for _ in range(size // MIB):
        crc = zlib.crc32(piece, crc)
    return start + packed * (size // MIB) + compressor.flush(), crc


def _bomb(kind: str, size: int) -> bytes:
    """A sound archive of one member of zeros, about a thousandth of its content."""
    if kind == "zip":
        packed, crc = _zeros(size)
        return zip_archive(ZipMember(b"zeros", packed=packed, crc=crc, size=size))
    head = tar_header(b"zeros", size=size)
    packed, crc = _zeros(size + MIB, head=head)  # the last of them end the tar
    return b"\x1f\x8b\x08" + bytes(6) + b"\xff" + packed + struct.pack("<II", crc, len(head) + size + MIB)


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_d05_a_gibibyte_of_zeros(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path, _bomb(kind, 1024 * MIB))
    assert path.stat().st_size < 2 * MIB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.thread_time()
    with pytest.raises(BundleRejected) as refused:
        inspect(path, CAPS)
    with pytest.raises(BundleRejected):
        unpack_into(tmp_path / "root", path)
    assert time.thread_time() - started < 5.0
    assert refused.value.rule == "bomb"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024
    assert tree(tmp_path / "root") == {}


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_d05_the_same_with_no_more_zeros_than_are_allowed(kind: str, tmp_path: Path) -> None:
    """The positive control; and the standard library shows that it is sound, and really expands."""
    path = write(tmp_path, _bomb(kind, 32 * MIB))
    assert inspect(path, CAPS).content_bytes == 32 * MIB
    unpack_into(tmp_path / "root", path)
    if kind == "zip":
        with zipfile.ZipFile(path) as archive:
            archive.extractall(tmp_path / "naive")
    else:
        with tarfile.open(path) as opened:
            opened.extractall(tmp_path / "naive", filter="fully_trusted")
    for place in ("root", "naive"):
        assert (tmp_path / place / "zeros").stat().st_size == 32 * MIB


def _empty_entries(path: Path, count: int) -> Path:
    """Headers with names of their own; made from one, since a checksum is a sum."""
    first = tar_header(b"f000000")
    base = int(first[148:154], 8) - 6 * ord("0")
    with gzip.open(path, "wb", compresslevel=1) as stream:
        for n in range(count):
            name = b"f%06d" % n
            stream.write(name + first[7:148] + b"%06o" % (base + sum(name[1:])) + first[154:])
        stream.write(bytes(1024))
    return path


def test_d06_two_hundred_thousand_empty_entries(tmp_path: Path) -> None:
    many = _empty_entries(tmp_path / "many", 200_000)
    started = time.thread_time()
    with pytest.raises(BundleRejected) as refused:
        inspect(many, CAPS)
    with pytest.raises(BundleRejected):
        unpack_into(tmp_path / "root", many)
    assert time.thread_time() - started < 5.0
    assert refused.value.rule == "count"
    assert tree(tmp_path / "root") == {}
    assert inspect(_empty_entries(tmp_path / "most", 10_000), CAPS).entries == 10_000


def test_d06_a_path_of_five_thousand_levels(tmp_path: Path) -> None:
    name = b"d/" * 4999 + b"x"
    archive = tar(long_name(name), tar_member(name[:99], b"deep", magic=GNU))
    _assert_refused(tmp_path, archive, ["depth"])
    name = b"d/" * 31 + b"x"
    assert inspect(write(tmp_path, tar(long_name(name), tar_member(name, b"deep", magic=GNU))), CAPS).files == 1


def test_d06_an_archive_that_lacks_one_byte(tmp_path: Path) -> None:
    whole = tar(tar_member(b"a", b"x" * 1000))
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("a", b"x" * 1000)
    for data in (whole, gzipped(whole), zstandarded(whole), (tmp_path / "zip").read_bytes()):
        assert inspect(write(tmp_path, data), CAPS).files == 1
        with pytest.raises(BundleRejected) as refused:
            inspect(write(tmp_path, data[:-1]), CAPS)
        assert refused.value.rule == "corrupt"


def test_d06_what_is_no_archive(tmp_path: Path) -> None:
    for data in (b"", b"MZ\x90\x00" + bytes(2000), b"\x7fELF" + bytes(2000), b"7z\xbc\xaf\x27\x1c" + bytes(2000)):
        with pytest.raises(BundleRejected) as refused:
            inspect(write(tmp_path, data), CAPS)
        assert refused.value.rule == "format"
