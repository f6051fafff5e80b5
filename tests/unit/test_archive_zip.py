"""Hostile zips, byte by byte. Beside each stands the same archive without what makes it hostile, which is accepted."""

import stat
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import pytest

from service.core.errors import BundleRejected
from service.intake.archive import inspect, read_member
from tests.archives import CAPS, ZipMember, extra_field, tree, unpack_into, write, zip_archive, zip_directory

pytestmark = pytest.mark.unit

A = ZipMember(b"a.txt", b"hello hello hello")
B = ZipMember(b"b.txt", b"other")
UTF8 = 0x0800
DEFLATE_HELLO = A.data()
NESTED = zip_archive(ZipMember(b"evil.txt", b"evil"))


@dataclass(frozen=True)
class Case:
    why: str
    rule: str
    hostile: bytes
    sound: bytes = zip_archive(A)
    content: bool = False
    """Only the content is wrong: what stood before it may have been written."""


def _one(why: str, rule: str, hostile: ZipMember, sound: ZipMember = A) -> Case:
    return Case(why, rule, zip_archive(hostile), zip_archive(sound))


def _unicode_path(name: bytes, *, of: bytes) -> bytes:
    return extra_field(0x7075, b"\x01" + zlib.crc32(of).to_bytes(4, "little") + name)


E_ACUTE = "é.txt".encode()

NAMES = [
    _one("goes up", "path", ZipMember(b"../x"), ZipMember(b"up/x")),
    _one("is absolute", "path", ZipMember(b"/x"), ZipMember(b"x")),
    _one("has a backslash", "path", ZipMember(b"a\\..\\..\\x"), ZipMember(b"a/x")),
    _one("has a drive letter", "path", ZipMember(b"C:/x"), ZipMember(b"C/x")),
    _one("starts with ./", "path", ZipMember(b"./x"), ZipMember(b"x")),
    _one("is empty", "path", ZipMember(b""), ZipMember(b"x")),
    _one("is a slash", "path", zip_directory(b"/"), zip_directory(b"d/")),
    _one("has a NUL", "name", ZipMember(b"a.txt\0.sh"), ZipMember(b"a.txt.sh")),
    _one("has a newline", "name", ZipMember(b"a\n"), ZipMember(b"a")),
    _one("has an override", "name", ZipMember("a\u202eb".encode(), flags=UTF8), ZipMember("aיb".encode(), flags=UTF8)),
    _one("is not UTF-8", "name", ZipMember(b"\xe9.txt", flags=UTF8), ZipMember(E_ACUTE, flags=UTF8)),
    _one("is not marked as UTF-8", "name", ZipMember(E_ACUTE), ZipMember(E_ACUTE, flags=UTF8)),
    _one(
        "has a second name",
        "header",
        ZipMember(b"a.txt", extra=_unicode_path(b"../b", of=b"a.txt")),
        ZipMember(E_ACUTE, extra=_unicode_path(E_ACUTE, of=E_ACUTE)),
    ),
    _one("is 33 levels deep", "depth", ZipMember(b"d/" * 32 + b"x"), ZipMember(b"d/" * 31 + b"x")),
    Case("stands twice", "duplicate", zip_archive(A, A), zip_archive(A, B)),
    Case("differs in case", "clash", zip_archive(A, ZipMember(b"A.TXT")), zip_archive(A, B)),
    Case("is a file and a directory", "clash", zip_archive(A, zip_directory(b"a.txt/")), zip_archive(A, B)),
    Case("is below a file", "clash", zip_archive(A, ZipMember(b"a.txt/x")), zip_archive(A, ZipMember(b"a/x"))),
]

TYPES = [
    _one("a symbolic link", "link", ZipMember(b"l", b"/etc/passwd", mode=stat.S_IFLNK | 0o777)),
    _one("a symbolic link from elsewhere", "link", ZipMember(b"l", b"/etc", mode=stat.S_IFLNK | 0o777, made_on=0)),
    _one("a FIFO", "type", ZipMember(b"l", mode=stat.S_IFIFO | 0o644), ZipMember(b"l")),
    _one("a character device", "type", ZipMember(b"l", mode=stat.S_IFCHR | 0o644), ZipMember(b"l", mode=0)),
    _one("a socket", "type", ZipMember(b"l", mode=stat.S_IFSOCK | 0o644), ZipMember(b"l", mode=0o644)),
    _one("a volume label", "type", ZipMember(b"l", dos=0x08), ZipMember(b"l", dos=0x20)),
    _one("an old Unix link", "header", ZipMember(b"l", extra=extra_field(0x000D, bytes(12) + b"/etc/passwd"))),
    _one("an ASi link", "header", ZipMember(b"l", extra=extra_field(0x756E, bytes(14)))),
    _one("a directory by its mode", "header", ZipMember(b"d", mode=stat.S_IFDIR | 0o755), zip_directory(b"d/")),
    _one("a directory by its attributes", "header", ZipMember(b"d", dos=0x10), zip_directory(b"d/")),
    _one("a file by its mode", "header", zip_directory(b"d/", mode=stat.S_IFREG | 0o644), zip_directory(b"d/", mode=0)),
    _one("a directory with content", "header", zip_directory(b"d/", content=b"x"), zip_directory(b"d/")),
]

