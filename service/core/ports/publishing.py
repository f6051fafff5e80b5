"""What the logic asks of the outbox, and of what carries it out: bus, hints and doorbells."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from service.core.readers import Span, StreamState
from service.core.run import Phase


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class OutboxRow(_Frozen):
    """`pub_seq` is the relay's own gap-free stamp, given after commit; it is the stream's entry id."""

    event_id: str
    run_id: str
    tenant: str
    type: str
    pub_seq: int
    event: Mapping[str, Any]


class Outbox(Protocol):
    def lead(self, owner: str, *, lease: timedelta) -> bool:
        """Take or renew the one relay lease; -> False while another holds it."""
        ...

    def stamp(self, owner: str, *, limit: int) -> Sequence[OutboxRow]:
        """Give the next numbers to committed rows that have none, oldest first, while `owner` leads; else nothing.
        Events of internal tenants (names that start with `_`) are kept, and never get a number."""
        ...

    def unpublished(self, *, limit: int) -> Sequence[OutboxRow]:
        """Stamped rows not yet known to be on the bus, by pub_seq."""
        ...

    def mark_published(self, pub_seqs: Sequence[int]) -> None: ...

    def retained(self, *, after: int, limit: int) -> Sequence[OutboxRow]:
        """Stamped rows with pub_seq above `after`, in order: for republishing."""
        ...

    def mark_unpublished_after(self, pub_seq: int) -> int:
        """The bus lost its tail: everything stamped above is to be published again. -> how many rows."""
        ...

    def last_stamp(self) -> int: ...

    def bus_identity(self) -> str | None: ...

    def record_bus_identity(self, identity: str) -> None:
        """Redis' run_id, as the relay last saw it: a new one means that the stream may have been lost."""
        ...

    def owed(self) -> Mapping[str, Sequence[Span]]:
        """By consumer group: numbers that were trimmed off the bus before the group had acknowledged them."""
        ...

    def record_owed(self, owner: str, owed: Mapping[str, Sequence[Span]]) -> bool:
        """Replaces all of it, while `owner` leads. -> whether it was written."""
        ...

    def stamp_again(self, owner: str, *, first: int, last: int, limit: int) -> int:
        """Give the next numbers to rows that have one of `first`..`last`, in order, and count them as not published,
        while `owner` leads; else nothing. -> how many rows."""
        ...


class Standing(_Frozen):
    """How things stand, in numbers and the database's clock. `waited`: of the run that is in the queue for longest;
    `lag`: how long the oldest event waits to be on the bus."""

    runs: Mapping[Phase, int]
    waited: timedelta
    unpublished: int
    lag: timedelta


class Standings(Protocol):
    def standing(self) -> Standing:
        """Of every tenant together, internal ones too (their events are never published, and never lag). Unfinished
        phases only, each of them. Cheap: it reads what is not yet done, never what is."""
        ...


class Bus(Protocol):
    """The stream that the main application reads. Internal tenants' events are stamped and skipped."""

    def publish(self, rows: Sequence[OutboxRow]) -> None:
        """XADD with explicit ids, in order; an id that is there already with the same event is success."""
        ...

    def last_published(self) -> int | None:
        """The stream's last pub_seq; 0 for an empty one, None when there is no stream."""
        ...

    def create_stream(self) -> None: ...

    def identity(self) -> str: ...

    def max_length(self) -> int:
        """Entries that are kept in any case; up to twice as many while a reader is behind."""
        ...

    def stream(self) -> StreamState | None:
        """How long it is, and how far its readers are; None when there is none."""
        ...

    def pending(self, group: str, *, first: int, below: int) -> Sequence[int]:
        """Of the numbers in between, those that the group was given and has not acknowledged; none of one that is
        gone."""
        ...

    def trim(self, below: int) -> None:
        """Remove every entry with a lower number."""
        ...


class Hints(Protocol):
    """Wakes whoever waits, sooner than polling would. Lossy: nothing may depend on it."""

    def hint(self, topic: str, run_id: str) -> None:
        """`topic`: run (it has ended, or gone back to the queue), outbox (there is something to relay) or news (more is
        told of it)."""
        ...

    def listen(self, topics: Sequence[str], *, poll_s: float) -> Iterator[tuple[str, str] | None]:
        """Yields (topic, run_id), and None each time `poll_s` seconds pass without one, also while Redis is away."""
        ...


class Doorbell(Protocol):
    def ring(self, boundary: str) -> None:
        """Tell the workers of this boundary's queue that something waits. Carries no run. Raises Unavailable."""
        ...
