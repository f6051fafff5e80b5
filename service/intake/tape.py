"""The bytes of a tar, front to back, from a plain file or out of a decompressor; in memory never more than a chunk.

gzip: one member, nothing after it. zstd: one frame, nothing after it, a bounded window, no dictionary. Both
decompressors are asked for bounded output, so a small input cannot become a large buffer; every piece is metered
before it is used.
"""

import io
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import zstandard

from service.core.errors import BundleRejected
from service.intake.beneath import write_all
from service.intake.members import Meter, rejected

CHUNK_BYTES = 256 * 1024
INPUT_BYTES = 64 * 1024
MAX_ZSTD_WINDOW_BYTES = 8 * 2**20
"""What every decoder is to support (RFC 8878 section 3.1.1.1.2), and what `zstd -19` uses."""
_ZSTD_BLOCK_BYTES = 128 * 1024


class Tape(Protocol):
    @property
    def position(self) -> int: ...

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes, or fewer at the end of the tape."""
        ...

    def pieces(self, size: int) -> Iterator[bytes | memoryview]:
        """Exactly `size` bytes in pieces. Raises BundleRejected(corrupt) when the tape ends before."""
        ...

    def skip(self, size: int) -> None: ...

    def at_end(self) -> bool: ...


class FileTape:
    """A plain tar: what is skipped is not read."""

    def __init__(self, fd: int, *, size: int) -> None:
        self._fd = fd
        self._size = size
        self.position = 0

    def read(self, size: int) -> bytes:
        data = os.pread(self._fd, size, self.position)
        self.position += len(data)
        return data

    def pieces(self, size: int) -> Iterator[bytes | memoryview]:
        while size:
            piece = os.pread(self._fd, min(size, CHUNK_BYTES), self.position)
            if not piece:
                raise truncated()
            self.position += len(piece)
            size -= len(piece)
            yield piece

    def skip(self, size: int) -> None:
        self.position += size
        if self.position > self._size:
            raise truncated()

    def at_end(self) -> bool:
        return self.position >= self._size


class StreamTape:
    """A compressed tar: chunks as they come out of the decompressor."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._chunk = memoryview(b"")
        self._at = 0
        self.position = 0

    def read(self, size: int) -> bytes:
        if self._at + size <= len(self._chunk):
            data = bytes(self._chunk[self._at : self._at + size])
            self._at += size
            self.position += size
            return data
        kept = []
        while size and self._more():
            piece = self._chunk[self._at : self._at + size]
            self._at += len(piece)
            self.position += len(piece)
            size -= len(piece)
            kept.append(piece)
        return b"".join(kept)

    def pieces(self, size: int) -> Iterator[bytes | memoryview]:
        while size:
            if not self._more():
                raise truncated()
            piece = self._chunk[self._at : self._at + size]
            self._at += len(piece)
            self.position += len(piece)
            size -= len(piece)
            yield piece

    def skip(self, size: int) -> None:
        if self._at + size <= len(self._chunk):
            self._at += size
            self.position += size
            return
        for _ in self.pieces(size):
            pass

    def at_end(self) -> bool:
        return not self._more()

    def _more(self) -> bool:
        while self._at >= len(self._chunk):
            chunk = next(self._chunks, None)
            if chunk is None:
                return False
            self._chunk, self._at = memoryview(chunk), 0
        return True


