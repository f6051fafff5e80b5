"""From events to deliveries, and from deliveries to attempts: the dispatcher's side of the webhooks.

What is pending is found endpoint by endpoint through one small index, so an endpoint with a hundred thousand deliveries
that wait costs the others nothing.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from service.adapters.sql.engine import db_now
from service.adapters.sql.schema import (
    IS_DEAD,
    IS_PENDING,
    UNFANNED,
    indexed_by,
    outbox,
    tenant,
    webhook_attempt,
    webhook_delivery,
    webhook_endpoint,
)
from service.adapters.sql.transitions import SqlPart
from service.core.ids import new_id
from service.core.webhooks.models import ANY_TYPE, Claimed, Due, Owner, Settlement
from service.core.webhooks.schedule import Fault, State

_e, _d = webhook_endpoint, webhook_delivery
_PENDING_INDEX = "ix_webhook_delivery_pending"
UNFANNED_EVENTS = (
    sa.select(outbox.c.id, outbox.c.event_id, outbox.c.tenant, outbox.c.type, outbox.c.created_at)
    .where(sa.text(UNFANNED))
    .order_by(outbox.c.id)
    .limit(sa.bindparam("b_limit", type_=sa.Integer()))
    .with_hint(outbox, indexed_by("ix_outbox_unfanned"), "sqlite")
)
# Locked: one that is being deleted or disabled this moment is waited for, or its delivery would wait for ever.
_wanting = (
    sa.select(_e.c.id, _e.c.types, _e.c.created_at, tenant.c.name)
    .join(tenant, sa.or_(_e.c.tenant == tenant.c.name, _e.c.service_id == tenant.c.service_id))
    .where(_e.c.enabled, tenant.c.name.in_(sa.bindparam("b_tenants", expanding=True)))
    .with_for_update(read=True, of=_e)
)
_fanned = sa.update(outbox).where(outbox.c.id.in_(sa.bindparam("b_ids", expanding=True))).values(fanned=True)


def _due() -> sa.Select[Any]:
    next_ = _d.alias("next_")
    soonest = _d.alias("soonest")
    pending, is_soonest = sa.text("next_." + IS_PENDING), sa.text("soonest." + IS_PENDING)
    first = sa.select(next_.c.endpoint_id).where(pending).order_by(next_.c.endpoint_id).limit(1)
    first = first.with_hint(next_, indexed_by(_PENDING_INDEX), "sqlite")
    # The endpoints that have something pending, each found by one probe of the index, however much it is.
    waiting = sa.select(first.scalar_subquery().label("id")).cte("waiting", recursive=True)
    following = first.where(next_.c.endpoint_id > waiting.c.id).correlate(waiting).scalar_subquery()
    waiting = waiting.union_all(sa.select(following).where(waiting.c.id.is_not(None)))
    since = (
        sa.select(soonest.c.next_at)
        .where(is_soonest, soonest.c.endpoint_id == _e.c.id)
        .order_by(soonest.c.next_at)
        .limit(1)
        .with_hint(soonest, indexed_by(_PENDING_INDEX), "sqlite")
        .scalar_subquery()
    )
    found = (
        sa.select(_e.c.id, _e.c.tenant, _e.c.service_id, since.label("since"))
        .join_from(waiting, _e, _e.c.id == waiting.c.id)
        .where(_e.c.enabled, _e.c.id.not_in(sa.bindparam("b_not_now", expanding=True)))
        .subquery("found")
    )
    return (
        sa.select(found)
        .where(found.c.since <= db_now())
        .order_by(found.c.since)
        .limit(sa.bindparam("b_limit", type_=sa.Integer()))
    )


DUE = _due()
DUE_OF_ONE = (
    sa.select(_d.c.id)
    .where(sa.text(IS_PENDING), _d.c.endpoint_id == sa.bindparam("b_endpoint"), _d.c.next_at <= db_now())
    .order_by(_d.c.next_at, _d.c.id)
    .limit(sa.bindparam("b_limit", type_=sa.Integer()))
    .with_for_update(skip_locked=True)
    .with_hint(_d, indexed_by(_PENDING_INDEX), "sqlite")
)
_event = sa.select(outbox.c.event).where(outbox.c.event_id == _d.c.event_id).scalar_subquery()
_claimed = (
    sa.select(
        _d.c.id, _d.c.endpoint_id, _d.c.event_id, _d.c.fence, _d.c.tries, _e.c.url, _e.c.secret,
        sa.case((_e.c.old_secret_until > db_now(), _e.c.old_secret), else_=None).label("old_secret"),
        _event.label("body"), db_now().label("at"),
    )
    .join(_e, _e.c.id == _d.c.endpoint_id)
    .where(_d.c.id.in_(sa.bindparam("b_ids", expanding=True)))
    .order_by(_d.c.next_at, _d.c.id)
)  # fmt: skip
_held = sa.and_(_d.c.id == sa.bindparam("b_id"), _d.c.fence == sa.bindparam("b_fence"), sa.text(IS_PENDING))


class SqlDeliveries(SqlPart):
    def fan_out(self, *, limit: int) -> int:
        with self._db.read() as connection:  # asked at each turn, and mostly there is nothing: no lock for that
            if connection.execute(UNFANNED_EVENTS, {"b_limit": 1}).first() is None:
                return 0
        insert = sqlite.insert if self._db.is_sqlite else postgresql.insert
        with self._db.write() as connection:
            events = connection.execute(UNFANNED_EVENTS.with_for_update(skip_locked=True), {"b_limit": limit}).all()
            if not events:
                return 0
            endpoints: dict[str, list[sa.Row[Any]]] = {}
            for row in connection.execute(_wanting, {"b_tenants": sorted({event.tenant for event in events})}):
                endpoints.setdefault(row.name, []).append(row)
            rows = [
                {
                    "id": new_id("dlv"), "endpoint_id": endpoint.id, "event_id": event.event_id, "tenant": event.tenant,
                    "type": event.type, "state": State.PENDING.value, "attempt": 0, "tries": 0, "fence": 0,
                }
                for event in events
                for endpoint in endpoints.get(event.tenant, ())
                if endpoint.created_at <= event.created_at and _wants(endpoint, event.type)
            ]  # fmt: skip
            if rows:
                once = insert(_d).values(next_at=db_now()).on_conflict_do_nothing()
                connection.execute(once, rows)
            connection.execute(_fanned, {"b_ids": [event.id for event in events]})
        return len(events)

    def due_endpoints(self, *, not_now: Sequence[str], limit: int) -> Sequence[Due]:
        with self._db.read() as connection:
            rows = connection.execute(DUE, {"b_not_now": list(not_now), "b_limit": limit})
            return [Due(endpoint_id=row.id, owner=Owner(tenant=row.tenant, service_id=row.service_id)) for row in rows]

    def claim_deliveries(self, wanted: Mapping[str, int], *, lease: timedelta) -> Sequence[Claimed]:
        with self._db.write() as connection:
            ids = [
                id_
                for endpoint_id, most in sorted(wanted.items())
                for id_ in connection.scalars(DUE_OF_ONE, {"b_endpoint": endpoint_id, "b_limit": most}).all()
            ]
            if not ids:
                return ()
            rows = connection.execute(_claimed, {"b_ids": ids}).all()
            take = sa.update(_d).where(_d.c.id.in_(ids)).values(fence=_d.c.fence + 1, next_at=db_now() + lease)
            connection.execute(take)
        return [
            Claimed(
                delivery_id=row.id, endpoint_id=row.endpoint_id, fence=row.fence + 1, tries=row.tries, at=row.at,
                url=row.url, secrets=tuple(filter(None, (row.secret, row.old_secret))), event_id=row.event_id,
                body=row.body,
            )
            for row in rows
        ]  # fmt: skip

    def settle_deliveries(self, settlements: Sequence[Settlement]) -> int:
        recorded = 0
        with self._db.write() as connection:
            # Endpoints before deliveries: two dispatchers that hear 410 from one endpoint must not wait for each other.
            for endpoint_id in sorted({settled.endpoint_id for settled in settlements if settled.disable}):
                disable = sa.update(_e).where(_e.c.id == endpoint_id, _e.c.enabled)
                connection.execute(disable.values(enabled=False, disabled_reason=Fault.GONE.value))
            for settled in sorted(settlements, key=lambda settled: settled.delivery_id):
                recorded += self._settle(connection, settled)
            for endpoint_id in sorted({settled.endpoint_id for settled in settlements if settled.disable}):
                connection.execute(_give_up_all, {"b_endpoint": endpoint_id})
        return recorded

    def give_back_deliveries(self, claimed: Sequence[Claimed]) -> None:
        if not claimed:
            return
        back = sa.update(_d).where(_held).values(next_at=db_now())
        with self._db.write() as connection:
            for one in sorted(claimed, key=lambda one: one.delivery_id):
                connection.execute(back, {"b_id": one.delivery_id, "b_fence": one.fence})

    def delivery_counts(self) -> tuple[int, int]:
        with self._db.read() as connection:
            pending, dead = (
                connection.scalar(sa.select(sa.func.count()).select_from(_d).where(sa.text(which))) or 0
                for which in (IS_PENDING, IS_DEAD)
            )
        return pending, dead

    def _settle(self, connection: sa.Connection, settled: Settlement) -> int:
        next_at = None if settled.wait is None else db_now() + settled.wait
        error = None if settled.error is None else settled.error.value
        change = (
            sa.update(_d)
            .where(_held)
            .values(
                state=settled.state.value, attempt=_d.c.attempt + 1, tries=_d.c.tries + 1, fence=_d.c.fence + 1,
                status=settled.status,
                error=error, next_at=next_at, settled_at=None if settled.state is State.PENDING else db_now(),
            )
            .returning(_d.c.attempt, _d.c.next_at)
        )  # fmt: skip
        held = {"b_id": settled.delivery_id, "b_fence": settled.fence}
        row = connection.execute(change, held).one_or_none()
        if row is None:
            return 0
        connection.execute(
            _log,
            {
                "delivery_id": settled.delivery_id, "endpoint_id": settled.endpoint_id, "attempt": row.attempt,
                "status": settled.status, "error": error, "next_at": row.next_at, "duration": settled.duration,
            },
        )  # fmt: skip
        return 1


_log = sa.insert(webhook_attempt).values(at=db_now())
_give_up_all = (
    sa.update(_d)
    .where(sa.text(IS_PENDING), _d.c.endpoint_id == sa.bindparam("b_endpoint"))
    .values(state=State.DEAD.value, error=Fault.DISABLED.value, next_at=None, settled_at=db_now())
)


def _wants(endpoint: sa.Row[Any], type_: str) -> bool:
    types = json.loads(endpoint.types)
    return ANY_TYPE in types or type_ in types
