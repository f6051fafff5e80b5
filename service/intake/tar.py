"""The headers of a tar, read strictly: POSIX ustar with pax records, and GNU with long names.

What two readers could take in two ways is refused: a prefix in a GNU header, bytes after a name's end, a pax size that
is not the header's. Sources: POSIX.1-2017 pax, "ustar Interchange Format" and "pax Header Block"; GNU tar manual,
"Basic Tar Format".
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from service.intake.members import Judge, Member, rejected
from service.intake.tape import CHUNK_BYTES, Tape, truncated

BLOCK_BYTES = 512
_ZEROS = bytes(BLOCK_BYTES)
_POSIX, _GNU = b"ustar\x0000", b"ustar  \x00"
_OCTAL = re.compile(rb" *([0-7]+)[\0 ]*")
_UNUSED_NUMBERS = (slice(100, 108), slice(108, 116), slice(116, 124), slice(136, 148), slice(329, 337), slice(337, 345))
"""Mode, owner, group, time and device: little used here, but where they make no sense, readers part company."""
_UNUSED_NUMBER = re.compile(rb" *[0-7]*[\0 ]*|[\x80\xff].*", re.DOTALL)
_EXTENSION_BYTES = 64 * 1024
"""The most that a long name or the records before one member may take; a pax xattr is larger than any path."""
_GLOBALS = 16
_PAX_IGNORED = frozenset({b"atime", b"ctime", b"mtime", b"uid", b"gid", b"uname", b"gname", b"comment"})
_PAX_IGNORED_PREFIXES = (
    b"LIBARCHIVE.",
    b"SCHILY.xattr.",
    b"SCHILY.dev",
    b"SCHILY.ino",
    b"SCHILY.nlink",
    b"SCHILY.fflags",
)
_RECORD_LENGTH = re.compile(rb"([1-9][0-9]{0,6}) ")
_LINKS = {b"1": "a hard link", b"2": "a symbolic link", b"K": "a link with a long target"}
_TYPES = {
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a FIFO",
    b"7": "a contiguous file",
    b"S": "a sparse file",
    b"D": "a directory dump",
    b"M": "a part of a multi-volume file",
    b"V": "a volume label",
}


@dataclass(slots=True)
class _Extended:
    """What the headers before a member say of it."""

    path: bytes | None = None
    size: int | None = None
    pax: bool = False
    long_name: bool = False

    @property
    def pending(self) -> bool:
        return self.pax or self.long_name


def looks_like_tar(head: bytes) -> bool:
    """`head`: the first 512 bytes. A tar without members is zeros from its first block."""
    return head[257:265] in (_POSIX, _GNU) or head == _ZEROS


def read_headers(tape: Tape, judge: Judge) -> Iterator[Member]:
    """Every member, judged, in the archive's order; the caller may read a member's content before asking for the next
    one. Raises BundleRejected; when it ends, the tape was read to its end."""
    extended = _Extended()
    global_headers = 0
    while (block := tape.read(BLOCK_BYTES)) != _ZEROS:
        if tape.position <= BLOCK_BYTES and not looks_like_tar(block):
            raise rejected("format", "holds no tar; what is compressed should be a tar")
        if len(block) < BLOCK_BYTES:
            raise truncated()
        kind = block[156:157]
        name = _checked_name(block)
        size = _number(block[124:136], "size", name)
        if kind == b"x":
            _begin_pax(extended, name)
            _read_pax(_extension(tape, size, name), extended, name)
        elif kind == b"g":
            global_headers += 1
            if global_headers > _GLOBALS or extended.pending:
                raise rejected("header", "is one global header too many, or in the wrong place", member=name)
            _read_pax(_extension(tape, size, name), None, name)
        elif kind == b"L":
            _read_long_name(_extension(tape, size, name), extended, name)
        else:
            member = _member(block, name, size, extended, tape, judge)
            extended = _Extended()
            if member is not None:
                end = tape.position + member.size
                yield member
                tape.skip(end - tape.position + -member.size % BLOCK_BYTES)
    if extended.pending:
        raise rejected("header", "ends with an extended header and no member after it")
    _check_end(tape)


def _checked_name(block: bytes) -> bytes:
    """The name as the header itself gives it, after the magic and the checksum were found right."""
    stated = _OCTAL.fullmatch(block[148:156])
    if not stated or int(stated[1], 8) != sum(block) - sum(block[148:156]) + 8 * 0x20:
        raise rejected("corrupt", "has a header whose checksum is wrong", member=block[:100].rstrip(b"\0"))
    raw = _text(block[:100], "name")
    if not all(_UNUSED_NUMBER.fullmatch(block[field]) for field in _UNUSED_NUMBERS):
        raise rejected("header", "has a mode, owner, time or device field that is not a number", member=raw)
    magic = block[257:265]
    if magic == _POSIX:
        prefix = _text(block[345:500], "prefix")
        if block[500:] != _ZEROS[:12]:
            raise rejected("header", "has a header that is neither POSIX nor GNU", member=raw)
        return prefix + b"/" + raw if prefix else raw
    if magic != _GNU:
        raise rejected("header", "has a header that is neither POSIX nor GNU", member=raw)
    if block[345:] != _ZEROS[:167]:
        raise rejected("header", "has GNU fields that mark an incremental, sparse or multi-volume archive", member=raw)
    return raw


def _text(field: bytes, what: str) -> bytes:
    text, _, rest = field.partition(b"\0")
    if rest.strip(b"\0"):
        raise rejected("header", f"has bytes after the end of its {what} field", member=text)
    return text


def _number(field: bytes, what: str, name: bytes) -> int:
    """Octal digits, or GNU's base-256 for what does not fit. Never negative, and below 2**56."""
    if octal := _OCTAL.fullmatch(field):
        return int(octal[1], 8)
    if field[0] == 0x80 and len(field) > 8 and not any(field[1:-7]):
        return int.from_bytes(field[-7:], "big")
    raise rejected("header", f"has a {what} field that is not a number, or out of range", member=name)


