"""What an archive may hold, whatever its format: the caps, the rules of names, and the roll that finds clashing ones.

Every name is judged as it stands and either used as it stands or refused; nothing is cleaned, folded or shortened. The
one spelling that is taken for another is the leading `./` of a tar (see `Judge.member`).
"""

import re
import time
import unicodedata
from dataclasses import dataclass
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from service.core.errors import BundleRejected

SHOWN_CHARS = 200
_PLAIN = re.compile(r"[ -\[\]-~]+", re.ASCII)
"""Printable ASCII but the backslash: what nearly every name is made of."""
_DRIVE = re.compile(r"[A-Za-z]:", re.ASCII)
_FORBIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_JOINERS = frozenset("\u200c\u200d")
"""Format characters that ordinary words of some scripts, and emoji, are written with."""
_CLOCK_EVERY = 16
_BLOCK_BYTES = 4096


class ArchiveCaps(BaseModel):
    """Sizes in bytes. `ratio` applies to what expands beyond `ratio_floor_bytes`. `cpu_s`: of the calling thread."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    total_bytes: int = 256 * 2**20
    file_bytes: int = 64 * 2**20
    entries: int = 10_000
    depth: int = 32
    name_bytes: int = 255
    path_bytes: int = 1024
    ratio: int = 50
    ratio_floor_bytes: int = 64 * 2**20
    cpu_s: float = 20.0


@dataclass(frozen=True)
class ArchiveSummary:
    """`files` regular files; `entries` everything that unpacking makes: files and directories, those too that are only
    implied by a longer name, so that it bounds the inodes; `content_bytes` what was really produced by unpacking;
    `disk_bytes` what that takes of a file system: each file's content in whole blocks of 4 KiB (tmpfs(5): pages, and
    none for a directory)."""

    files: int
    entries: int
    content_bytes: int
    disk_bytes: int


class Member(NamedTuple):
    """One judged member. `path` is canonical: parts joined by single slashes. `offset`: of its content in the tape
    (tar) or of its compressed bytes in the file (zip). The last three are a zip's."""

    path: str
    directory: bool
    executable: bool
    size: int
    offset: int
    packed_size: int = 0
    crc: int = 0
    deflated: bool = False


def shown(name: str | bytes) -> str:
    """A member's name for people: whatever is not plainly printable is escaped, and at most 200 characters."""
    text = name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else name
    escaped = repr(text[: SHOWN_CHARS + 1])[1:-1]
    return escaped if len(escaped) <= SHOWN_CHARS else escaped[: SHOWN_CHARS - 3] + "..."


def rejected(rule: str, why: str, *, member: str | bytes | None = None) -> BundleRejected:
    """The refusal: `why` in words that end a sentence about the member, or about the bundle when there is none."""
    if member is None:
        return BundleRejected(f"the bundle {why} (rule: {rule})", rule=rule)
    return BundleRejected(f"member '{shown(member)}' {why} (rule: {rule})", rule=rule, member=shown(member))


class Meter:
    """Counts what decompression really produces, and the time it takes, against the caps: one for each pass."""

    def __init__(self, caps: ArchiveCaps, *, archive_bytes: int) -> None:
        self._caps = caps
        self._archive_bytes = max(archive_bytes, 1)
        self._cpu_until = time.thread_time() + caps.cpu_s
        self._since_clock = 0
        self.produced = 0
        # A tar's own headers and padding, which no member's size counts: never more than this for what is accepted.
        self._most = caps.total_bytes + caps.entries * 4096 + 2**20

    def again(self) -> "Meter":
        """For a second pass: the bytes are counted anew, the time goes on."""
        other = Meter(self._caps, archive_bytes=self._archive_bytes)
        other._cpu_until = self._cpu_until
        return other

    def add(self, produced: int) -> None:
        """Called for every piece before it is used. Raises BundleRejected."""
        self.produced += produced
        self.expands_to(self.produced)
        if self.produced > self._most:
            raise rejected("size", f"expands to more than {self._most} bytes")
        self.check_clock()

    def expands_to(self, size: int) -> None:
        """The ratio rule, on what is declared or on what was produced."""
        if size > self._caps.ratio_floor_bytes and size > self._caps.ratio * self._archive_bytes:
            times = size // self._archive_bytes
            raise rejected("bomb", f"expands to {size} bytes or more, {times} times its own size")

    def tick(self) -> None:
        """`check_clock`, for what is so short that reading the clock each time would be most of the work."""
        self._since_clock += 1
        if self._since_clock >= _CLOCK_EVERY:
            self._since_clock = 0
            self.check_clock()

    def check_clock(self) -> None:
        if time.thread_time() > self._cpu_until:
            raise rejected("cpu", f"takes more than {self._caps.cpu_s:g} s of processor time to read")


class _Node:
    """A name on the roll. `children` is None for a file; `listed` is False for a directory only implied so far."""

    __slots__ = ("children", "listed", "name")

    def __init__(self, name: str, *, directory: bool, listed: bool) -> None:
        self.name = name
        self.children: dict[str, _Node] | None = {} if directory else None
        self.listed = listed


