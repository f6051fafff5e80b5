"""PURE: the bytes that go to and come from `init.c`, which has the other side of each.

What comes back is written by our own program, into streams that no guest can open; it is still read as if it were not:
every size is bounded, every word is known, and what makes no sense is `Garbled`.
"""

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from service.core.boundary import StepSpec
from service.core.controls import Limits
from service.core.errors import BoundaryLost

INIT = "/.blastdoor/init"
"""Mode 0111: nobody can look into a process whose program it may not read."""
READABLE_INIT = "/.blastdoor/init-readable"
"""The same for gVisor, which starts no program that its user cannot read. It is not dumpable from its first system call
on; until then a guest might reach its streams, and could add to what is its own output anyway."""
REQUEST_BYTES = 2 * 2**20
STRINGS = 8192
_REQUEST = struct.Struct("<IIIQQQQ")
_INCOMING = struct.Struct("<BHQ")
_FRAME = struct.Struct("<cI")
_FOUND = struct.Struct("<BHIQ")
_COUNT = struct.Struct("<Q")
_OWN_INODES = 3
"""Of the volume: its root, /work and /tmp."""
_FRAME_BYTES = 64 * 1024
_PAGE = 4096
_OURS = 3
"""Processes with the guest's uid while a step runs, beside its own: the one that holds the pod's namespaces (`pause`),
our first, and the one that watches the step."""
_ALWAYS = {"took_ms", "cpu_us", "tasks", "disk_full"}
_KNOWN = {"exited", "signalled", "not_started", "oom_kills", "peak_bytes"} | _ALWAYS


class Garbled(BoundaryLost):
    """What came is not what our program writes."""


# --- to it ----------------------------------------------------------------------------------------------------------


def step_request(step: StepSpec, limits: Limits) -> bytes | None:
    """What `init step` reads before the step's stdin; None when the words are more than it takes."""
    words = [word.encode() for word in (*step.argv, *(f"{key}={value}" for key, value in step.env.items()))]
    strings = b"".join(word + b"\0" for word in words)
    if len(strings) > REQUEST_BYTES or len(words) > STRINGS:
        return None
    sizes = (len(strings), len(step.argv), len(step.env), len(step.stdin))
    return _REQUEST.pack(*sizes, limits.pids + _OURS, limits.open_files, limits.disk + _PAGE) + strings


def incoming_directory(path: str) -> bytes:
    return _incoming(b"D", path, 0)


def incoming_file(path: str, *, size: int, executable: bool) -> bytes:
    """`size` bytes of content follow."""
    return _incoming(b"X" if executable else b"F", path, size)


def incoming_end() -> bytes:
    return _incoming(b"E", "", 0)


def _incoming(what: bytes, path: str, size: int) -> bytes:
    name = path.encode()
    return _INCOMING.pack(what[0], len(name), size) + name


def fetch_request(paths: Sequence[bytes]) -> bytes:
    return struct.pack("<I", len(paths)) + b"".join(struct.pack("<H", len(path)) + path for path in paths)


# --- from it --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Report:
    """How a step ended, by the kernel's wait status, and what was seen meanwhile. Exactly one of the first three is
    set; `not_started` is an errno. `took_s` is by the clock in the pod. `oom_kills` and `peak_bytes` are the
    container's so far; None where it has no such file."""

    exited: int | None
    signalled: int | None
    not_started: int | None
    took_s: float
    cpu_s: float
    tasks: int
    disk_full: bool
    oom_kills: int | None
    peak_bytes: int | None

    @property
    def status(self) -> int:
        """What the node must say of our program's end, if this report is true."""
        if self.not_started is not None:
            return 127
        if self.signalled is not None:
            return 128 + self.signalled
        assert self.exited is not None
        return self.exited