TWO_HEADERS = [
    _one(f"the local header has another {what}", "header", ZipMember(A.name, A.content, local={key: value}))
    for what, key, value in (
        ("name", "name", b"b.txt"),
        ("shorter name", "name", b"a.tx"),
        ("CRC", "crc", 1),
        ("size", "size", 16),
        ("packed size", "packed", 3),
        ("method", "method", 0),
        ("set of flags", "flags", UTF8),
    )
]

REFUSED_FEATURES = [
    _one("encrypted", "encrypted", ZipMember(A.name, A.content, flags=0x0001)),
    _one("strongly encrypted", "encrypted", ZipMember(A.name, A.content, flags=0x0041)),
    _one("masked headers", "encrypted", ZipMember(A.name, A.content, flags=0x2000)),
    _one("a data descriptor", "descriptor", ZipMember(A.name, A.content, flags=0x0008)),
    _one("a data descriptor by one header", "descriptor", ZipMember(A.name, A.content, local={"flags": 8, "crc": 0})),
    _one(
        "a later version", "header", ZipMember(A.name, A.content, version=64), ZipMember(A.name, A.content, version=63)
    ),
    _one("patched data", "header", ZipMember(A.name, A.content, flags=0x0020)),
    _one("bzip2", "method", ZipMember(A.name, A.content, method=12)),
    _one("deflate64", "method", ZipMember(A.name, A.content, method=9)),
    _one("AES", "method", ZipMember(A.name, A.content, method=99)),
    _one("ZIP64 sizes", "zip64", ZipMember(A.name, A.content, size=0xFFFFFFFF)),
    _one("a ZIP64 extra", "zip64", ZipMember(A.name, A.content, extra=extra_field(1, struct.pack("<QQ", 5, 5)))),
    _one("a local ZIP64 extra", "zip64", ZipMember(A.name, A.content, local={"extra": extra_field(1, bytes(16))})),
    _one("an extra cut short", "header", ZipMember(A.name, A.content, extra=extra_field(0x5455, b"12345")[:-1])),
    _one("three bytes of extra", "header", ZipMember(A.name, A.content, extra=b"\0\0\0")),
    _one("a member's comment", "header", ZipMember(A.name, A.content, comment=b"x")),
    _one("an end record in an extra", "header", ZipMember(A.name, A.content, extra=extra_field(9, b"PK\x05\x06" * 6))),
    _one("another disk", "header", ZipMember(A.name, A.content, disk=1)),
    Case("several disks", "header", zip_archive(A, disk=1)),
    Case("a ZIP64 locator", "zip64", zip_archive(A, before_end=b"PK\x06\x07" + bytes(16))),
    Case("ZIP64 counts", "zip64", zip_archive(A, count=0xFFFF)),
]

STRUCTURE = [
    Case("bytes before it, offsets adjusted", "format", zip_archive(A, prefix=b"#!/bin/sh\n")),
    Case(
        "a member before it that is not listed", "overlap", zip_archive(A, prefix=NESTED[: NESTED.index(b"PK\x01\x02")])
    ),
    Case("bytes before its directory", "overlap", zip_archive(A, gap=b"x"), zip_archive(A, gap=b"")),
    Case("bytes between members", "overlap", zip_archive(ZipMember(b"c", b"c", after=b"x"), A), zip_archive(B, A)),
    Case("bytes before its end record", "overlap", zip_archive(A, before_end=b"x")),
    Case("bytes after it", "trailing", zip_archive(A, suffix=b"x")),
    Case("another zip after it", "overlap", zip_archive(A, suffix=NESTED)),
    Case("a comment that is a zip", "overlap", zip_archive(A, comment=NESTED), zip_archive(A, comment=b"commit 0123")),
    Case("a comment of the wrong length", "trailing", zip_archive(A, comment=b"xx", comment_bytes=1)),
    Case("fewer members than it says", "corrupt", zip_archive(A, count=2), zip_archive(A, count=1)),
    Case("more members than it says", "corrupt", zip_archive(A, B, count=1), zip_archive(A, B, count=2)),
    Case(
        "two members that share their bytes",
        "overlap",
        zip_archive(A, ZipMember(b"b", A.content, packed=b"", offset=0)),
    ),
    Case(
        "a member inside another",
        "overlap",
        zip_archive(ZipMember(b"o", NESTED, deflate=False), ZipMember(b"i", b"", offset=31)),
    ),
    Case("an offset beyond its end", "overlap", zip_archive(ZipMember(b"c", b"c", offset=2**31))),
    Case("a directory elsewhere", "overlap", zip_archive(A, directory_at=0)),
    Case("cut by one byte", "corrupt", zip_archive(A)[:-1]),
    Case("cut in the middle", "corrupt", zip_archive(A, B)[:60], zip_archive(A, B)),
    Case("a stored member with two sizes", "header", zip_archive(ZipMember(b"s", b"abc", deflate=False, size=2))),
    Case(
        "a packed size that covers the next member",
        "overlap",
        zip_archive(ZipMember(A.name, A.content, packed_size=len(DEFLATE_HELLO) + 30), B),
        zip_archive(A, B),
    ),
]

