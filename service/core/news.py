"""What is told of a run while it goes on, besides its events: progress and output, for whoever watches.

Everything told has a mark, (seq, k): `seq` is that of the event which brought the run to its phase, `k` counts from 1
within the phase; the phase itself is k 0. Marks are the order, and where a watcher goes on.
"""

import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from service.core.run import Outcome, Phase, QueueReason, Reason

Mark = tuple[int, int]
START: Mark = (0, 0)
MAX_DATA_BYTES = 16 * 1024
"""Of one thing told. An output that is longer comes in pieces."""
MAX_RUN_BYTES = 4 * 2**20
"""Of all live output of a run, as it is stored."""

StreamName = Literal["stdout", "stderr"]
Stage = Literal["boundary", "step", "collect"]
State = Literal["started", "passed", "failed", "timed_out", "limit_exceeded", "skipped", "done"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NewsKind(StrEnum):
    PROGRESS = "progress"
    OUTPUT = "output"


class News(_Frozen):
    """`data` is JSON on one line, in ASCII (`one_line`)."""

    k: int
    kind: NewsKind
    data: str


class StoredNews(News):
    seq: int

    @property
    def mark(self) -> Mark:
        return self.seq, self.k


class Newest(_Frozen):
    """The mark of the newest that is told of a run, and its phase."""

    seq: int
    k: int
    phase: Phase

    @property
    def mark(self) -> Mark:
        return self.seq, self.k

    @property
    def finished(self) -> bool:
        return self.phase is Phase.FINISHED


class PhaseView(_Frozen):
    """The phase that a run is in, as the run's own record has it."""

    phase: Phase
    at: datetime | None
    attempt: int
    outcome: Outcome | None
    reason: Reason | None
    queue_position: int | None
    queue_reason: QueueReason | None = None
    message: str | None = None
    """Of the reason."""


class NewsPage(_Frozen):
    """What was told after a mark, up to `seq`: the event that brought the run to where it stands. `phases`: the events
    of its phases that are still kept, by their seq, all of them. `news`: by mark, at most as many as were asked for;
    `more`: there are more."""

    seq: int
    now: PhaseView
    phases: Mapping[int, Mapping[str, Any]]
    news: tuple[StoredNews, ...]
    more: bool


def one_line(value: Any) -> str:
    """Compact JSON in ASCII: no reader of lines, whatever it takes for the end of one, can be shown another line by
    text from a guest; and both databases store it as it is."""
    return json.dumps(value, separators=(",", ":"))


def render_phase(view: PhaseView) -> str:
    return one_line(view.model_dump(mode="json"))


def render_told_phase(event: Mapping[str, Any], *, now: PhaseView | None = None) -> str:
    """The phase of one of the run's events. `now`: the run is still in it."""
    told = {name: event["data"].get(name) for name in ("phase", "attempt", "outcome", "reason")}
    queue = {name: getattr(now, name, None) for name in ("queue_position", "queue_reason", "message")}
    return one_line({"phase": told.pop("phase"), "at": event["time"], **told, **queue})


def render_progress(
    *, at: datetime, stage: Stage, state: State, step: int | None, steps: int | None, name: str | None, text: str | None
) -> str:
    return one_line(
        {
            "at": at.isoformat().replace("+00:00", "Z"), "stage": stage, "step": step, "steps": steps, "name": name,
            "state": state, "text": text,
        }
    )  # fmt: skip


def render_output(*, step: int, stream: StreamName, seq: int, text: str, omitted: bool = False) -> str:
    """`seq` counts from 0 within the step's stream. `omitted`: the rest of it is not told live."""
    said: dict[str, Any] = {"step": step, "stream": stream, "seq": seq, "text": text}
    return one_line(said | {"omitted": True} if omitted else said)


def pieces(text: str, *, max_bytes: int = MAX_DATA_BYTES - 256) -> Iterator[str]:
    """The text, cut so that the JSON of each piece has at most so many bytes."""
    whole = one_line(text)
    if len(whole) <= max_bytes:
        if text:
            yield text
        return
    # By characters, since a cut in the JSON could fall into an escape.
    parts = len(whole) // max_bytes + 1
    size = max(1, len(text) // parts)
    for start in range(0, len(text), size):
        yield from pieces(text[start : start + size], max_bytes=max_bytes)