@dataclass
class Frames:
    """Takes what `init step` writes, as it comes, apart."""

    streams: Mapping[str, Callable[[bytes], None]]
    """`o` and `e` to who is told its bytes."""
    report: Report | None = None
    files: int = 0
    """Files and directories in /work and /tmp, when they were counted last."""
    _pending: bytearray = field(default_factory=bytearray)

    def feed(self, chunk: bytes) -> None:
        """Raises Garbled."""
        self._pending += chunk
        while len(self._pending) >= _FRAME.size:
            kind, size = _FRAME.unpack_from(self._pending)
            if size > _FRAME_BYTES or self.report is not None:
                raise Garbled("a step's frame is too long, or comes after the last one")
            if len(self._pending) < _FRAME.size + size:
                return
            data = bytes(self._pending[_FRAME.size : _FRAME.size + size])
            del self._pending[: _FRAME.size + size]
            if kind == b"s":
                self.report = read_report(data)
            elif kind == b"f" and size == _COUNT.size:
                self.files = max(_COUNT.unpack(data)[0] - _OWN_INODES, 0)
            elif (tell := self.streams.get(kind.decode("latin-1"))) is not None:
                tell(data)
            else:
                raise Garbled(f"a step's frame is of no known kind: {kind!r}")


def read_report(data: bytes) -> Report:
    """Raises Garbled."""
    try:
        rows = dict(line.split(" ") for line in data.decode("ascii").splitlines())
        values = {key: int(value) for key, value in rows.items()}
    except ValueError as error:
        raise Garbled(f"a step's report cannot be read: {error}") from error
    ends = [key for key in ("exited", "signalled", "not_started") if key in values]
    if len(ends) != 1 or set(values) - _KNOWN or not set(values) >= _ALWAYS:
        raise Garbled(f"a step's report has the wrong lines: {sorted(values)}")
    return Report(
        exited=values.get("exited"),
        signalled=values.get("signalled"),
        not_started=values.get("not_started"),
        took_s=values["took_ms"] / 1e3,
        cpu_s=values["cpu_us"] / 1e6,
        tasks=values["tasks"],
        disk_full=bool(values["disk_full"]),
        oom_kills=values.get("oom_kills"),
        peak_bytes=values.get("peak_bytes"),
    )


@dataclass(frozen=True)
class Found:
    """One thing below /work. `what`: D directory, F file, L link, P fifo, S socket, V device, ? something else."""

    path: bytes
    what: str
    links: int
    size: int


@dataclass(frozen=True)
class Listing:
    found: Sequence[Found]
    complete: bool


def read_listing(data: bytes) -> Listing:
    """Raises Garbled, also when it was cut short."""
    found: list[Found] = []
    at = 0
    for what, path_bytes, links, size in _records(data):
        at += _FOUND.size
        path = data[at : at + path_bytes]
        at += path_bytes
        if what in "ET":
            if at != len(data) or path:
                raise Garbled("a listing goes on after its end")
            return Listing(found, complete=what == "E")
        if what not in "DFLPSV?" or not path or path.startswith(b"/") or b".." in path.split(b"/"):
            raise Garbled("a listing names what cannot be below /work")
        found.append(Found(path, what, links, size))
    raise Garbled("a listing was cut short")


def _records(data: bytes) -> Iterator[tuple[str, int, int, int]]:
    at = 0
    while at + _FOUND.size <= len(data):
        what, path_bytes, links, size = _FOUND.unpack_from(data, at)
        if at + _FOUND.size + path_bytes > len(data):
            return
        at += _FOUND.size + path_bytes
        yield chr(what), path_bytes, links, size


def read_finding(data: bytes) -> tuple[int, float]:
    """What `init wait` prints -> (how often the listener was reached before policy was in force, after how many seconds
    it could not be any more). Raises Garbled."""
    words = data.decode("ascii", "replace").split()
    if len(words) != 3 or words[0] != "shut" or not (words[1].isdigit() and words[2].isdigit()):
        raise Garbled(f"the first process said of network policy: {data[:80]!r}")
    return int(words[1]), int(words[2]) / 1000
