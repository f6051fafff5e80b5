"""Hostile tars, byte by byte. Beside each stands the same archive without what makes it hostile, which is accepted."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from service.core.errors import BundleRejected
from service.intake.archive import inspect, read_member
from tests.archives import (
    CAPS,
    GNU,
    POSIX,
    directory,
    gzipped,
    long_name,
    pax,
    pax_record,
    tar,
    tar_header,
    tar_member,
    tree,
    unpack_into,
    write,
    zstandarded,
)

pytestmark = pytest.mark.unit

OK = tar_member(b"a.txt", b"hello")


@dataclass(frozen=True)
class Case:
    why: str
    rule: str
    hostile: bytes
    sound: bytes = tar(OK)


def _named(why: str, rule: str, name: bytes, sound: bytes = b"a/b/x") -> Case:
    """The same member under a hostile and under a sound name, both by a pax record so that any byte may stand in it."""
    hostile, control = (tar(pax(pax_record(b"path", n)), tar_member(b"short", b"x")) for n in (name, sound))
    return Case(why, rule, hostile, control)


NAMES = [
    _named("goes up", "path", b"../../x"),
    _named("goes up in the middle", "path", b"a/../../x"),
    _named("ends in dots", "path", b"a/.."),
    _named("is absolute", "path", b"/abs/x"),
    _named("is absolute after ./", "path", b".//abs/x"),
    _named("has a backslash", "path", b"a\\..\\x"),
    _named("has a drive letter", "path", b"C:x"),
    _named("has a drive letter and a slash", "path", b"c:/x"),
    _named("has an empty part", "path", b"a//x"),
    _named("has a part .", "path", b"a/./x"),
    _named("has ./ twice", "path", b"././x", b"./x"),
    _named("is empty", "path", b""),
    _named("is only ./ and a file", "path", b"./"),
    _named("is a file with a slash at its end", "path", b"a/x/"),
    _named("is not UTF-8", "name", b"a/\xff"),
    _named("is overlong UTF-8 for ../", "name", b"\xc0\xae\xc0\xae/x"),
    _named("has a surrogate", "name", b"a\xed\xa0\x80"),
    _named("has a newline", "name", b"a\nb"),
    _named("has an escape", "name", b"a\x1b[2Jb"),
    _named("has DEL", "name", b"a\x7f"),
    _named("has a C1 control", "name", "a\x9bb".encode()),
    _named("has a right-to-left override", "name", "a\u202etxt.exe".encode(), "שלום.txt".encode()),
    _named("has an isolate", "name", "a\u2066b".encode()),
    _named("has a zero-width space", "name", "a\u200bb".encode(), "می\u200cخواهم".encode()),
    _named("has a line separator", "name", "a\u2028b".encode()),
    _named("has a byte order mark", "name", "\ufeffa".encode()),
    _named("has a NUL", "name", b"a\0b"),
    _named("is 33 levels deep", "depth", b"d/" * 32 + b"x", b"d/" * 31 + b"x"),
    _named("has a part of 256 bytes", "name", b"n" * 256, b"n" * 255),
    _named("has a part of 256 bytes in 128 characters", "name", "é".encode() * 128, "é".encode() * 127),
    _named("is 1025 bytes long", "name", b"/".join([b"n" * 204] * 5) + b"x", b"/".join([b"n" * 204] * 5)),
]

TYPES = [
    Case("symbolic link", "link", tar(tar_header(b"l", kind=b"2", link=b"a.txt")), tar(tar_header(b"l"))),
    Case("hard link", "link", tar(OK, tar_header(b"l", kind=b"1", link=b"a.txt")), tar(OK, tar_header(b"l"))),
    Case("long link target", "link", tar(tar_member(b"././@LongLink", b"t" * 200 + b"\0", kind=b"K", magic=GNU), OK)),
    Case("a link by a pax record", "link", tar(pax(pax_record(b"linkpath", b"/etc/passwd")), OK)),
    Case("a file with a link target", "link", tar(tar_header(b"f", link=b"/etc/passwd")), tar(tar_header(b"f"))),
    Case(
        "character device", "type", tar(tar_header(b"d", kind=b"3", patch={329: b"0000001\0"})), tar(tar_header(b"d"))
    ),
    Case("block device", "type", tar(tar_header(b"d", kind=b"4")), tar(tar_header(b"d"))),
    Case("FIFO", "type", tar(tar_header(b"d", kind=b"6")), tar(tar_header(b"d"))),
    Case("contiguous file", "type", tar(tar_header(b"d", kind=b"7")), tar(tar_header(b"d", kind=b"\0"))),
    Case("GNU sparse file", "type", tar(tar_header(b"d", kind=b"S", magic=GNU)), tar(tar_header(b"d", magic=GNU))),
    Case("pax sparse file", "type", tar(pax(pax_record(b"GNU.sparse.major", b"1")), OK), tar(pax(), OK)),
    Case("volume label", "type", tar(tar_header(b"d", kind=b"V", magic=GNU)), tar(tar_header(b"d", magic=GNU))),
    Case("multi-volume part", "type", tar(tar_header(b"d", kind=b"M", magic=GNU)), tar(tar_header(b"d", magic=GNU))),
    Case("a type nobody knows", "type", tar(tar_header(b"d", kind=b"Z")), tar(tar_header(b"d"))),
]

CLASHES = [
    Case("the same file twice", "duplicate", tar(OK, OK)),
    Case("the same file twice, once with ./", "duplicate", tar(OK, tar_member(b"./a.txt", b"other"))),
    Case("the same directory twice", "duplicate", tar(directory(b"d/"), directory(b"d")), tar(directory(b"d/"))),
    Case("the root twice", "duplicate", tar(directory(b"./"), directory(b".")), tar(directory(b"./"))),
    Case("a file and a directory", "clash", tar(tar_header(b"x"), directory(b"x/")), tar(directory(b"x/"))),
    Case("a directory and a file", "clash", tar(directory(b"x/"), tar_header(b"x")), tar(directory(b"x/"))),
    Case("a file below a file", "clash", tar(tar_header(b"x"), tar_header(b"x/y")), tar(tar_header(b"x/y"))),
    Case(
        "a file where a path goes through", "clash", tar(tar_header(b"x/y"), tar_header(b"x")), tar(tar_header(b"x/y"))
    ),
    Case(
        "names that differ in case",
        "clash",
        tar(tar_header(b"Makefile"), tar_header(b"makefile")),
        tar(tar_header(b"M")),
    ),
    Case(
        "directories that differ in case", "clash", tar(tar_header(b"A/x"), tar_header(b"a/y")), tar(tar_header(b"A/x"))
    ),
    Case(
        "names that differ in Unicode form",
        "clash",
        tar(tar_header("é".encode()), tar_header("e\u0301".encode())),
        tar(tar_header("é".encode()), tar_header(b"e")),
    ),
    Case(
        "names that differ in Unicode case",
        "clash",
        tar(tar_header(b"STRASSE"), tar_header("straße".encode())),
        tar(tar_header("straße".encode()), tar_header(b"gasse")),
    ),
    Case(
        "names that differ in width",
        "clash",
        tar(tar_header("ａ".encode()), tar_header(b"a")),
        tar(tar_header("ａ".encode()), tar_header(b"b")),
    ),
]

HEADERS = [
    Case("a wrong checksum", "corrupt", tar(tar_header(checksum=1)), tar(tar_header())),
    Case("a checksum of no digits", "corrupt", tar(tar_header()[:148] + bytes(8) + tar_header()[156:])),
    Case("a size of no digits", "header", tar(tar_header(patch={124: bytes(12)})), tar(tar_header())),
    Case("a size with a sign", "header", tar(tar_header(patch={124: b"-0000000001\0"})), tar(tar_header())),
    Case("a negative size in base 256", "header", tar(tar_header(patch={124: b"\xff" * 12})), tar(tar_header())),
    Case(
        "a size of 2**63 in base 256",
        "header",
        tar(tar_header(patch={124: b"\x80" + bytes(2) + b"\x80" + bytes(8)})),
        tar(tar_header(patch={124: b"\x80" + bytes(10) + b"\x05"}) + OK[512:]),
    ),
    Case("a mode of no digits", "header", tar(tar_header(patch={100: b"rw-r--r-"})), tar(tar_header())),
    Case("an owner of no digits", "header", tar(tar_header(patch={108: b"0000../\0"})), tar(tar_header())),
    Case(
        "a time of no digits",
        "header",
        tar(tar_header(patch={136: b"yesterday\0\0\0"})),
        tar(tar_header(patch={136: b"\xff" * 12})),
    ),
    Case("bytes after the name's end", "header", tar(tar_header(b"a\0../x")), tar(tar_header(b"a"))),
    Case("bytes after the prefix's end", "header", tar(tar_header(prefix=b"a\0b")), tar(tar_header(prefix=b"a"))),
    Case("a prefix in a GNU header", "header", tar(tar_header(magic=GNU, prefix=b"..")), tar(tar_header(magic=GNU))),
    Case("a prefix that goes up", "path", tar(tar_header(prefix=b"..")), tar(tar_header(prefix=b"up"))),
    Case("a second member of another format", "header", tar(OK, tar_header(b"v7", magic=bytes(8))), tar(OK)),
    Case("star's fields", "header", tar(tar_header(patch={508: b"tar\0"})), tar(tar_header())),
    Case("a directory with content", "header", tar(tar_member(b"d/", b"x", kind=b"5")), tar(directory(b"d/"))),
    Case("two sizes", "header", tar(pax(pax_record(b"size", b"1")), OK), tar(pax(pax_record(b"size", b"5")), OK)),
    Case("a pax size with a sign", "header", tar(pax(pax_record(b"size", b"+5")), OK)),
    Case("a pax key twice", "header", tar(pax(pax_record(b"path", b"a"), pax_record(b"path", b"b")), OK)),
    Case("a pax length too long", "header", tar(pax(b"99 path=a\n"), OK), tar(pax(b"10 path=a\n"), OK)),
    Case("a pax length too short", "header", tar(pax(b"8 path=a\n"), OK), tar(pax(b"10 path=a\n"), OK)),
    Case("a pax length with a zero", "header", tar(pax(b"011 path=a\n"), OK), tar(pax(b"10 path=a\n"), OK)),
    Case("a pax length of nothing", "header", tar(pax(b"3 \n"), OK), tar(pax(b"10 path=a\n"), OK)),
    Case("a pax character set", "header", tar(pax(pax_record(b"hdrcharset", b"BINARY")), OK), tar(pax(), OK)),
    Case(
        "a path for all members",
        "header",
        tar(pax(pax_record(b"path", b"x"), kind=b"g"), OK),
        tar(pax(pax_record(b"comment", b"0123456789abcdef"), kind=b"g"), OK),
    ),
    Case("two pax headers", "header", tar(pax(), pax(), OK), tar(pax(), OK)),
    Case("a long name and a pax path", "header", tar(pax(pax_record(b"path", b"x")), long_name(b"y"), OK)),
    Case("two long names", "header", tar(long_name(b"y"), long_name(b"z"), OK), tar(long_name(b"y"), OK)),
    Case("a long name with a NUL in it", "header", tar(long_name(b"y\0z"), OK), tar(long_name(b"yz"), OK)),
    Case(
        "a long name without its NUL",
        "header",
        tar(tar_member(b"././@LongLink", b"name", kind=b"L", magic=GNU), OK),
        tar(tar_member(b"././@LongLink", b"name\0", kind=b"L", magic=GNU), OK),
    ),
    Case(
        "a record after the end of a pax header",
        "header",
        tar(pax(b"12 mtime=10\n").replace(b"10\n\0\0\0\0\0\0\0\0\0\0\0\0", b"10\n13 path=../x"), OK),
        tar(pax(b"12 mtime=10\n"), OK),
    ),
    Case("an extended header and no member", "header", tar(OK, pax()), tar(OK)),
    Case("seventeen global headers", "header", tar(*[pax(kind=b"g")] * 17, OK), tar(*[pax(kind=b"g")] * 16, OK)),
    Case("a pax header of 65 KiB", "header", tar(pax(pax_record(b"comment", b"x" * 66_000)), OK)),
]

ENDS = [
    Case("no end blocks", "corrupt", tar(OK, end=b"")),
    Case("one end block", "corrupt", tar(OK, end=bytes(512))),
    Case(
        "one end block and another member",
        "corrupt",
        tar(OK, end=bytes(512)) + tar_member(b"hidden", b"x") + bytes(1024),
    ),
    Case(
        "a member after the end",
        "trailing",
        tar(OK) + tar_member(b"hidden", b"x") + bytes(1024),
        tar(OK) + bytes(10240),
    ),
    Case("bytes after the end", "trailing", tar(OK) + bytes(512 * 9) + b"x" + bytes(511), tar(OK) + bytes(512 * 10)),
    Case("cut by one byte in the padding", "corrupt", (tar(OK) + bytes(8192))[:-1], tar(OK) + bytes(8192)),
    Case("cut in a member", "corrupt", tar(tar_member(b"a", b"x" * 5000))[:3000], tar(tar_member(b"a", b"x" * 5000))),
    Case("cut in a header", "corrupt", tar(OK, OK.replace(b"a.txt", b"b.txt"))[:1100]),
]

CASES = NAMES + TYPES + CLASHES + HEADERS + ENDS


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_a_hostile_tar_is_refused_with_its_rule_and_nothing_is_written(case: Case, tmp_path: Path) -> None:
    for packed in (bytes, gzipped, zstandarded):
        path = write(tmp_path, packed(case.hostile))
        with pytest.raises(BundleRejected) as refused:
            inspect(path, CAPS)
        assert refused.value.rule == case.rule, refused.value.detail
        root = tmp_path / f"root-{packed.__name__}"
        with pytest.raises(BundleRejected) as refused:
            unpack_into(root, path)
        assert refused.value.rule == case.rule
        assert tree(root) == {}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_the_same_tar_without_what_makes_it_hostile_is_accepted(case: Case, tmp_path: Path) -> None:
    for packed in (bytes, gzipped, zstandarded):
        path = write(tmp_path, packed(case.sound))
        summary = inspect(path, CAPS)
        assert unpack_into(tmp_path / f"root-{packed.__name__}", path) == summary
        assert summary.entries == len(tree(tmp_path / f"root-{packed.__name__}"))


def test_the_refusal_names_the_member_with_its_name_escaped_and_cut(tmp_path: Path) -> None:
    path = write(tmp_path, tar(pax(pax_record(b"path", b"../\x1b[31m" + "\u202e".encode() + b"x" * 900)), OK))
    with pytest.raises(BundleRejected) as refused:
        inspect(path, CAPS)
    assert "../\\x1b[31m\\u202exxx" in refused.value.detail
    assert refused.value.detail.isprintable()
    assert len(refused.value.member or "") <= 200


def test_what_ordinary_tars_hold_is_accepted_and_unpacked_as_it_is(tmp_path: Path) -> None:
    name = b"long/" + b"n" * 150
    path = write(
        tmp_path,
        tar(
            directory(b"./"),
            tar_member(b"./run.sh", b"#!/bin/sh\n", mode=0o6755),
            tar_member(b"old", b"v7 type", kind=b"\0", mode=0o600),
            pax(pax_record(b"mtime", b"1.5"), pax_record(b"SCHILY.xattr.user.x", b"\0\n")),
            tar_member(b"sub/dir/f", b"x" * 1000, magic=POSIX),
            long_name(name),
            tar_member(name[:100], b"long", magic=GNU),
            tar_member(b"name", b"prefixed", prefix=b"some/prefix"),
            directory(b"sub"),
        ),
    )
    summary = unpack_into(tmp_path / "root", path)
    assert tree(tmp_path / "root") == {
        "run.sh": (0o755, b"#!/bin/sh\n"),
        "old": (0o644, b"v7 type"),
        "sub": (0o755, None),
        "sub/dir": (0o755, None),
        "sub/dir/f": (0o644, b"x" * 1000),
        "long": (0o755, None),
        name.decode(): (0o644, b"long"),
        "some": (0o755, None),
        "some/prefix": (0o755, None),
        "some/prefix/name": (0o644, b"prefixed"),
    }
    assert (summary.files, summary.entries, summary.content_bytes) == (5, 10, 10 + 7 + 1000 + 4 + 8)


def test_a_tar_without_members_is_an_empty_bundle(tmp_path: Path) -> None:
    for packed in (bytes, gzipped, zstandarded):
        assert inspect(write(tmp_path, packed(bytes(10240))), CAPS).entries == 0


def test_one_member_is_read_by_its_canonical_name(tmp_path: Path) -> None:
    for packed in (bytes, gzipped, zstandarded):
        path = write(
            tmp_path, packed(tar(directory(b"./"), tar_member(b"./a", b"x" * 600), tar_member(b"./b", b"bee")))
        )
        assert read_member(path, "b", max_bytes=3) == b"bee"
        assert read_member(path, "./b", max_bytes=3) is None
        assert read_member(path, "c", max_bytes=3) is None
        with pytest.raises(BundleRejected, match="at most 599"):
            read_member(path, "a", max_bytes=599)
