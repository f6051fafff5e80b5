"""What travels in bodies, where it is not a core object as it stands."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictStr

from service.core.boundary import Guarantees
from service.core.ports import WorkerRecord
from service.core.run import Run
from service.core.tenancy import Ceilings, NodeGroup, Quota, Tenant, TenantName, Trust


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


class WorkerPage(BaseModel):
    items: list[WorkerRecord]


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
