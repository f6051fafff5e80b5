"""/v1/admin: operators see every tenant; every route takes an operator's key and no other."""

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Path, Response

from service.api.acting import acting, purged
from service.api.auth import AnOperator
from service.api.context import InContext
from service.api.documentation import problems
from service.api.schemas import (
    ChangeTenant,
    CreateService,
    CreateTenant,
    KeyCreated,
    ServiceCreated,
    ServicePage,
    TenantCreated,
    TenantPage,
)
from service.core.tenancy import Tenant
from service.usecases import tenants

router = APIRouter(prefix="/v1/admin", tags=["operators"])
ByName = Annotated[str, Path(description="the tenant's name")]
_KEY = ("unauthenticated", "forbidden")


@router.post(
    "/tenants", status_code=201, operation_id="adminCreateTenant", summary="Create a tenant of the platform's own",
    responses=problems(*_KEY, "request_invalid", "tenant_exists", "too_large", "upload_timed_out"),
)  # fmt: skip
async def create_tenant(context: InContext, operator: AnOperator, body: CreateTenant) -> TenantCreated:
    """The first key is shown once."""
    tenant = body.tenant(service_id=None)
    create = partial(tenants.create_tenant, context.deps.tenants, tenant=tenant)
    detail = tenant.model_dump(mode="json")
    created, minted = await acting(context, operator, "tenant.create", tenant.name, create, detail=detail)
    return TenantCreated(tenant=created, key=minted.key, key_id=minted.id)


@router.get("/tenants", operation_id="adminListTenants", summary="List all tenants", responses=problems(*_KEY))
async def list_tenants(context: InContext, operator: AnOperator) -> TenantPage:
    found = await context.store(tenants.list_tenants, context.deps.tenants, service_id=None)
    return TenantPage(items=list(found))


@router.get(
    "/tenants/{name}", operation_id="adminGetTenant", summary="Read a tenant", responses=problems(*_KEY, "not_found")
)
async def get_tenant(context: InContext, operator: AnOperator, name: ByName) -> Tenant:
    return await context.store(tenants.get_tenant, context.deps.tenants, name=name, service_id=None)


@router.patch(
    "/tenants/{name}", operation_id="adminChangeTenant", summary="Change a tenant",
    responses=problems(*_KEY, "not_found", "request_invalid", "too_large", "upload_timed_out"),
)  # fmt: skip
async def change_tenant(context: InContext, operator: AnOperator, name: ByName, body: ChangeTenant) -> Tenant:
    """Runs that are already placed keep the wall that was chosen for them."""
    change = partial(tenants.change_tenant, context.deps.tenants, name=name, service_id=None, changes=body.changes)
    detail = body.model_dump(mode="json", exclude_unset=True)
    return await acting(context, operator, "tenant.change", name, change, detail=detail)


@router.delete(
    "/tenants/{name}", status_code=204, operation_id="adminDeleteTenant", summary="Delete a tenant",
    responses=problems(*_KEY, "not_found"), response_class=Response,
)  # fmt: skip
async def delete_tenant(context: InContext, operator: AnOperator, name: ByName) -> None:
    """Its keys are revoked and its runs cancelled at once; all else that it had goes as soon as they have ended. The
    name stays taken."""
    delete = partial(tenants.delete_tenant, context.deps.tenants, name=name, service_id=None)
    await acting(context, operator, "tenant.delete", name, delete)
    await purged(context, name)


@router.post(
    "/tenants/{name}/keys", status_code=201, operation_id="adminAddTenantKey", summary="Add a key to a tenant",
    responses=problems(*_KEY, "not_found"),
)  # fmt: skip
async def add_key(context: InContext, operator: AnOperator, name: ByName) -> KeyCreated:
    add = partial(tenants.add_tenant_key, context.deps.tenants, name=name, service_id=None)
    minted = await acting(context, operator, "key.create", name, add, result=lambda made: f"done: {made.id}")
    return KeyCreated(id=minted.id, key=minted.key)


@router.delete(
    "/tenants/{name}/keys/{key_id}", status_code=204, operation_id="adminRevokeTenantKey",
    summary="Revoke a tenant's key", responses=problems(*_KEY, "not_found"), response_class=Response,
)  # fmt: skip
async def revoke_key(context: InContext, operator: AnOperator, name: ByName, key_id: str) -> None:
    revoke = partial(tenants.revoke_tenant_key, context.deps.tenants, name=name, key_id=key_id, service_id=None)
    await acting(context, operator, "key.revoke", name, revoke, detail={"key": key_id})


@router.get("/services", operation_id="adminListServices", summary="List all services", responses=problems(*_KEY))
async def list_services(context: InContext, operator: AnOperator) -> ServicePage:
    """By name. Their keys are shown nowhere again."""
    return ServicePage(items=list(await context.store(context.deps.tenants.list_services)))


@router.post(
    "/services", status_code=201, operation_id="adminCreateService", summary="Create a service",
    responses=problems(*_KEY, "request_invalid", "service_exists", "too_large", "upload_timed_out"),
)  # fmt: skip
async def create_service(context: InContext, operator: AnOperator, body: CreateService) -> ServiceCreated:
    """A main application: its key creates tenants and acts for them. The key is shown once."""
    create = partial(tenants.create_service, context.deps.tenants, name=body.name)
    service, minted = await acting(context, operator, "service.create", body.name, create)
    return ServiceCreated(id=service.id, name=service.name, key=minted.key, key_id=minted.id)
