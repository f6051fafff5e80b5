"""What is kept beside the runs' records, how much of it each tenant has, and what is given up for its age.

A tenant's storage is counted over its distinct blobs: bytes that two of its runs share are on the disk once. A sum and
not a counter, because a counter that was wrong once would stay so; `ix_run_blob_tenant_digest_bytes` answers it alone.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import sqlalchemy as sa

from service.adapters.sql.documents import SHOWN, is_run_id, run_of
from service.adapters.sql.engine import Span, db_now
from service.adapters.sql.idempotency import KEPT
from service.adapters.sql.schema import HAS_ENDED, KEEPS_BLOBS, idempotency, indexed_by, run, run_blob, run_news, tenant
from service.adapters.sql.transitions import SqlPart
from service.core.boundary import Bundle
from service.core.errors import NotFound, QuotaExceeded
from service.core.ports.runs import Expired, Kept
from service.core.run import Phase, Result

_run_id: sa.BindParameter[Any] = sa.bindparam("b_run_id")
_tenant: sa.BindParameter[Any] = sa.bindparam("b_tenant")
_age = sa.bindparam("b_age", type_=Span())
_of_tenant = (
    sa.select(sa.func.max(run_blob.c.bytes).label("bytes"))
    .where(run_blob.c.tenant == _tenant)
    .group_by(run_blob.c.digest)
    .subquery()
)
STORED = sa.select(sa.func.coalesce(sa.func.sum(_of_tenant.c.bytes), 0))
_known = sa.select(sa.literal(1)).where(run_blob.c.tenant == _tenant, run_blob.c.digest == sa.bindparam("b_digest"))
_quota = sa.select(tenant.c.storage_bytes).where(tenant.c.name == _tenant)
_one = SHOWN.where(run.c.id == _run_id)
_other = run_blob.alias("other")
_unshared = (
    sa.select(run_blob.c.digest)
    .where(
        run_blob.c.run_id == _run_id,
        run_blob.c.digest.startswith("sha256:"),  # and not what it told live, which is in the database
        ~sa.select(_other.c.run_id)
        .where(
            _other.c.tenant == run_blob.c.tenant, _other.c.digest == run_blob.c.digest,
            _other.c.run_id != run_blob.c.run_id,
        )
        .exists(),
    )
    .order_by(run_blob.c.digest)
)  # fmt: skip
_expired = (
    sa.select(run.c.id.label("run_id"), run.c.tenant)
    .where(run.c.finished_at <= db_now() - _age, run.c.id > sa.bindparam("b_after"))
    .order_by(run.c.id)
    .limit(sa.bindparam("b_limit", type_=sa.Integer()))
)
# In the words of the indexes: by the id alone SQLite would walk every run after the last one seen.
EXPIRED = _expired.where(sa.text(HAS_ENDED)).with_hint(run, indexed_by("ix_run_finished_at"), "sqlite")
EXPIRED_WITH_BLOBS = _expired.where(sa.text(KEEPS_BLOBS)).with_hint(run, indexed_by("ix_run_keeps_blobs"), "sqlite")
_owner = sa.select(run.c.tenant).where(run.c.id == _run_id, run.c.phase == Phase.FINISHED.value)
_lock_owner = sa.select(tenant.c.name).where(tenant.c.name == _tenant).with_for_update(key_share=True)
_note_purge = (
    sa.update(run)
    .where(run.c.id == _run_id, run.c.phase == Phase.FINISHED.value)
    .values(blobs_purged_at=sa.func.coalesce(run.c.blobs_purged_at, db_now()))
)
_free_again = idempotency.c.taken_at < db_now() - KEPT


class SqlKeeping(SqlPart):
    def get_kept(self, run_id: str, tenant: str | None) -> Kept:
        if not is_run_id(run_id):
            raise NotFound
        with self._db.read() as connection:
            row = connection.execute(_one, {"b_run_id": run_id}).one_or_none()
        if row is None or tenant not in (None, row.tenant):
            raise NotFound
        result = None if row.result is None else Result.model_validate_json(row.result)
        return Kept(
            run=run_of(row, result=result),
            outputs={} if result is None else result.outputs,
            purged=row.blobs_purged_at is not None,
        )

    def storage_left(self, tenant: str) -> int:
        with self._db.read() as connection:
            quota = connection.scalar(_quota, {"b_tenant": tenant})
            return 0 if quota is None else max(0, quota - _stored(connection, tenant))

    def expired(
        self, *, older_than: timedelta, with_blobs: bool = False, after: str | None = None, limit: int = 500
    ) -> Sequence[Expired]:
        asked = {"b_age": older_than, "b_after": after or "", "b_limit": limit}
        with self._db.read() as connection:
            rows = connection.execute(EXPIRED_WITH_BLOBS if with_blobs else EXPIRED, asked)
            return [Expired(run_id=row.run_id, tenant=row.tenant) for row in rows]

    def give_up_blobs(self, run_id: str) -> tuple[str, ...]:
        with self._db.write() as connection:
            owner = connection.scalar(_owner, {"b_run_id": run_id}) if is_run_id(run_id) else None
            if owner is None:
                return ()
            # As in `submit`: a run of the same tenant that is being stored now may use the same blob.
            connection.execute(_lock_owner, {"b_tenant": owner})
            if connection.execute(_note_purge, {"b_run_id": run_id}).rowcount != 1:
                return ()
            digests = unshared(connection, run_id)
            connection.execute(sa.delete(run_blob).where(run_blob.c.run_id == run_id))
            connection.execute(sa.delete(run_news).where(run_news.c.run_id == run_id))
        return digests

    def purge_idempotency(self, *, dry_run: bool) -> int:
        if dry_run:
            with self._db.read() as connection:
                found = connection.scalar(sa.select(sa.func.count()).select_from(idempotency).where(_free_again))
                return int(found or 0)
        with self._db.write() as connection:
            return connection.execute(sa.delete(idempotency).where(_free_again)).rowcount


def insist_on_room(connection: sa.Connection, tenant: str, bundle: Bundle, *, max_stored: int) -> None:
    """Raises QuotaExceeded. The caller has locked the tenant's row, so two bundles cannot both have the last room."""
    if connection.execute(_known, {"b_tenant": tenant, "b_digest": bundle.digest}).first() is not None:
        return
    stored = _stored(connection, tenant)
    if stored + bundle.bytes_ > max_stored:
        raise QuotaExceeded(
            f"tenant {tenant} keeps {stored} bytes of its quota of {max_stored}; this bundle has {bundle.bytes_}"
        )


def unshared(connection: sa.Connection, run_id: str) -> tuple[str, ...]:
    """The blobs that no other run of the tenant uses."""
    return tuple(connection.scalars(_unshared, {"b_run_id": run_id}))


def _stored(connection: sa.Connection, tenant: str) -> int:
    return int(connection.scalar(STORED, {"b_tenant": tenant}) or 0)
