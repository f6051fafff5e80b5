"""Following a run: one iterator of events over as many connections as it takes.

A connection that breaks, ends early or falls silent is made again from the last event that was seen; the service tells
what came after that, no more and no less. What comes twice all the same is dropped.
"""

import time
from collections.abc import Callable, Iterator

import httpx

from service.client.connection import Connection
from service.client.errors import ClientError, NotBlastdoor, ServiceFailed, Unreachable
from service.client.events import Event, Messages, ResultEvent, order, read_event

MEDIA_TYPE = "text/event-stream"
SILENT_S = 45.0
"""The service says something every 15 s; after three times that the connection is dead."""
PATIENCE_S = 60.0
QUIET_S = 2.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0

Lost = Callable[[ClientError], None]


class Following:
    """One run's stream. Iterate once."""

    def __init__(
        self,
        connection: Connection,
        path: str,
        *,
        last_event_id: str | None = None,
        patience_s: float = PATIENCE_S,
        silent_s: float = SILENT_S,
        on_lost: Lost | None = None,
    ) -> None:
        self._connection, self._path = connection, path
        self._last = last_event_id
        self._seen = order(last_event_id) if last_event_id is not None else None
        self._patience_s, self._silent_s = patience_s, silent_s
        self._on_lost = on_lost
        self._over = False
        self._alive_at = time.monotonic()
        self._pause_s = _FIRST_PAUSE_S

    def __iter__(self) -> Iterator[Event]:
        """Ends with the ResultEvent, or at once when that was seen. Raises Problem, and Unreachable when there was no
        sign of life for so long."""
        while True:
            try:
                for event in self.once():
                    yield event
                    if isinstance(event, ResultEvent):
                        return
                if self._over:
                    return
                self._go_on_after(Unreachable(f"{self._connection.url} closed the stream before the run's end"))
            except NotBlastdoor:
                raise
            except (Unreachable, ServiceFailed) as error:
                self._go_on_after(error)

    def so_far(self) -> Iterator[Event]:
        """What one connection brings until it falls silent, or the run is finished."""
        try:
            for event in self.once():
                yield event
                if isinstance(event, ResultEvent):
                    return
        except Unreachable as error:
            if not isinstance(error.__cause__, httpx.ReadTimeout):
                raise

    def once(self) -> Iterator[Event]:
        """What one connection brings, without those that were seen. Raises Problem, Unreachable."""
        headers = {} if self._last is None else {"Last-Event-ID": self._last}
        timeout = self._connection.timeout(silent_s=self._silent_s)
        with self._connection.download(self._path, accept=MEDIA_TYPE, headers=headers, timeout=timeout) as answer:
            if answer.status_code == 204:  # there is nothing after that id, and never will be
                self._over = True
                return
            kind = answer.headers.get("Content-Type", "").partition(";")[0].strip()
            if kind != MEDIA_TYPE:
                raise NotBlastdoor(f"{self._connection.url} answered with {kind!r} where a stream of events was asked")
            messages = Messages()
            for piece in self._connection.pieces(answer):
                for message in messages.feed(piece):
                    self._alive_at, self._pause_s = time.monotonic(), _FIRST_PAUSE_S
                    event = read_event(message) if message.kind else None
                    if event is not None and self._is_new(event):
                        yield event

    def _is_new(self, event: Event) -> bool:
        place = order(event.id)
        if self._seen is not None and place <= self._seen:
            return False
        self._last, self._seen = event.id, place
        return True

    def _go_on_after(self, error: Unreachable | ServiceFailed) -> None:
        """Pause before the next connection, or raise: it has been dead for too long, or it is no outage."""
        if isinstance(error, ServiceFailed) and error.status != 503:
            raise error
        if time.monotonic() - self._alive_at > self._patience_s:
            raise error
        if self._on_lost is not None:
            self._on_lost(error)
        asked_s = (error.retry_after_s or 0.0) if isinstance(error, ServiceFailed) else 0.0
        self._connection.sleep(min(max(self._pause_s, asked_s), _LONGEST_PAUSE_S))
        self._pause_s = min(self._pause_s * 2, _LONGEST_PAUSE_S)
