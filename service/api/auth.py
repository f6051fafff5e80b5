"""Who is calling, and for whom. The tenant comes from the key; for a service key from a header, which is checked.

Every router says which kinds of key are its own. A key on a route that is not its own is 403, whatever else is wrong.
"""

import re
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from service.api.context import Context, InContext
from service.core.errors import DocumentInvalid, Forbidden, NotFound, Unauthenticated
from service.core.tenancy import KeyKind, Principal
from service.core.webhooks.models import Owner
from service.usecases.keys import authenticate, key_hash
from service.usecases.tenants import get_tenant

_BEARER = HTTPBearer(
    scheme_name="key",
    auto_error=False,
    description="`bd_t_...` a tenant's, `bd_s_...` a service's, `bd_a_...` an operator's",
)
_CREDENTIALS = re.compile(r"[\x21-\x7e]{1,200}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Caller:
    """The name of the tenant that a request is about, checked, and whose key asked."""

    principal: Principal
    tenant: str


async def _principal(
    request: Request, context: InContext, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]
) -> Principal:
    if credentials is None or not _CREDENTIALS.fullmatch(credentials.credentials):
        raise Unauthenticated("send a key: Authorization: Bearer bd_...")
    principal = await context.store(authenticate, context.deps.tenants, key=credentials.credentials)
    request.state.key_id, request.state.key_hash = principal.key_id, key_hash(credentials.credentials)
    return principal


async def _operator(principal: Annotated[Principal, Depends(_principal)]) -> Principal:
    return _of_kind(principal, KeyKind.OPERATOR)


async def _service(principal: Annotated[Principal, Depends(_principal)]) -> Principal:
    return _of_kind(principal, KeyKind.SERVICE)


async def _caller(
    context: InContext,
    principal: Annotated[Principal, Depends(_principal)],
    blastdoor_tenant: Annotated[
        str | None,
        Header(
            alias="Blastdoor-Tenant", description="whom a service key acts for; with a tenant key it may be left out"
        ),
    ] = None,
) -> Caller:
    return await caller_of(context, principal, blastdoor_tenant)


async def caller_of(context: Context, principal: Principal, asked: str | None) -> Caller:
    """`asked`: the tenant that the header names. Raises Forbidden, NotFound, DocumentInvalid."""
    _of_kind(principal, KeyKind.TENANT, KeyKind.SERVICE)
    if principal.kind is KeyKind.TENANT:
        assert principal.tenant is not None
        if asked not in (None, principal.tenant):
            raise NotFound
        return Caller(principal=principal, tenant=principal.tenant)
    assert principal.service_id is not None
    if asked is None:
        row = {"path": "header.Blastdoor-Tenant", "message": "a service key says here whom it acts for"}
        raise DocumentInvalid("request", [row])
    tenant = await context.store(get_tenant, context.deps.tenants, name=asked, service_id=principal.service_id)
    return Caller(principal=principal, tenant=tenant.name)


async def _owner(
    context: InContext,
    principal: Annotated[Principal, Depends(_principal)],
    blastdoor_tenant: Annotated[
        str | None,
        Header(alias="Blastdoor-Tenant", description="whom a service key acts for; absent: for the service itself"),
    ] = None,
) -> Owner:
    """Whose webhooks a request is about: a tenant's, or with a service key and no tenant the service's own."""
    if principal.kind is KeyKind.SERVICE and blastdoor_tenant is None:
        return Owner(service_id=principal.service_id)
    return Owner(tenant=(await caller_of(context, principal, blastdoor_tenant)).tenant)


def _of_kind(principal: Principal, *kinds: KeyKind) -> Principal:
    if principal.kind not in kinds:
        raise Forbidden(f"a key of kind {principal.kind} has no business here; this is for: {', '.join(kinds)}")
    return principal


AnOperator = Annotated[Principal, Depends(_operator)]
AService = Annotated[Principal, Depends(_service)]
AnOwner = Annotated[Owner, Depends(_owner)]
ACaller = Annotated[Caller, Depends(_caller)]
