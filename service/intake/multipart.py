"""Receipt of one submission (`multipart/form-data`), streamed: the bundle to a file while it is hashed, the documents
to memory.

Of the parser only its callbacks are used, which see bytes as they come; nothing is spooled, guessed or kept beyond the
caps. The bundle is written and hashed in a thread, a buffer at a time, and the client is read no faster than that; so
an upload of any size holds about two buffers of memory, and no event loop waits for a disk.
"""

import asyncio
import contextlib
import errno
import hashlib
import os
from collections.abc import AsyncIterable
from dataclasses import dataclass
from pathlib import Path

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.core.errors import DocumentInvalid, StorageFull, TooLarge
from service.intake.complaints import printable
from service.intake.documents import MAX_CONTROLS_BYTES, MAX_SCENARIO_BYTES

BUNDLE_FILE = "bundle"
_BUFFER_BYTES = 512 * 1024
_MAX_HEADERS = 8
_MAX_HEADER_BYTES = 1024
_PARTS = ("bundle", "scenario", "controls", "metadata")
_PLAIN_ENCODINGS = frozenset({b"", b"7bit", b"8bit", b"binary"})


@dataclass(frozen=True)
class UploadCaps:
    """Bytes received, and the seconds that the whole upload may take. `total_bytes` counts the framing too."""

    bundle_bytes: int = 50 * 2**20
    scenario_bytes: int = MAX_SCENARIO_BYTES
    controls_bytes: int = MAX_CONTROLS_BYTES
    metadata_bytes: int = 64 * 2**10
    framing_bytes: int = 16 * 2**10
    deadline_s: float = 120.0

    @property
    def total_bytes(self) -> int:
        return self.framing_bytes + sum(self.of(part) for part in _PARTS)

    def of(self, part: str) -> int:
        most: int = getattr(self, f"{part}_bytes")
        return most


@dataclass(frozen=True)
class Upload:
    """What arrived. `bundle_path` is in the staging directory it was sent to, and goes with that; `bundle_digest` is
    `sha256:<hex>` of exactly those bytes. A part that was not sent is None."""

    bundle_path: Path | None = None
    bundle_digest: str | None = None
    bundle_bytes: int = 0
    scenario: bytes | None = None
    controls: bytes | None = None
    metadata: bytes | None = None


class UploadTimedOut(DocumentInvalid):
    """The upload was not complete by its deadline."""

    def __init__(self, seconds: float) -> None:
        super().__init__("request", [{"path": "", "message": f"should be uploaded within {seconds:g} s"}])
        self.code = "upload_timed_out"


async def receive_upload(
    chunks: AsyncIterable[bytes],
    *,
    content_type: str,
    staging: Path,
    caps: UploadCaps,
    content_length: int | None = None,
) -> Upload:
    """Read a request's body to its end. `staging`: an existing private directory of this request.

    Raises TooLarge (as soon as it is known, from `content_length` before a byte is read), DocumentInvalid("request")
    that names the part, UploadTimedOut, StorageFull, and whatever `chunks` raises. Then nothing is left in `staging`.
    """
    boundary = _boundary(content_type)
    if content_length is not None and content_length > caps.total_bytes:
        raise TooLarge(f"the request is {content_length} bytes; at most {caps.total_bytes}")
    with _Sink(staging / BUNDLE_FILE) as sink:
        reader = _Reader(boundary, sink, caps)
        try:
            async with asyncio.timeout(caps.deadline_s):
                async for chunk in chunks:
                    reader.feed(chunk)
                    if sink.buffered_bytes >= _BUFFER_BYTES:
                        await _in_thread(sink)
                if sink.buffered_bytes:
                    await _in_thread(sink)
        except TimeoutError:
            raise UploadTimedOut(caps.deadline_s) from None
        upload = reader.finished()
        sink.keep()
    return upload


async def _in_thread(sink: "_Sink") -> None:
    """Write what is buffered. A cancelled caller still waits for the thread, which holds the file: at most one
    buffer."""
    writing = asyncio.get_running_loop().run_in_executor(None, sink.write_out)
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        while not writing.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([writing])
        writing.exception()  # was looked at; the cancellation is what is told
        raise


def _refused(part: str | None, message: str) -> DocumentInvalid:
    return DocumentInvalid("request", [{"path": printable(part) if part else "", "message": message}])


def _boundary(content_type: str) -> bytes:
    try:
        kind, options = parse_options_header(content_type)
    except UnicodeEncodeError:
        raise _refused(None, "should have a Content-Type in ASCII") from None
    if kind != b"multipart/form-data":
        raise _refused(None, f"should be multipart/form-data; it is '{printable(content_type)}'")
    boundary = options.get(b"boundary", b"")
    if not 0 < len(boundary) <= 70:
        raise _refused(None, "should have a boundary of 1 to 70 characters in its Content-Type")
    return boundary


