"""The event stream's readers: what none of them needs any more, and what one of them lost when it had to be trimmed.

The stream is kept short for the sake of Redis' memory, and a reader may be far behind. So there are two lengths: above
`max_length` goes what every consumer group has acknowledged; above twice that the oldest goes in any case, and what a
group had not acknowledged of it is owed to that group, and published again once it has caught up (docs/adr/0006).
"""

from collections.abc import Iterable, Sequence

from pydantic import BaseModel, ConfigDict

Span = tuple[int, int]
"""Numbers of events, the first and the last included."""
MOST_SPANS = 1000
"""Of one group. Beyond it they become one that covers them all: then it gets again what it knows already, too."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class Reader(_Frozen):
    """A consumer group. `delivered`: the highest number that one of its members was given; `pending`: the lowest on the
    stream that was given and not acknowledged."""

    group: str
    delivered: int
    pending: int | None = None


class StreamState(_Frozen):
    """`first` and `last`: the oldest number that is on the stream, and the highest that ever was."""

    length: int
    first: int
    last: int
    readers: tuple[Reader, ...] = ()


def trim_below(stream: StreamState, *, max_length: int) -> int | None:
    """Below which number the stream is to be trimmed now; None: not at all, or not by enough to be worth it."""
    wanted = stream.last - max_length + 1
    # Nobody is known to read? Somebody may be about to, as after a loss of Redis, and begins where the stream does.
    needed = min((_needs(reader, first=stream.first) for reader in stream.readers), default=stream.first)
    below = max(min(wanted, needed), stream.last - 2 * max_length + 1)
    enough = max(1, max_length // 100)
    return below if stream.length > max_length and below - stream.first >= enough else None


def _needs(reader: Reader, *, first: int) -> int:
    """The oldest number on the stream that the reader has not acknowledged."""
    return max(first, reader.delivered + 1 if reader.pending is None else reader.pending)


def unread_below(reader: Reader, below: int, *, first: int) -> tuple[Span, ...]:
    """What the reader was never given of what stands below `below`; none or one."""
    start = max(reader.delivered + 1, first)
    return ((start, below - 1),) if start < below else ()


def merged(spans: Iterable[Span]) -> tuple[Span, ...]:
    """In order, without overlap, those that touch as one, at most `MOST_SPANS`."""
    found: list[Span] = []
    for first, last in sorted(spans):
        if found and first <= found[-1][1] + 1:
            found[-1] = found[-1][0], max(found[-1][1], last)
        else:
            found.append((first, last))
    return tuple(found) if len(found) <= MOST_SPANS else ((found[0][0], found[-1][1]),)


def has_caught_up(reader: Reader, stream: StreamState, *, max_length: int) -> bool:
    """So far that what is published again for it would not be trimmed away again before it comes there."""
    return stream.last - reader.delivered <= max_length // 2


def counted(spans: Sequence[Span]) -> int:
    return sum(last - first + 1 for first, last in spans)
