"""Server-sent events as a client reads them: by the HTML standard, from the bytes; nothing of ours is trusted here."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

_END_OF_LINE = re.compile(rb"\r\n|\r|\n")


@dataclass(frozen=True)
class Event:
    id: str
    event: str
    data: str

    @property
    def json(self) -> Any:
        return json.loads(self.data)

    @property
    def mark(self) -> tuple[int, int]:
        seq, _, k = self.id.partition(".")
        return int(seq), int(k)


class Reader:
    """Fed with bytes as they come; `comments` are kept, since they are what keeps a stream alive."""

    def __init__(self) -> None:
        self.comments: list[str] = []
        self.retry: list[str] = []
        self._rest = b""
        self._id, self._event, self._data = "", "", list[str]()

    def feed(self, data: bytes) -> Iterator[Event]:
        *lines, self._rest = _END_OF_LINE.split(self._rest + data)
        for raw in lines:
            yield from self._line(raw.decode())

    def _line(self, line: str) -> Iterator[Event]:
        if not line:
            if self._data:
                yield Event(self._id, self._event or "message", "\n".join(self._data))
            self._event, self._data = "", []
            return
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not name:
            self.comments.append(value)
        elif name == "id":
            self._id = value
        elif name == "event":
            self._event = value
        elif name == "data":
            self._data.append(value)
        elif name == "retry":
            self.retry.append(value)
        else:
            raise AssertionError(f"a field that is none: {line!r}")


@contextmanager
def watching(
    client: httpx.Client, run_id: str, *, after: str | None = None, timeout_s: float = 60.0
) -> Iterator[Iterator[Event]]:
    """The run's events as they come; the iterator ends with the stream."""
    headers = {} if after is None else {"Last-Event-ID": after}
    with client.stream("GET", f"/v1/runs/{run_id}/events", headers=headers, timeout=timeout_s) as answer:
        assert answer.status_code in (200, 204), (answer.status_code, answer.read())
        yield _events(answer)


def _events(answer: httpx.Response) -> Iterator[Event]:
    reader = Reader()
    for chunk in answer.iter_raw():
        yield from reader.feed(chunk)


def watch(client: httpx.Client, run_id: str, *, after: str | None = None) -> list[Event]:
    """All that is told until the stream ends."""
    with watching(client, run_id, after=after) as events:
        return list(events)