def _extension(tape: Tape, size: int, name: bytes) -> bytes:
    if size > _EXTENSION_BYTES:
        raise rejected("header", f"has an extended header of {size} bytes; at most {_EXTENSION_BYTES}", member=name)
    whole = size + -size % BLOCK_BYTES
    data = tape.read(whole)
    if len(data) < whole:
        raise truncated()
    if any(data[size:]):  # some readers go on reading there
        raise rejected("header", "has bytes after the end of its extended header", member=name)
    return data[:size]


def _begin_pax(extended: _Extended, name: bytes) -> None:
    if extended.pending:
        raise rejected("header", "has two extended headers for one member", member=name)
    extended.pax = True


def _read_pax(data: bytes, extended: _Extended | None, name: bytes) -> None:
    """Records `LENGTH KEY=VALUE\\n`. Only path and size are used; times, owners and attributes are left aside, as they
    are in the header itself; whatever else there is could change what the member is, and is refused. `extended`: None
    in a global header, where neither path nor size may stand."""
    seen: set[bytes] = set()
    at = 0
    while at < len(data):
        length = _RECORD_LENGTH.match(data, at, at + 8)
        record = data[length.end() : at + int(length[1])] if length else b""
        key, equals, value = record[:-1].partition(b"=")
        if (
            not length
            or at + int(length[1]) > len(data)
            or record[-1:] != b"\n"
            or not key
            or not equals
            or key in seen
        ):
            raise rejected("header", "has pax records that are not well-formed", member=name)
        seen.add(key)
        at += int(length[1])
        if key == b"path" and extended is not None:
            extended.path = value
        elif key == b"size" and extended is not None:
            if not re.fullmatch(rb"0|[1-9][0-9]{0,15}", value):
                raise rejected("header", "has a pax size that is not a number", member=name)
            extended.size = int(value)
        elif key == b"linkpath":
            raise rejected("link", "is a link", member=name)
        elif key.startswith((b"GNU.sparse.", b"SCHILY.realsize")):
            raise rejected("type", "is a sparse file", member=name)
        elif key not in _PAX_IGNORED and not key.startswith(_PAX_IGNORED_PREFIXES):
            word = key[:40].decode("ascii", "backslashreplace")
            raise rejected("header", f"has a pax record {word!r}, which is not accepted", member=name)


def _read_long_name(data: bytes, extended: _Extended, name: bytes) -> None:
    if extended.pending:
        raise rejected("header", "has two extended headers for one member", member=name)
    long_name = data[:-1]
    if data[-1:] != b"\0" or not long_name or b"\0" in long_name:
        raise rejected("header", "has a long name that is not well-formed", member=name)
    extended.path, extended.long_name = long_name, True


def _member(block: bytes, name: bytes, size: int, extended: _Extended, tape: Tape, judge: Judge) -> Member | None:
    if extended.path is not None:
        name = extended.path
    kind = block[156:157]
    if kind not in b"0\x005" or not kind:
        _refuse_type(kind, name)
    if block[157:257] != _ZEROS[:100]:
        raise rejected("link", "has a link target, and is not a link", member=name)
    if extended.size is not None and extended.size != size:
        raise rejected("header", "has two sizes that do not agree", member=name)
    directory = kind == b"5"
    if directory and size:
        raise rejected("header", "is a directory with content", member=name)
    if name.endswith(b"/") and not directory:
        raise rejected("path", "is a file whose name ends in a slash", member=name)
    mode = _number(block[100:108], "mode", name)
    return judge.member(
        name, directory=directory, executable=bool(mode & 0o100), size=size, offset=tape.position, dot_prefix=True
    )


def _refuse_type(kind: bytes, name: bytes) -> NoReturn:
    only = "only regular files and directories are accepted"
    if kind in _LINKS:
        raise rejected("link", f"is {_LINKS[kind]}; {only}", member=name)
    raise rejected("type", f"is {_TYPES.get(kind, f'of type {kind!r}')}; {only}", member=name)


def _check_end(tape: Tape) -> None:
    """A second block of zeros, and then nothing but blocks of zeros: what tools pad their last record with."""
    if tape.read(BLOCK_BYTES) != _ZEROS:
        raise rejected("corrupt", "ends without the two blocks of zeros that end a tar; it was cut short")
    while not tape.at_end():
        padding = tape.read(CHUNK_BYTES)
        if padding.count(0) != len(padding):
            raise rejected("trailing", "has bytes after the end of its tar")
        if len(padding) % BLOCK_BYTES:
            raise truncated()
