"""What committed transactions want told, and how far the telling has come.

Rows are stamped after their commit, by one leader, with numbers that have no gaps: a number given at insert would be
committed out of order, and the stream would refuse the late one. Events of internal tenants are kept, never stamped.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import sqlalchemy as sa

from service.adapters.sql.engine import db_now
from service.adapters.sql.schema import indexed_by, outbox, relay_state
from service.adapters.sql.transitions import SqlPart
from service.core.ports.publishing import OutboxRow
from service.core.readers import Span

_ROWS_AT_ONCE = 500
_COLUMNS = (outbox.c.event_id, outbox.c.run_id, outbox.c.tenant, outbox.c.type, outbox.c.pub_seq, outbox.c.event)
# Each in the words of its index.
_IS_UNSTAMPED = sa.text("pub_seq IS NULL AND NOT internal")
_IS_UNPUBLISHED = sa.text("pub_seq IS NOT NULL AND NOT published")
_leads = sa.and_(relay_state.c.owner == sa.bindparam("b_owner"), relay_state.c.lease_until >= db_now())
_leading = sa.select(relay_state.c.last_stamp).where(_leads).with_for_update()
UNSTAMPED = sa.select(outbox.c.id, *_COLUMNS).where(_IS_UNSTAMPED).order_by(outbox.c.id).limit(sa.bindparam("b_limit"))
UNSTAMPED = UNSTAMPED.with_hint(outbox, indexed_by("ix_outbox_unstamped"), "sqlite")
_stamp = sa.update(outbox).where(outbox.c.id == sa.bindparam("b_id")).values(pub_seq=sa.bindparam("b_pub_seq"))
_stamp_again = _stamp.values(published=False)


class SqlOutbox(SqlPart):
    def lead(self, owner: str, *, lease: timedelta) -> bool:
        free = sa.or_(
            relay_state.c.owner.is_(None), relay_state.c.owner == owner, relay_state.c.lease_until < db_now()
        )  # fmt: skip
        take = sa.update(relay_state).where(free).values(owner=owner, lease_until=db_now() + lease)
        with self._db.write() as connection:
            return connection.execute(take).rowcount == 1

    def stamp(self, owner: str, *, limit: int) -> Sequence[OutboxRow]:
        with self._db.read() as connection:  # the relay asks often, and most often there is nothing: no lock for that
            if connection.execute(UNSTAMPED, {"b_limit": 1}).one_or_none() is None:
                return ()
        with self._db.write() as connection:
            last = connection.scalar(_leading, {"b_owner": owner})
            if last is None:
                return ()
            rows = connection.execute(UNSTAMPED, {"b_limit": limit}).all()
            if not rows:
                return ()
            stamps = [{"b_id": row.id, "b_pub_seq": last + n} for n, row in enumerate(rows, start=1)]
            connection.execute(_stamp, stamps)
            connection.execute(sa.update(relay_state).values(last_stamp=last + len(rows)))
        return [_row(row, pub_seq=last + n) for n, row in enumerate(rows, start=1)]

    def unpublished(self, *, limit: int) -> Sequence[OutboxRow]:
        return self._rows(sa.select(*_COLUMNS).where(_IS_UNPUBLISHED), limit)

    def mark_published(self, pub_seqs: Sequence[int]) -> None:
        if not pub_seqs:
            return
        with self._db.write() as connection:
            for start in range(0, len(pub_seqs), _ROWS_AT_ONCE):
                some = list(pub_seqs[start : start + _ROWS_AT_ONCE])
                connection.execute(sa.update(outbox).where(outbox.c.pub_seq.in_(some)).values(published=True))

    def retained(self, *, after: int, limit: int) -> Sequence[OutboxRow]:
        return self._rows(sa.select(*_COLUMNS).where(outbox.c.pub_seq > after), limit)

    def mark_unpublished_after(self, pub_seq: int) -> int:
        again = sa.update(outbox).where(outbox.c.pub_seq > pub_seq, outbox.c.published).values(published=False)
        with self._db.write() as connection:
            return connection.execute(again).rowcount

    def last_stamp(self) -> int:
        return int(self._state(relay_state.c.last_stamp) or 0)

    def bus_identity(self) -> str | None:
        identity = self._state(relay_state.c.bus_identity)
        return None if identity is None else str(identity)

    def record_bus_identity(self, identity: str) -> None:
        with self._db.write() as connection:
            connection.execute(sa.update(relay_state).values(bus_identity=identity))

    def owed(self) -> Mapping[str, Sequence[Span]]:
        found = json.loads(self._state(relay_state.c.owed))
        return {group: tuple((first, last) for first, last in spans) for group, spans in found.items()}

    def record_owed(self, owner: str, owed: Mapping[str, Sequence[Span]]) -> bool:
        record = sa.update(relay_state).where(_leads).values(owed=json.dumps(owed))
        with self._db.write() as connection:
            return connection.execute(record, {"b_owner": owner}).rowcount == 1

    def stamp_again(self, owner: str, *, first: int, last: int, limit: int) -> int:
        wanted = sa.select(outbox.c.id).where(outbox.c.pub_seq.between(first, last)).order_by(outbox.c.pub_seq)
        with self._db.write() as connection:
            stamped = connection.scalar(_leading, {"b_owner": owner})
            if stamped is None:
                return 0
            ids = connection.scalars(wanted.limit(limit)).all()
            if ids:
                stamps = [{"b_id": id_, "b_pub_seq": stamped + n} for n, id_ in enumerate(ids, start=1)]
                connection.execute(_stamp_again, stamps)
                connection.execute(sa.update(relay_state).values(last_stamp=stamped + len(ids)))
        return len(ids)

    def _rows(self, wanted: sa.Select[Any], limit: int) -> Sequence[OutboxRow]:
        with self._db.read() as connection:
            return [_row(row) for row in connection.execute(wanted.order_by(outbox.c.pub_seq).limit(limit))]

    def _state(self, column: sa.Column[Any]) -> Any:
        with self._db.read() as connection:
            return connection.scalar(sa.select(column))


def _row(row: sa.Row[Any], *, pub_seq: int | None = None) -> OutboxRow:
    return OutboxRow(
        event_id=row.event_id,
        run_id=row.run_id,
        tenant=row.tenant,
        type=row.type,
        pub_seq=row.pub_seq if pub_seq is None else pub_seq,
        event=json.loads(row.event),
    )
