"""Webhook endpoints as their owners see them, the log of what was sent, and what was given up."""

import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import sqlalchemy as sa

from service.adapters.sql.engine import Span, db_now
from service.adapters.sql.schema import (
    IS_DEAD,
    IS_PENDING,
    IS_SETTLED,
    indexed_by,
    service,
    tenant,
    webhook_attempt,
    webhook_delivery,
    webhook_endpoint,
)
from service.adapters.sql.transitions import SqlPart
from service.core.errors import Conflict, NotFound, QuotaExceeded
from service.core.webhooks.models import (
    Attempt,
    AttemptPage,
    DeadLetter,
    DeadLetterPage,
    Endpoint,
    Owner,
    SealedEndpoint,
)
from service.core.webhooks.schedule import State

_PENDING_COUNTED = 1000
_e, _d, _a = webhook_endpoint, webhook_delivery, webhook_attempt
_shown = sa.select(_e.c.id, _e.c.url, _e.c.types, _e.c.enabled, _e.c.disabled_reason, _e.c.created_at,
                   _e.c.old_secret_until)  # fmt: skip
_lock_tenant = (
    sa.select(tenant.c.name)
    .where(tenant.c.name == sa.bindparam("b_owner"), tenant.c.deleted_at.is_(None))
    .with_for_update(key_share=True)
)
_lock_service = sa.select(service.c.id).where(service.c.id == sa.bindparam("b_owner")).with_for_update(key_share=True)
_pending = sa.text(IS_PENDING)
ATTEMPTS = (
    sa.select(_a, _d.c.event_id, _d.c.type)
    .join(_d, _d.c.id == _a.c.delivery_id)
    .where(_a.c.endpoint_id == sa.bindparam("b_endpoint"), _a.c.id < sa.bindparam("b_before", type_=sa.BigInteger()))
    .order_by(_a.c.id.desc())
    .limit(sa.bindparam("b_limit", type_=sa.Integer()))
    .with_hint(_a, indexed_by("ix_webhook_attempt_endpoint_id_id"), "sqlite")
)
DEAD_LETTERS = (
    sa.select(_d, _e.c.url)
    .join(_e, _e.c.id == _d.c.endpoint_id)
    .where(sa.text(IS_DEAD), _d.c.id < sa.bindparam("b_before"))
    .order_by(_d.c.id.desc())
    .limit(sa.bindparam("b_limit", type_=sa.Integer()))
    .with_hint(_d, indexed_by("ix_webhook_delivery_dead"), "sqlite")
)
OLD_DELIVERIES = (
    sa.select(_d.c.id)
    .where(sa.text(IS_SETTLED), _d.c.settled_at <= db_now() - sa.bindparam("b_age", type_=Span()))
    .with_hint(_d, indexed_by("ix_webhook_delivery_settled"), "sqlite")
)
_NEWEST, _NEWEST_ID = 2**62, "~"


