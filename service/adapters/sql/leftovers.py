"""Events that were told long ago, blobs that no run uses, and what is left of deleted tenants."""

from collections.abc import Collection, Sequence
from datetime import timedelta
from typing import Any

import sqlalchemy as sa

from service.adapters.sql.engine import db_now
from service.adapters.sql.schema import (
    IS_PENDING,
    api_key,
    idempotency,
    outbox,
    run,
    run_blob,
    tenant,
    webhook_delivery,
    webhook_endpoint,
)
from service.adapters.sql.transitions import SqlPart
from service.core.run import Phase
from service.core.webhooks.schedule import State

_AT_ONCE = 500
_to_be_delivered = sa.select(webhook_delivery.c.event_id).where(sa.text(IS_PENDING))
_is_told = sa.and_(
    sa.or_(outbox.c.internal, sa.and_(outbox.c.published, outbox.c.fanned)),
    outbox.c.event_id.not_in(_to_be_delivered),
)


class SqlLeftovers(SqlPart):
    def purge_events(self, *, older_than: timedelta, dry_run: bool) -> int:
        """By their order, from the oldest on, until one is too young: without an index by age, which every event would
        pay for, and without looking at those that stay."""
        is_old = (outbox.c.created_at < db_now() - older_than).label("is_old")
        page = sa.select(outbox.c.id, is_old, _is_told.label("is_told")).order_by(outbox.c.id).limit(_AT_ONCE)
        count = after = 0
        while True:
            with self._db.read() as connection:
                rows = connection.execute(page.where(outbox.c.id > after)).all()
            ids = [row.id for row in rows if row.is_old and row.is_told]
            if ids and not dry_run:
                with self._db.write() as connection:
                    connection.execute(sa.delete(outbox).where(outbox.c.id.in_(ids), _is_told))
            count += len(ids)
            if len(rows) < _AT_ONCE or not all(row.is_old for row in rows):
                return count
            after = rows[-1].id

    def tenant_names(self) -> Sequence[str]:
        with self._db.read() as connection:
            return connection.scalars(sa.select(tenant.c.name).where(tenant.c.purged_at.is_(None))).all()

    def unused_blobs(self, tenant: str, digests: Collection[str]) -> Sequence[str]:
        asked, used = sorted(digests), set[str]()
        with self._db.read() as connection:
            for start in range(0, len(asked), _AT_ONCE):
                some = run_blob.c.digest.in_(asked[start : start + _AT_ONCE])
                used |= set(connection.scalars(sa.select(run_blob.c.digest).where(run_blob.c.tenant == tenant, some)))
        return [digest for digest in asked if digest not in used]

    def deleted_tenants(self) -> Sequence[str]:
        deleted = sa.select(tenant.c.name).where(tenant.c.deleted_at.is_not(None), tenant.c.purged_at.is_(None))
        with self._db.read() as connection:
            return connection.scalars(deleted.order_by(tenant.c.name)).all()

    def purge_tenant(self, name: str) -> bool:
        done = sa.select(run.c.id).where(
            run.c.tenant == name, run.c.phase == Phase.FINISHED.value, run.c.fence == run.c.destroyed_fence
        )
        with self._db.write() as connection:
            if not _is_deleted(connection, name):
                return False
            ids = connection.scalars(done.limit(_AT_ONCE)).all()
            connection.execute(sa.delete(run).where(run.c.id.in_(ids)))
            if _any(connection, run.c.id, run.c.tenant == name):
                return False
            for table in (idempotency, api_key, webhook_endpoint):
                connection.execute(sa.delete(table).where(table.c.tenant == name))
            its = webhook_delivery.c.tenant == name  # of its service's webhooks
            connection.execute(sa.delete(webhook_delivery).where(its, webhook_delivery.c.state != State.PENDING.value))
            connection.execute(sa.delete(outbox).where(outbox.c.tenant == name, _is_told))
            return not _any(connection, outbox.c.id, outbox.c.tenant == name)

    def tenant_purged(self, name: str) -> None:
        with self._db.write() as connection:
            if _is_deleted(connection, name):
                bare = {"purged_at": db_now(), "affinity": None, "ceilings": "{}"}
                connection.execute(sa.update(tenant).where(tenant.c.name == name).values(bare))


def _is_deleted(connection: sa.Connection, name: str) -> bool:
    return _any(connection, tenant.c.name, sa.and_(tenant.c.name == name, tenant.c.deleted_at.is_not(None)))


def _any(connection: sa.Connection, column: sa.Column[Any], condition: sa.ColumnElement[bool]) -> bool:
    return connection.execute(sa.select(column).where(condition).limit(1)).one_or_none() is not None
