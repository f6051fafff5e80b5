"""What is to be told, and how far the telling has come."""

from collections.abc import Mapping, Sequence
from datetime import timedelta

from service.adapters.memory.state import MemoryState, StoredEvent
from service.core.ports.publishing import OutboxRow
from service.core.readers import Span


class MemoryOutbox(MemoryState):
    def lead(self, owner: str, *, lease: timedelta) -> bool:
        with self._lock:
            now = self.now()
            if self._leader is not None and self._leader[0] != owner and self._leader[1] >= now:
                return False
            self._leader = owner, now + lease
            return True

    def stamp(self, owner: str, *, limit: int) -> Sequence[OutboxRow]:
        with self._lock:
            if not self._leads(owner):
                return ()
            fresh = [e for e in self._events if e.pub_seq is None and not e.tenant.startswith("_")][:limit]
            for event in fresh:
                self._last_stamp += 1
                event.pub_seq = self._last_stamp
            return [_row(event) for event in fresh]

    def unpublished(self, *, limit: int) -> Sequence[OutboxRow]:
        with self._lock:
            return [_row(event) for event in self._stamped() if not event.published][:limit]

    def mark_published(self, pub_seqs: Sequence[int]) -> None:
        with self._lock:
            for event in self._stamped():
                event.published = event.published or event.pub_seq in pub_seqs

    def retained(self, *, after: int, limit: int) -> Sequence[OutboxRow]:
        with self._lock:
            return [_row(event) for event in self._stamped() if (event.pub_seq or 0) > after][:limit]

    def mark_unpublished_after(self, pub_seq: int) -> int:
        with self._lock:
            again = [e for e in self._stamped() if (e.pub_seq or 0) > pub_seq and e.published]
            for event in again:
                event.published = False
            return len(again)

    def last_stamp(self) -> int:
        with self._lock:
            return self._last_stamp

    def bus_identity(self) -> str | None:
        with self._lock:
            return self._bus_identity

    def record_bus_identity(self, identity: str) -> None:
        with self._lock:
            self._bus_identity = identity

    def owed(self) -> Mapping[str, Sequence[Span]]:
        with self._lock:
            return dict(self._owed)

    def record_owed(self, owner: str, owed: Mapping[str, Sequence[Span]]) -> bool:
        with self._lock:
            if not self._leads(owner):
                return False
            self._owed = {group: tuple(spans) for group, spans in owed.items()}
            return True

    def stamp_again(self, owner: str, *, first: int, last: int, limit: int) -> int:
        with self._lock:
            if not self._leads(owner):
                return 0
            again = [event for event in self._stamped() if first <= (event.pub_seq or 0) <= last][:limit]
            for event in again:
                self._last_stamp += 1
                event.pub_seq, event.published = self._last_stamp, False
            return len(again)

    def _leads(self, owner: str) -> bool:
        return self._leader is not None and self._leader[0] == owner and self._leader[1] >= self.now()

    def _stamped(self) -> list[StoredEvent]:
        return sorted((e for e in self._events if e.pub_seq is not None), key=lambda e: e.pub_seq or 0)


def _row(event: StoredEvent) -> OutboxRow:
    assert event.pub_seq is not None
    return OutboxRow(
        event_id=event.event["id"],
        run_id=event.run_id,
        tenant=event.tenant,
        type=event.type,
        pub_seq=event.pub_seq,
        event=event.event,
    )