CONTENT = [
    Case("a wrong CRC", "corrupt", zip_archive(ZipMember(A.name, A.content, crc=1)), content=True),
    Case(
        "a wrong CRC, stored", "corrupt", zip_archive(ZipMember(A.name, A.content, deflate=False, crc=1)), content=True
    ),
    Case("more than it declares", "corrupt", zip_archive(ZipMember(A.name, A.content, size=3)), content=True),
    Case("less than it declares", "corrupt", zip_archive(ZipMember(A.name, A.content, size=99)), content=True),
    Case(
        "bytes after its deflate data",
        "corrupt",
        zip_archive(ZipMember(A.name, A.content, packed=DEFLATE_HELLO + b"hidden")),
        content=True,
    ),
    Case(
        "deflate data cut short",
        "corrupt",
        zip_archive(ZipMember(A.name, A.content, packed=DEFLATE_HELLO[:-2])),
        content=True,
    ),
    Case(
        "deflate data that is noise",
        "corrupt",
        zip_archive(ZipMember(A.name, A.content, packed=b"\xff" * 20)),
        content=True,
    ),
    Case(
        "two deflate streams",
        "corrupt",
        zip_archive(ZipMember(A.name, A.content, packed=DEFLATE_HELLO * 2)),
        content=True,
    ),
]

CASES = NAMES + TYPES + TWO_HEADERS + REFUSED_FEATURES + STRUCTURE + CONTENT


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_a_hostile_zip_is_refused_with_its_rule(case: Case, tmp_path: Path) -> None:
    path = write(tmp_path, case.hostile)
    with pytest.raises(BundleRejected) as refused:
        inspect(path, CAPS)
    assert refused.value.rule == case.rule, refused.value.detail
    with pytest.raises(BundleRejected) as refused:
        unpack_into(tmp_path / "root", path)
    assert refused.value.rule == case.rule
    assert case.content or tree(tmp_path / "root") == {}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_the_same_zip_without_what_makes_it_hostile_is_accepted(case: Case, tmp_path: Path) -> None:
    path = write(tmp_path, case.sound)
    summary = inspect(path, CAPS)
    assert unpack_into(tmp_path / "root", path) == summary
    assert summary.entries == len(tree(tmp_path / "root"))


def test_what_ordinary_zips_hold_is_accepted_and_unpacked_as_it_is(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        zip_archive(
            ZipMember(b"sub/run.sh", b"#!/bin/sh\n", mode=stat.S_IFREG | 0o4755, extra=extra_field(0x5455, b"\1abcd")),
            zip_directory(b"sub/"),
            ZipMember(b"stored", b"as it is", deflate=False),
            ZipMember(b"dos.exe", b"mode means nothing here", mode=0o755, made_on=0),
            ZipMember(E_ACUTE, b"", flags=UTF8),
            ZipMember(b"best", b"x" * 100_000, flags=0x0002),
        ),
    )
    summary = unpack_into(tmp_path / "root", path)
    assert tree(tmp_path / "root") == {
        "sub": (0o755, None),
        "sub/run.sh": (0o755, b"#!/bin/sh\n"),
        "stored": (0o644, b"as it is"),
        "dos.exe": (0o644, b"mode means nothing here"),
        "é.txt": (0o644, b""),
        "best": (0o644, b"x" * 100_000),
    }
    assert (summary.files, summary.entries, summary.content_bytes) == (5, 6, 10 + 8 + 23 + 100_000)


def test_a_zip_without_members_is_an_empty_bundle(tmp_path: Path) -> None:
    assert inspect(write(tmp_path, zip_archive()), CAPS).entries == 0


def test_one_member_is_read_by_its_name(tmp_path: Path) -> None:
    path = write(tmp_path, zip_archive(A, zip_directory(b"d/"), B))
    assert read_member(path, "b.txt", max_bytes=5) == b"other"
    assert read_member(path, "d", max_bytes=5) is None
    assert read_member(path, "c.txt", max_bytes=5) is None
    with pytest.raises(BundleRejected, match="at most 4"):
        read_member(path, "b.txt", max_bytes=4)
