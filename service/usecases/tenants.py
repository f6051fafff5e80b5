"""Tenants and services: who may use the platform, and how far they are trusted.

`service_id=None` is an operator, who sees all; a service sees what it created, and everything else does not exist.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from service.core.errors import DocumentInvalid, NotFound
from service.core.ports.tenants import Service, TenantStore
from service.core.tenancy import TENANT_PATTERN, KeyKind, Tenant
from service.usecases.keys import MintedKey, mint

_NAME = re.compile(TENANT_PATTERN, re.ASCII)


def create_tenant(store: TenantStore, *, tenant: Tenant) -> tuple[Tenant, MintedKey]:
    """The tenant and its first key. Raises Conflict(tenant_exists), also for a name that was deleted."""
    created = store.create_tenant(tenant)
    return created, mint(store, kind=KeyKind.TENANT, tenant=created.name)


def get_tenant(store: TenantStore, *, name: str, service_id: str | None) -> Tenant:
    """Raises NotFound: absent, another service's, and what cannot be a name are the same answer."""
    if not _NAME.fullmatch(name):  # also: names that start with _ are the platform's own
        raise NotFound
    return store.get_tenant(name, service_id=service_id)


def list_tenants(store: TenantStore, *, service_id: str | None) -> Sequence[Tenant]:
    return [tenant for tenant in store.list_tenants(service_id=service_id) if not tenant.name.startswith("_")]


def change_tenant(store: TenantStore, *, name: str, service_id: str | None, changes: Mapping[str, Any]) -> Tenant:
    """Set what `changes` has of trust, affinity, quota and ceilings; within the last two, key by key.

    Runs that are already placed keep the wall that was chosen for them.
    """
    tenant = get_tenant(store, name=name, service_id=service_id)
    if not changes:
        raise DocumentInvalid("request", [{"path": "", "message": "should change something"}])
    merged = _merged(tenant.model_dump(), changes)
    return store.update_tenant(Tenant.model_validate(merged))


def delete_tenant(store: TenantStore, *, name: str, service_id: str | None) -> None:
    """Its keys are revoked and its runs cancelled at once; the name stays taken, so that nobody inherits it."""
    store.delete_tenant(get_tenant(store, name=name, service_id=service_id).name)


def add_tenant_key(store: TenantStore, *, name: str, service_id: str | None) -> MintedKey:
    return mint(store, kind=KeyKind.TENANT, tenant=get_tenant(store, name=name, service_id=service_id).name)


def revoke_tenant_key(store: TenantStore, *, name: str, key_id: str, service_id: str | None) -> None:
    """Raises NotFound for a key that is not this tenant's."""
    store.revoke_key(key_id, tenant=get_tenant(store, name=name, service_id=service_id).name)


def create_service(store: TenantStore, *, name: str) -> tuple[Service, MintedKey]:
    """The service and its key. Raises Conflict(service_exists)."""
    service = store.create_service(name)
    return service, mint(store, kind=KeyKind.SERVICE, service_id=service.id)


def _merged(current: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(current)
    for name, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merged(merged[name], value) if both else value
    return merged
