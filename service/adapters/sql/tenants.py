"""Tenants, services and keys. A name that was deleted stays taken; a key that was revoked no longer exists."""

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from service.adapters.sql.engine import db_now
from service.adapters.sql.fairness import serialised
from service.adapters.sql.schema import IS_ACTIVE, IS_QUEUED, api_key, run, service, tenant, webhook_endpoint
from service.adapters.sql.transitions import SqlPart, cancel_queued
from service.core.errors import Conflict, NotFound
from service.core.ids import new_id
from service.core.ports.tenants import KeyRecord, Service
from service.core.tenancy import Ceilings, KeyKind, Principal, Quota, Tenant, Trust

_live = tenant.c.deleted_at.is_(None)
_principal = (
    sa.select(api_key.c.id, api_key.c.kind, api_key.c.tenant, api_key.c.service_id)
    .where(api_key.c.hash == sa.bindparam("b_hash"), api_key.c.revoked_at.is_(None))
)  # fmt: skip


class SqlTenants(SqlPart):
    def create_tenant(self, tenant: Tenant) -> Tenant:
        words = _words(tenant) | {"name": tenant.name, "service_id": tenant.service_id, "created_at": db_now()}
        if not self._insert_new(_TENANT, words):
            raise Conflict(f"there is a tenant {tenant.name} already, or was", code="tenant_exists")
        return tenant

    def get_tenant(self, name: str, *, service_id: str | None = None) -> Tenant:
        wanted = sa.select(tenant).where(tenant.c.name == name, _live, *_of_service(service_id))
        with self._db.read() as connection:
            row = connection.execute(wanted).one_or_none() if "\0" not in name else None
        if row is None:
            raise NotFound
        return _tenant(row)

    def list_tenants(self, *, service_id: str | None = None) -> Sequence[Tenant]:
        wanted = sa.select(tenant).where(_live, sa.func.substr(tenant.c.name, 1, 1) != "_", *_of_service(service_id))
        with self._db.read() as connection:
            return [_tenant(row) for row in connection.execute(wanted.order_by(tenant.c.name))]

    def update_tenant(self, tenant: Tenant) -> Tenant:
        change = sa.update(_TENANT).where(_TENANT.c.name == tenant.name, _live).values(_words(tenant))
        with self._db.write() as connection:
            row = connection.execute(change.returning(*_TENANT.c)).one_or_none()
        if row is None:
            raise NotFound
        return _tenant(row)

    def delete_tenant(self, name: str) -> None:
        installation = self.installation_id()
        gone = sa.update(tenant).where(tenant.c.name == name, _live).values(deleted_at=db_now())
        queued = sa.select(run.c.id).where(run.c.tenant == name, sa.text(IS_QUEUED)).order_by(run.c.id)
        mark = sa.update(run).where(run.c.tenant == name, sa.text(IS_ACTIVE))
        mark = mark.values(cancel_requested_by=sa.func.coalesce(run.c.cancel_requested_by, "operator"))
        with self._db.write() as connection:
            serialised(connection)  # a claim holds a run while it wants the tenant; here it is the other way round
            if connection.execute(gone).rowcount != 1:
                raise NotFound
            connection.execute(_revoke.where(api_key.c.tenant == name))
            connection.execute(sa.delete(webhook_endpoint).where(webhook_endpoint.c.tenant == name))
            for run_id in connection.scalars(queued.with_for_update()).all():
                cancel_queued(connection, run_id, by="operator", installation=installation)
            connection.execute(mark)

    def create_service(self, name: str) -> Service:
        made = Service(id=new_id("svc"), name=name)
        if not self._insert_new(service, made.model_dump() | {"created_at": db_now()}):
            raise Conflict(f"there is a service {name} already", code="service_exists")
        return made

    def list_services(self) -> Sequence[Service]:
        with self._db.read() as connection:
            rows = connection.execute(sa.select(service.c.id, service.c.name).order_by(service.c.name))
            return [Service(id=row.id, name=row.name) for row in rows]

    def add_key(self, key: KeyRecord) -> None:
        owner = sa.select(tenant.c.name).where(tenant.c.name == key.tenant, _live).with_for_update(key_share=True)
        maker = sa.select(service.c.id).where(service.c.id == key.service_id)
        with self._db.write() as connection:
            for named, exists in ((key.tenant, owner), (key.service_id, maker)):
                if named is not None and connection.execute(exists).one_or_none() is None:
                    raise NotFound
            words = key.model_dump(mode="json") | {"created_at": db_now()}
            connection.execute(sa.insert(api_key).values(words))

    def find_key(self, hash_: str) -> Principal | None:
        with self._db.read() as connection:
            row = connection.execute(_principal, {"b_hash": hash_}).one_or_none()
        if row is None:
            return None
        return Principal(key_id=row.id, kind=KeyKind(row.kind), tenant=row.tenant, service_id=row.service_id)

    def revoke_key(self, key_id: str, *, tenant: str | None = None) -> None:
        wanted = _revoke.where(api_key.c.id == key_id)
        if tenant is not None:
            wanted = wanted.where(api_key.c.tenant == tenant)
        with self._db.write() as connection:
            if "\0" in key_id or connection.execute(wanted).rowcount != 1:
                raise NotFound

    def revoke_minted_by(self, minted_by: str) -> int:
        with self._db.write() as connection:
            return connection.execute(_revoke.where(api_key.c.minted_by == minted_by)).rowcount

    def _insert_new(self, table: sa.Table, words: dict[str, Any]) -> bool:
        """-> False when the name is taken."""
        insert = sqlite.insert if self._db.is_sqlite else postgresql.insert
        with self._db.write() as connection:
            made = insert(table).values(words).on_conflict_do_nothing().returning(table.c.name)
            return connection.execute(made).one_or_none() is not None


_TENANT = tenant  # where an argument has the table's name
_revoke = sa.update(api_key).where(api_key.c.revoked_at.is_(None)).values(revoked_at=db_now())


def _of_service(service_id: str | None) -> list[sa.ColumnElement[bool]]:
    return [] if service_id is None else [tenant.c.service_id == service_id]


def _words(value: Tenant) -> dict[str, Any]:
    """What `update_tenant` may change: neither the name nor the owner."""
    return {
        "trust": value.trust.value,
        "affinity": value.affinity,
        **value.quota.model_dump(),
        "ceilings": value.ceilings.model_dump_json(),
    }


def _tenant(row: sa.Row[Any]) -> Tenant:
    return Tenant(
        name=row.name,
        trust=Trust(row.trust),
        affinity=row.affinity,
        quota=Quota(concurrent=row.concurrent, queued=row.queued, storage_bytes=row.storage_bytes),
        ceilings=Ceilings.model_validate_json(row.ceilings),
        service_id=row.service_id,
    )