class _Sink:
    """The bundle's file. Bytes are buffered on the event loop's side and written and hashed on a thread's, in turns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self.buffered_bytes = 0
        self._buffers: list[bytes] = []
        self._fd: int | None = None
        self._hash = hashlib.sha256()
        self._kept = False

    def __enter__(self) -> "_Sink":
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd is not None:
            os.close(self._fd)
            if not self._kept:
                os.unlink(self.path)

    @property
    def opened(self) -> bool:
        return self._fd is not None

    @property
    def digest(self) -> str:
        return f"sha256:{self._hash.hexdigest()}"

    def open(self) -> None:
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    def add(self, data: bytes) -> None:
        self._buffers.append(data)
        self.buffered_bytes += len(data)
        self.size += len(data)

    def write_out(self) -> None:
        """Runs in a thread, never while the loop's side touches the buffers. Raises StorageFull."""
        assert self._fd is not None
        data = b"".join(self._buffers)
        self._buffers.clear()
        self.buffered_bytes = 0
        self._hash.update(data)
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageFull("there is no room for the upload") from error
            raise

    def keep(self) -> None:
        self._kept = True


class _Reader:
    """Takes the parser's callbacks, which come in the order of the bytes."""

    def __init__(self, boundary: bytes, sink: _Sink, caps: UploadCaps) -> None:
        self._sink = sink
        self._caps = caps
        self._closing = b"--" + boundary + b"--"
        self._tail = b""
        self._received = 0
        self._ended = False
        self._headers: dict[bytes, bytes] = {}
        self._field, self._value = bytearray(), bytearray()
        self._part: str | None = None
        self._part_bytes = 0
        self._seen: set[str] = set()
        self._documents: dict[str, bytearray] = {}
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begins,
                "on_header_field": lambda data, start, end: self._field.extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                "on_header_end": self._header_ends,
                "on_headers_finished": self._headers_end,
                "on_part_data": self._part_data,
                "on_part_end": self._part_ends,
                "on_end": self._end,
            },
            max_header_count=_MAX_HEADERS,
            max_header_size=_MAX_HEADER_BYTES,
        )

    def feed(self, chunk: bytes) -> None:
        self._received += len(chunk)
        if self._received > self._caps.total_bytes:
            raise TooLarge(f"the request is larger than {self._caps.total_bytes} bytes")
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise _refused(self._part, f"should be well-formed multipart/form-data: {printable(str(error))}") from None
        self._tail = (self._tail + chunk[-len(self._closing) - 2 :])[-len(self._closing) - 2 :]

    def finished(self) -> Upload:
        if not self._ended:
            raise _refused(self._part, "should end with its closing boundary; the body was cut short")
        if not self._tail.removesuffix(b"\r\n").endswith(self._closing):
            raise _refused(None, "should have nothing after its closing boundary")
        sent = self._sink.opened
        return Upload(
            bundle_path=self._sink.path if sent else None,
            bundle_digest=self._sink.digest if sent else None,
            bundle_bytes=self._sink.size,
            scenario=self._document("scenario"),
            controls=self._document("controls"),
            metadata=self._document("metadata"),
        )

    def _document(self, part: str) -> bytes | None:
        return bytes(self._documents[part]) if part in self._documents else None

    def _part_begins(self) -> None:
        self._headers.clear()
        self._part, self._part_bytes = None, 0

    def _header_ends(self) -> None:
        name = bytes(self._field).lower()
        if name in self._headers:
            raise _refused(None, f"a part has two headers {printable(name.decode('ascii', 'replace'))}")
        self._headers[name] = bytes(self._value).strip()
        self._field.clear()
        self._value.clear()

    def _headers_end(self) -> None:
        kind, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if kind != b"form-data" or not name:
            raise _refused(None, 'each part should have a header Content-Disposition: form-data; name="..."')
        if name not in _PARTS:
            raise _refused(name, f"is no part of a submission; the parts are {', '.join(_PARTS)}")
        if name in self._seen:
            raise _refused(name, "should be sent once")
        if self._headers.get(b"content-transfer-encoding", b"").lower() not in _PLAIN_ENCODINGS:
            raise _refused(name, "should be sent as it is, without a Content-Transfer-Encoding")
        self._seen.add(name)
        self._part = name
        if name == "bundle":
            self._sink.open()
        else:
            self._documents[name] = bytearray()

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        part = self._part
        assert part is not None  # the parser calls _headers_end before any data
        self._part_bytes += end - start
        most = self._caps.of(part)
        if self._part_bytes > most:
            raise TooLarge(f"the part {part} is larger than {most} bytes")
        if part == "bundle":
            self._sink.add(data[start:end])
        else:
            self._documents[part] += data[start:end]

    def _part_ends(self) -> None:
        self._part = None

    def _end(self) -> None:
        self._ended = True