class SqlWebhooks(SqlPart):
    def add_endpoint(self, endpoint: SealedEndpoint, *, most: int) -> Endpoint:
        owner = endpoint.owner
        lock, name = (_lock_tenant, owner.tenant) if owner.tenant else (_lock_service, owner.service_id)
        count = sa.select(sa.func.count()).select_from(_e).where(_owned(owner))
        row = {
            "id": endpoint.id, "tenant": owner.tenant, "service_id": owner.service_id, "url": endpoint.url,
            "types": json.dumps(endpoint.types), "enabled": True, "secret": endpoint.secret, "created_at": db_now(),
        }  # fmt: skip
        with self._db.write() as connection:
            if connection.execute(lock, {"b_owner": name}).one_or_none() is None:
                raise NotFound
            if (connection.scalar(count) or 0) >= most:
                raise QuotaExceeded(f"there are {most} webhooks already, which is the most; delete one")
            connection.execute(sa.insert(_e).values(row))
            return _endpoint(connection.execute(_shown.where(_e.c.id == endpoint.id)).one())

    def list_endpoints(self, owner: Owner) -> Sequence[Endpoint]:
        with self._db.read() as connection:
            return [_endpoint(row) for row in connection.execute(_shown.where(_owned(owner)).order_by(_e.c.id))]

    def get_endpoint(self, endpoint_id: str, owner: Owner) -> Endpoint:
        with self._db.read() as connection:
            return _endpoint(_one(connection, endpoint_id, owner))

    def delete_endpoint(self, endpoint_id: str, owner: Owner) -> None:
        with self._db.write() as connection:
            gone = sa.delete(_e).where(_e.c.id == _plain(endpoint_id), _owned(owner))
            if connection.execute(gone).rowcount != 1:
                raise NotFound

    def rotate_secret(self, endpoint_id: str, owner: Owner, *, secret: str, old_signs: timedelta) -> Endpoint:
        rotate = (
            sa.update(_e)
            .where(_e.c.id == _plain(endpoint_id), _owned(owner))
            .values(secret=secret, old_secret=_e.c.secret, old_secret_until=db_now() + old_signs)
        )
        with self._db.write() as connection:
            if connection.execute(rotate).rowcount != 1:
                raise NotFound
            return _endpoint(_one(connection, endpoint_id, owner))

    def list_attempts(self, endpoint_id: str, owner: Owner, *, limit: int, before: int | None) -> AttemptPage:
        wait = sa.select(_d.c.id).where(_pending, _d.c.endpoint_id == endpoint_id).limit(_PENDING_COUNTED)
        asked = {"b_endpoint": endpoint_id, "b_before": _NEWEST if before is None else before, "b_limit": limit + 1}
        with self._db.read() as connection:
            _one(connection, endpoint_id, owner)
            rows = connection.execute(ATTEMPTS, asked).all()
            pending = connection.scalar(sa.select(sa.func.count()).select_from(wait.subquery())) or 0
        more = len(rows) > limit
        items = tuple(_attempt(row) for row in rows[:limit])
        return AttemptPage(items=items, next_before=rows[limit - 1].id if more else None, pending=pending)

    def replay_delivery(self, delivery_id: str, *, endpoint_id: str | None, owner: Owner | None) -> str:
        mine = [] if owner is None else [_owned(owner), _e.c.id == _plain(endpoint_id or "")]
        found = (
            sa.select(_e.c.id, _e.c.enabled)
            .join(_d, _d.c.endpoint_id == _e.c.id)
            .where(_d.c.id == _plain(delivery_id), *mine)
            .with_for_update(read=True, of=_e)
        )
        again = sa.update(_d).where(_d.c.id == delivery_id)
        again = again.values(
            state=State.PENDING.value, tries=0, next_at=db_now(), settled_at=None, fence=_d.c.fence + 1
        )
        with self._db.write() as connection:
            row = connection.execute(found).one_or_none()
            if row is None:
                raise NotFound
            if not row.enabled:
                raise Conflict("this webhook is disabled; make a new one", code="webhook_disabled")
            connection.execute(again)
        return str(row.id)

    def dead_letters(self, *, limit: int, before: str | None) -> DeadLetterPage:
        with self._db.read() as connection:
            rows = connection.execute(
                DEAD_LETTERS, {"b_before": _plain(before or _NEWEST_ID), "b_limit": limit + 1}
            ).all()
        items = tuple(_dead_letter(row) for row in rows[:limit])
        return DeadLetterPage(items=items, next_before=items[-1].id if len(rows) > limit else None)

    def purge_deliveries(self, *, older_than: timedelta, limit: int, dry_run: bool) -> int:
        if dry_run:
            with self._db.read() as connection:
                found = sa.select(sa.func.count()).select_from(OLD_DELIVERIES.subquery())
                return connection.scalar(found, {"b_age": older_than}) or 0
        some = sa.delete(_d).where(_d.c.id.in_(OLD_DELIVERIES.limit(limit)))
        with self._db.write() as connection:
            return connection.execute(some, {"b_age": older_than}).rowcount


def _owned(owner: Owner) -> sa.ColumnElement[bool]:
    return _e.c.tenant == owner.tenant if owner.tenant is not None else _e.c.service_id == owner.service_id


def _plain(id_: str) -> str:
    """PostgreSQL refuses a NUL even to look for it."""
    if "\0" in id_:
        raise NotFound
    return id_


def _one(connection: sa.Connection, endpoint_id: str, owner: Owner) -> sa.Row[Any]:
    row = connection.execute(_shown.where(_e.c.id == _plain(endpoint_id), _owned(owner))).one_or_none()
    if row is None:
        raise NotFound
    return row


def _endpoint(row: sa.Row[Any]) -> Endpoint:
    return Endpoint(**{**row._mapping, "types": json.loads(row.types)})


def _attempt(row: sa.Row[Any]) -> Attempt:
    return Attempt(
        id=row.delivery_id, event_id=row.event_id, attempt=row.attempt, at=row.at, status=row.status, error=row.error,
        next_at=row.next_at, duration_s=row.duration.total_seconds(), type=row.type,
    )  # fmt: skip


def _dead_letter(row: sa.Row[Any]) -> DeadLetter:
    return DeadLetter(
        id=row.id, webhook_id=row.endpoint_id, url=row.url, tenant=row.tenant, event_id=row.event_id, type=row.type,
        attempts=row.attempt, at=row.settled_at, status=row.status, error=row.error,
    )  # fmt: skip
