"""Keeps the stream short, and owes its readers what they lost by that, until it is published again.

What is owed is written down before it is trimmed, and crossed out after it has new numbers: a crash between leaves it
owed, and at worst an event comes once more. A second relay that believes it leads can do neither, and so trims nothing
that anybody still needs.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Literal

import structlog

from service.core.ports.publishing import Bus, Outbox
from service.core.readers import Reader, Span, StreamState, counted, has_caught_up, merged, trim_below, unread_below
from service.relay.metrics import RelayMetrics

AGAIN_AT_ONCE = 1000
"""Events published again at each look: what is new must not wait behind all that was lost."""
_LOG = structlog.get_logger()

Ask = Callable[[Literal["store", "bus"]], AbstractContextManager[None]]


class Trimming:
    """`ask`: around each question, to know who did not answer it."""

    def __init__(self, outbox: Outbox, bus: Bus, *, owner: str, metrics: RelayMetrics, ask: Ask) -> None:
        self._outbox, self._bus, self._owner, self._metrics, self._ask = outbox, bus, owner, metrics, ask

    def step(self) -> bool:
        """-> whether something is to be published again. Raises Unavailable."""
        with self._ask("bus"):
            stream = self._bus.stream()
        if stream is None:
            return False
        self._trim(stream)
        return self._publish_again(stream)

    def _trim(self, stream: StreamState) -> None:
        below = trim_below(stream, max_length=self._bus.max_length())
        if below is None:
            return
        lost = {reader.group: self._lost(reader, below, first=stream.first) for reader in stream.readers}
        lost = {group: spans for group, spans in lost.items() if spans}
        with self._ask("store"):
            if lost and not self._owe(lost):
                return
        with self._ask("bus"):
            self._bus.trim(below)
        for group, spans in lost.items():
            self._metrics.trimmed_unread(counted(spans))
            _LOG.warning("trimmed_unread", group=group, events=counted(spans), below=below)

    def _lost(self, reader: Reader, below: int, *, first: int) -> tuple[Span, ...]:
        spans = unread_below(reader, below, first=first)
        if reader.pending is None or reader.pending >= below:
            return spans
        with self._ask("bus"):
            pending = self._bus.pending(reader.group, first=first, below=below)
        return merged([*spans, *((number, number) for number in pending)])

    def _owe(self, lost: dict[str, tuple[Span, ...]]) -> bool:
        owed = dict(self._outbox.owed())
        for group, spans in lost.items():
            owed[group] = merged([*owed.get(group, ()), *spans])
        return self._outbox.record_owed(self._owner, owed)

    def _publish_again(self, stream: StreamState) -> bool:
        """A few of what is owed to those that have caught up. Who is not there, as after a loss of Redis, may come."""
        with self._ask("store"):
            owed = dict(self._outbox.owed())
            length = self._bus.max_length()
            ready = [r.group for r in stream.readers if r.group in owed and has_caught_up(r, stream, max_length=length)]
            rows = 0
            for group in ready:
                rows += self._stamp_again(owed, group, limit=min(AGAIN_AT_ONCE, length) - rows)
            if ready:
                self._outbox.record_owed(self._owner, owed)
        if rows:
            self._metrics.republishing(rows)
            _LOG.info("publishing_again", groups=ready, rows=rows)
        return rows > 0

    def _stamp_again(self, owed: dict[str, Sequence[Span]], group: str, *, limit: int) -> int:
        """What has a new number is no longer within the span, so a span is done when nothing more is found in it."""
        rows = 0
        while owed.get(group) and rows < limit:
            first, last = owed[group][0]
            rows += self._outbox.stamp_again(self._owner, first=first, last=last, limit=limit - rows)
            if rows < limit:
                owed[group] = owed[group][1:]
        if not owed[group]:
            del owed[group]
        return rows