class Judge:
    """The whole set of members, judged one at a time as the headers are read. Nothing is written before all are in."""

    def __init__(self, caps: ArchiveCaps, *, meter: Meter) -> None:
        self._caps = caps
        self._meter = meter
        self._root = _Node("", directory=True, listed=False)
        self.files = 0
        self.entries = 0
        self.declared_bytes = 0
        self.declared_blocks = 0

    def member(
        self, raw: bytes, *, directory: bool, executable: bool, size: int, offset: int, dot_prefix: bool = False
    ) -> Member | None:
        """Judge one header. `dot_prefix`: a leading `./` (once), as `tar -C dir .` writes, is taken for what it means,
        and `./` itself for the root, for which there is nothing to make: None. Raises BundleRejected."""
        self._meter.tick()
        name = self._decoded(raw)
        if dot_prefix and name.startswith("./"):
            name = name[2:]
        if directory:
            name = name.removesuffix("/")
            if dot_prefix and raw in (b"./", b"."):
                self._enrol_root(raw)
                return None
        parts = self._parts(name, raw)
        self._enrol(parts, raw, directory=directory)
        if not directory:
            self._weigh(size, raw)
        return Member(name, directory, executable, size, offset)

    def summary(self, content_bytes: int) -> ArchiveSummary:
        return ArchiveSummary(
            files=self.files, entries=self.entries, content_bytes=content_bytes,
            disk_bytes=self.declared_blocks * _BLOCK_BYTES,
        )  # fmt: skip

    def _decoded(self, raw: bytes) -> str:
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise rejected("name", "has a name that is not UTF-8", member=raw) from None
        if not _PLAIN.fullmatch(name):
            if not name:
                raise rejected("path", "has an empty name", member=raw)
            if "\\" in name:
                raise rejected("path", "has a backslash in its name", member=raw)
            for char in name:
                if unicodedata.category(char) in _FORBIDDEN_CATEGORIES and char not in _JOINERS:
                    raise rejected("name", f"has a control or format character (U+{ord(char):04X})", member=raw)
        return name

    def _parts(self, name: str, raw: bytes) -> list[str]:
        if name.startswith("/"):
            raise rejected("path", "has an absolute path", member=raw)
        if _DRIVE.match(name):
            raise rejected("path", "has a drive letter in its path", member=raw)
        parts = name.split("/")
        for part in parts:
            if part in ("", ".", ".."):
                raise rejected("path", f"has a part {part!r} in its path", member=raw)
        if len(parts) > self._caps.depth:
            raise rejected("depth", f"is {len(parts)} levels deep; at most {self._caps.depth}", member=raw)
        if len(raw) > self._caps.path_bytes:
            raise rejected("name", f"has a path of {len(raw)} bytes; at most {self._caps.path_bytes}", member=raw)
        if len(raw) > self._caps.name_bytes:
            longest = max(len(part.encode()) for part in parts)
            if longest > self._caps.name_bytes:
                raise rejected("name", f"has a name of {longest} bytes; at most {self._caps.name_bytes}", member=raw)
        return parts

    def _enrol_root(self, raw: bytes) -> None:
        if self._root.listed:
            raise rejected("duplicate", "stands in the archive twice", member=raw)
        self._root.listed = True

    def _enrol(self, parts: list[str], raw: bytes, *, directory: bool) -> None:
        siblings = self._root.children
        last = len(parts) - 1
        for depth, part in enumerate(parts):
            if siblings is None:
                raise rejected("clash", "stands below another member that is a file", member=raw)
            is_last = depth == last
            key = _folded(part)
            node = siblings.get(key)
            if node is None:
                self._count(raw)
                node = siblings[key] = _Node(part, directory=directory or not is_last, listed=is_last)
            elif node.name != part:
                other = shown(node.name)
                raise rejected("clash", f"differs from '{other}' only in case or in Unicode form", member=raw)
            elif is_last:
                if directory is not (node.children is not None):
                    raise rejected("clash", "is both a file and a directory", member=raw)
                if node.listed:
                    raise rejected("duplicate", "stands in the archive twice", member=raw)
                node.listed = True
            siblings = node.children

    def _count(self, raw: bytes) -> None:
        self.entries += 1
        if self.entries > self._caps.entries:
            raise rejected("count", f"is one too many: at most {self._caps.entries} files and directories", member=raw)

    def _weigh(self, size: int, raw: bytes) -> None:
        self.files += 1
        self.declared_bytes += size
        self.declared_blocks += -(-size // _BLOCK_BYTES)
        self._meter.expands_to(self.declared_bytes)
        if size > self._caps.file_bytes:
            raise rejected("size", f"is {size} bytes; at most {self._caps.file_bytes} in one file", member=raw)
        if self.declared_bytes > self._caps.total_bytes:
            raise rejected("size", f"brings the content beyond {self._caps.total_bytes} bytes in all", member=raw)


def _folded(part: str) -> str:
    """Equal for names that some file system, or some reader of the archive, would take for the same."""
    if part.isascii():
        return part.lower()
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", part).casefold())
