"""What travels in bodies, where it is not a core object as it stands."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictStr

from service.core.boundary import Guarantees
from service.core.events import EventType
from service.core.ports.tenants import Service
from service.core.run import Run
from service.core.tenancy import Ceilings, NodeGroup, Quota, Tenant, TenantName, Trust
from service.core.webhooks.models import Attempt, DeadLetter, Endpoint
from service.core.webhooks.urls import MAX_URL


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


# --- requests ---------------------------------------------------------------------------------------------------------


class CreateTenant(_Body):
    """Everything but the name has a default; the default trust is none."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"name": "acme", "trust": "untrusted"}]})

    name: TenantName
    trust: Trust = Trust.UNTRUSTED
    affinity: NodeGroup | None = None
    quota: Quota = Quota()
    ceilings: Ceilings = Ceilings()

    def tenant(self, *, service_id: str | None) -> Tenant:
        return Tenant(**dict(self), service_id=service_id)


class ChangeTenant(_Body):
    """What is given is set, within quota and ceilings key by key; the rest stays."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"quota": {"concurrent": 4}}]})

    trust: Trust = Trust.UNTRUSTED
    affinity: NodeGroup | None = None
    quota: Quota = Quota()
    ceilings: Ceilings = Ceilings()

    @property
    def changes(self) -> dict[str, Any]:
        return self.model_dump(exclude_unset=True)


class CreateService(_Body):
    name: TenantName


class CreateWebhook(_Body):
    """`types`: those of events that are sent; `*` is all of them."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"url": "https://shop.example/hooks", "types": ["*"]}]}
    )

    url: Annotated[str, Field(min_length=1, max_length=MAX_URL, description="https, port 443 or 8443, a public host")]
    types: Annotated[list[Literal["*"] | EventType], Field(min_length=1, max_length=20)] = ["*"]


# --- answers ----------------------------------------------------------------------------------------------------------


class RunPage(BaseModel):
    items: list[Run]
    next_cursor: str | None = Field(description="give it back as `cursor`; null on the last page")


class TenantPage(BaseModel):
    items: list[Tenant]


class TenantCreated(BaseModel):
    tenant: Tenant
    key: Annotated[StrictStr, Field(description="a tenant key; shown once")]
    key_id: str


class KeyCreated(BaseModel):
    id: str
    key: Annotated[StrictStr, Field(description="shown once")]


class ServiceCreated(KeyCreated):
    """`id` is the service's own."""

    name: str
    key_id: str


class ServicePage(BaseModel):
    items: list[Service]


class WebhookCreated(Endpoint):
    secret: Annotated[StrictStr, Field(description="`whsec_...`; what deliveries are signed with; shown once")]


class WebhookPage(BaseModel):
    items: list[Endpoint]


class DeliveryPage(BaseModel):
    """Attempts, newest first. `pending`: deliveries that still wait, counted to 1000."""

    items: list[Attempt]
    next_cursor: str | None = Field(description="give it back as `cursor`; null on the last page")
    pending: int


class DeadLettersShown(BaseModel):
    items: list[DeadLetter]
    next_cursor: str | None = Field(description="give it back as `cursor`; null on the last page")


class Replayed(BaseModel):
    """A delivery that is being sent again, and whose it is."""

    id: str
    webhook_id: str


class OfferedBoundary(BaseModel):
    """`missing`: why no live worker can build it; empty when one can."""

    boundary: str
    available: bool
    guarantees: Guarantees
    missing: list[str]
    versions: dict[str, str]


class OfferedRuntime(BaseModel):
    name: str
    digest: str


class OfferedLimits(BaseModel):
    """`ceilings` are the most this tenant may ask for, `defaults` what applies when nothing is asked."""

    ceilings: dict[str, Any]
    defaults: dict[str, Any]
    platform: dict[str, Any]
    upload_bytes: int
    bundle_content_bytes: int
    bundle_entries: int


class CapabilitiesShown(BaseModel):
    boundaries: list[OfferedBoundary]
    runtimes: list[OfferedRuntime]
    limits: OfferedLimits
    quota: Quota


class Health(BaseModel):
    status: str


class Ready(BaseModel):
    status: str
    checks: dict[str, str] = Field(description="name to `ok` or `failing`")
