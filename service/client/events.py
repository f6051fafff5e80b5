"""What a run tells while it goes on: server-sent events, read by the bytes (WHATWG HTML, 9.2.6) and made into objects.

`id` is `SEQ.K`: it orders the events of one run, and resumes after itself.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from service.client.errors import Document, NotBlastdoor

MAX_EVENT_BYTES = 32 * 2**20
_LINE_END = re.compile(rb"\r\n|\n|\r")
_ID = re.compile(r"(\d{1,18})\.(\d{1,18})", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class PhaseEvent:
    """A run has come into a phase. `queue_position` from 1, while it is queued, and what it waited for then."""

    id: str
    phase: str
    at: str | None = None
    attempt: int | None = None
    outcome: str | None = None
    reason: str | None = None
    queue_position: int | None = None
    queue_reason: str | None = None
    message: str | None = None


@dataclass(frozen=True, kw_only=True)
class ProgressEvent:
    """Where it is within the phase. `stage`: boundary, step, collect. `state`: started, done, or how the step went.
    `name` is the scenario's word for the step, `text` ours about it."""

    id: str
    stage: str
    state: str
    at: str | None = None
    step: int | None = None
    steps: int | None = None
    name: str | None = None
    text: str | None = None


@dataclass(frozen=True, kw_only=True)
class OutputEvent:
    """What a step printed: the guest's words. `seq` counts from 0 for each step and stream. `omitted`: from here on
    there is more than is shown live; what is kept of it is in the run's output."""

    id: str
    step: int
    stream: str
    seq: int = 0
    text: str = ""
    omitted: bool = False


@dataclass(frozen=True, kw_only=True)
class ResultEvent:
    """The finished run, as `get` returns it. The last one."""

    id: str
    run: Document = field(repr=False)


Event = PhaseEvent | ProgressEvent | OutputEvent | ResultEvent
_Flat = PhaseEvent | ProgressEvent | OutputEvent
_KINDS: dict[str, type[_Flat]] = {
    "phase": PhaseEvent,
    "progress": ProgressEvent,
    "output": OutputEvent,
}


@dataclass(frozen=True)
class Message:
    """One dispatched server-sent event; a comment has the kind `""`."""

    kind: str
    data: str = ""
    id: str = ""


class Messages:
    """Bytes in, as they were cut by the network; whole messages out. What is cut off at the end was never sent."""

    def __init__(self) -> None:
        self._rest = b""
        self._kind, self._id, self._data, self._size = "", "", [], 0  # type: str, str, list[bytes], int

    def feed(self, piece: bytes) -> Iterator[Message]:
        """Raises NotBlastdoor for an event that is larger than any of ours."""
        text = self._rest + piece
        held = text.endswith(b"\r")  # its \n may be in the next piece
        *lines, rest = _LINE_END.split(text[:-1] if held else text)
        self._rest = rest + (b"\r" if held else b"")
        for line in lines:
            yield from self._line(line)
        if len(self._rest) + self._size > MAX_EVENT_BYTES:
            raise NotBlastdoor("the stream has an event that is larger than any that Blastdoor sends")

    def _line(self, line: bytes) -> Iterator[Message]:
        if not line:
            if self._data:
                yield Message(self._kind or "message", b"\n".join(self._data).decode("utf-8", "replace"), self._id)
            self._kind, self._data, self._size = "", [], 0
            return
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if not name:
            yield Message("")
        elif name == b"data":
            self._data.append(value)
            self._size += len(value) + 1
        elif name == b"event":
            self._kind = value.decode("utf-8", "replace")
        elif name == b"id":
            self._id = value.decode("utf-8", "replace")


def read_event(message: Message) -> Event | None:
    """None for a kind that this version does not know. Raises NotBlastdoor for what is not as the contract says."""
    try:
        order(message.id)
        if message.kind == "result":
            return ResultEvent(id=message.id, run=_object(message.data))
        if message.kind in _KINDS:
            return _flat(_KINDS[message.kind], message.id, _object(message.data))
    except (ValueError, TypeError) as error:
        raise NotBlastdoor(f"the stream has an event of kind {message.kind!r} that is not one: {error}") from error
    return None


def order(event_id: str) -> tuple[int, int]:
    """`12.3` as numbers, to compare. Raises ValueError."""
    match = _ID.fullmatch(event_id)
    if match is None:
        raise ValueError(f"{event_id!r} is no event's id; it looks like 12.3")
    return int(match[1]), int(match[2])


def _object(data: str) -> dict[str, Any]:
    document = json.loads(data)
    if not isinstance(document, dict):
        raise ValueError("not an object")
    return document


def _flat(kind: type[_Flat], event_id: str, document: dict[str, Any]) -> _Flat:
    """The fields that are known; further ones may come with a later version."""
    known = {each.name for each in fields(kind)} - {"id"}
    return kind(id=event_id, **{name: value for name, value in document.items() if name in known})
