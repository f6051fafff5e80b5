"""What is kept of a stream that may be endless: its head and its tail, each up to half of the limit, and a count."""

from collections import deque
from collections.abc import Callable

from service.core.boundary import Capture


class HeadAndTail:
    """Memory stays below the limit and one chunk, whatever is written. `tell` is told each chunk as it comes."""

    def __init__(self, limit_bytes: int, *, tell: Callable[[bytes], None] | None = None) -> None:
        self._tell = tell
        self._head_limit = limit_bytes - limit_bytes // 2
        self._tail_limit = limit_bytes // 2
        self._head = bytearray()
        self._tail: deque[bytes] = deque()
        self._tail_bytes = 0
        self.total_bytes = 0

    def add(self, chunk: bytes) -> None:
        self.total_bytes += len(chunk)
        if self._tell is not None:
            self._tell(chunk)
        room = self._head_limit - len(self._head)
        if room > 0:
            self._head += chunk[:room]
            chunk = chunk[room:]
        if not chunk:
            return
        self._tail.append(chunk)
        self._tail_bytes += len(chunk)
        while self._tail and self._tail_bytes - len(self._tail[0]) >= self._tail_limit:
            self._tail_bytes -= len(self._tail.popleft())

    def capture(self) -> Capture:
        tail = b"".join(self._tail)
        kept = tail[-self._tail_limit :] if self._tail_limit else b""
        return Capture(head=bytes(self._head), tail=kept, total_bytes=self.total_bytes)