class Kept:
    """Passes chunks through and keeps them, so that what was judged once need not be decompressed again: a few in
    memory, many in a file without a name on the archive's own file system, which no crash can leave behind. Where that
    cannot be (read-only, full) nothing is kept."""

    def __init__(self, chunks: Iterator[bytes], *, directory: Path, memory_bytes: int) -> None:
        self._source = chunks
        self._directory = directory
        self._memory_bytes = memory_bytes
        self._chunks: list[bytes] | None = []
        self._fd: int | None = None
        self._size = 0
        self._ended = False

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._source:
            self._keep(chunk)
            yield chunk
        self._ended = True

    def tape(self) -> Tape | None:
        """The same bytes once more, when they were read to the end and kept."""
        if not self._ended:
            return None
        if self._chunks is not None:
            return StreamTape(iter(self._chunks))
        return FileTape(self._fd, size=self._size) if self._fd is not None else None

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
        self._chunks = self._fd = None

    def _keep(self, chunk: bytes) -> None:
        self._size += len(chunk)
        try:
            if self._chunks is not None:
                self._chunks.append(chunk)
                if self._size > self._memory_bytes:
                    kept, self._chunks = self._chunks, None
                    self._fd = os.open(self._directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
                    for one in kept:
                        write_all(self._fd, one)
            elif self._fd is not None:
                write_all(self._fd, chunk)
        except OSError:
            self.close()


def gunzip(fd: int, *, size: int, meter: Meter) -> Iterator[bytes]:
    """The content of a file that is one gzip member and nothing else; zlib checks its CRC and its length."""
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 16)
    pending, offset = b"", 0
    while not inflater.eof:
        if not pending:
            pending = os.pread(fd, INPUT_BYTES, offset)
            offset += len(pending)
        try:
            chunk = inflater.decompress(pending, CHUNK_BYTES)
        except zlib.error as error:
            raise rejected("corrupt", "is not sound gzip data") from error
        if not pending and not chunk and not inflater.eof:
            raise truncated()
        pending = inflater.unconsumed_tail
        meter.add(len(chunk))
        if chunk:
            yield chunk
    if inflater.unused_data or pending or offset < size:
        raise rejected("trailing", "has bytes after its gzip member; it must be a single one")


def unzstd(fd: int, *, size: int, meter: Meter) -> Iterator[bytes]:
    """The content of a file that is one zstd frame and nothing else."""
    declared = _measure_frame(fd, size=size, meter=meter)
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW_BYTES)
    source = io.FileIO(os.dup(fd), "rb")
    produced = 0
    try:
        source.seek(0)
        with decompressor.stream_reader(source, read_size=_ZSTD_BLOCK_BYTES, closefd=False) as reader:
            while chunk := reader.read(CHUNK_BYTES):
                meter.add(len(chunk))
                produced += len(chunk)
                yield chunk
    except zstandard.ZstdError as error:
        raise rejected("corrupt", "is not sound zstd data") from error
    finally:
        source.close()
    if declared is not None and produced != declared:
        raise rejected("corrupt", "does not expand to the size that its zstd header tells")


def _measure_frame(fd: int, *, size: int, meter: Meter) -> int | None:
    """Walk the frame's blocks (RFC 8878 section 3.1.1) without decompressing them: it must end where the file ends.
    -> the content size that the header declares, if it does."""
    head = os.pread(fd, 18, 0)
    try:
        parameters = zstandard.get_frame_parameters(head)
        header_bytes = zstandard.frame_header_size(head)
    except zstandard.ZstdError as error:
        raise rejected("corrupt", "is not sound zstd data") from error
    if parameters.dict_id:
        raise rejected("format", "is zstd data that needs a dictionary")
    if parameters.window_size > MAX_ZSTD_WINDOW_BYTES:
        mib = MAX_ZSTD_WINDOW_BYTES // 2**20
        raise rejected("format", f"is zstd data with a window beyond {mib} MiB; compress it without --long or --ultra")
    offset = header_bytes
    last = False
    while not last:
        meter.tick()
        block = os.pread(fd, 3, offset)
        if len(block) < 3:
            raise truncated()
        word = int.from_bytes(block, "little")
        last, kind, length = bool(word & 1), word >> 1 & 3, word >> 3
        if kind == 3 or length > _ZSTD_BLOCK_BYTES:
            raise rejected("corrupt", "is not sound zstd data")
        offset += 3 + (1 if kind == 1 else length)
    offset += 4 if parameters.has_checksum else 0
    if offset > size:
        raise truncated()
    if offset < size:
        raise rejected("trailing", "has bytes after its zstd frame; it must be a single one")
    unknown = parameters.content_size == zstandard.CONTENTSIZE_UNKNOWN
    return None if unknown else parameters.content_size


def truncated() -> BundleRejected:
    return rejected("corrupt", "ends too early; it was cut short")
