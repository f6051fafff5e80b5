"""/v1/tenants: a service's own tenants. What another service created does not exist here.

What a service does to its tenants stands in the operators' audit log, as what they do themselves.
"""

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Path, Response

from service.api.acting import acting, purged
from service.api.auth import AService
from service.api.context import InContext
from service.api.documentation import problems
from service.api.schemas import ChangeTenant, CreateTenant, KeyCreated, TenantCreated, TenantPage
from service.core.tenancy import Tenant
from service.usecases import tenants

router = APIRouter(prefix="/v1/tenants", tags=["tenants"])
ByName = Annotated[str, Path(description="the tenant's name")]
_KEY = ("unauthenticated", "forbidden")


@router.post(
    "", status_code=201, operation_id="createTenant", summary="Create a tenant",
    responses=problems(*_KEY, "request_invalid", "tenant_exists", "too_large", "upload_timed_out"),
)  # fmt: skip
async def create_tenant(context: InContext, service: AService, body: CreateTenant) -> TenantCreated:
    """The tenant belongs to the service that asks; its first key is shown once."""
    tenant = body.tenant(service_id=service.service_id)
    create = partial(tenants.create_tenant, context.deps.tenants, tenant=tenant)
    detail = tenant.model_dump(mode="json")
    created, minted = await acting(context, service, "tenant.create", tenant.name, create, detail=detail)
    return TenantCreated(tenant=created, key=minted.key, key_id=minted.id)


@router.get("", operation_id="listTenants", summary="List the service's tenants", responses=problems(*_KEY))
async def list_tenants(context: InContext, service: AService) -> TenantPage:
    found = await context.store(tenants.list_tenants, context.deps.tenants, service_id=service.service_id)
    return TenantPage(items=list(found))


@router.get(
    "/{name}", operation_id="getTenant", summary="Read a tenant", responses=problems(*_KEY, "not_found")
)  # fmt: skip
async def get_tenant(context: InContext, service: AService, name: ByName) -> Tenant:
    return await context.store(tenants.get_tenant, context.deps.tenants, name=name, service_id=service.service_id)


@router.patch(
    "/{name}", operation_id="changeTenant", summary="Change a tenant",
    responses=problems(*_KEY, "not_found", "request_invalid", "too_large", "upload_timed_out"),
)  # fmt: skip
async def change_tenant(context: InContext, service: AService, name: ByName, body: ChangeTenant) -> Tenant:
    """Runs that are already placed keep the wall that was chosen for them."""
    change = partial(
        tenants.change_tenant, context.deps.tenants, name=name, service_id=service.service_id, changes=body.changes
    )
    detail = body.model_dump(mode="json", exclude_unset=True)
    return await acting(context, service, "tenant.change", name, change, detail=detail)


@router.delete(
    "/{name}", status_code=204, operation_id="deleteTenant", summary="Delete a tenant",
    responses=problems(*_KEY, "not_found"), response_class=Response,
)  # fmt: skip
async def delete_tenant(context: InContext, service: AService, name: ByName) -> None:
    """Its keys are revoked and its runs cancelled at once; all else that it had goes as soon as they have ended. The
    name stays taken."""
    delete = partial(tenants.delete_tenant, context.deps.tenants, name=name, service_id=service.service_id)
    await acting(context, service, "tenant.delete", name, delete)
    await purged(context, name)


@router.post(
    "/{name}/keys", status_code=201, operation_id="addTenantKey", summary="Add a key to a tenant",
    responses=problems(*_KEY, "not_found"),
)  # fmt: skip
async def add_key(context: InContext, service: AService, name: ByName) -> KeyCreated:
    add = partial(tenants.add_tenant_key, context.deps.tenants, name=name, service_id=service.service_id)
    minted = await acting(context, service, "key.create", name, add, result=lambda made: f"done: {made.id}")
    return KeyCreated(id=minted.id, key=minted.key)


@router.delete(
    "/{name}/keys/{key_id}", status_code=204, operation_id="revokeTenantKey", summary="Revoke a tenant's key",
    responses=problems(*_KEY, "not_found"), response_class=Response,
)  # fmt: skip
async def revoke_key(context: InContext, service: AService, name: ByName, key_id: str) -> None:
    revoke = partial(
        tenants.revoke_tenant_key, context.deps.tenants, name=name, key_id=key_id, service_id=service.service_id
    )
    await acting(context, service, "key.revoke", name, revoke, detail={"key": key_id})
