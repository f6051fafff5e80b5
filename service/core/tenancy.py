"""Who asks: the main application's customers, how far they are trusted, and how much they may use at once."""

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StrictStr

from service.core.quantities import Duration, Size

TENANT_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
TenantName = Annotated[StrictStr, Field(pattern=TENANT_PATTERN)]
NodeGroup = Annotated[StrictStr, Field(pattern=TENANT_PATTERN)]


class Trust(StrEnum):
    TRUSTED = "trusted"
    UNTRUSTED = "untrusted"


class KeyKind(StrEnum):
    """The letter in the key's prefix is the first of the word that people know it by."""

    TENANT = "tenant"
    SERVICE = "service"
    OPERATOR = "operator"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Quota(_Frozen):
    """`concurrent` runs in a boundary at once, `queued` waiting, `storage_bytes` of blobs kept."""

    concurrent: Annotated[int, Field(ge=1, le=10_000)] = 2
    queued: Annotated[int, Field(ge=1, le=1_000_000)] = 100
    storage_bytes: Annotated[Size, Field(ge=1)] = 2**30


class CeilingLimits(_Frozen):
    """The most a run of this tenant may ask for; an absent one is the platform's. None lies below what every run may
    have (`controls.Limits`): a ceiling that nothing fits under would be a tenant that cannot run."""

    cpu: Annotated[float, Field(ge=0.1, strict=True)] | None = None
    memory: Annotated[Size, Field(ge=32 * 2**20)] | None = None
    pids: Annotated[int, Field(ge=8)] | None = None
    disk: Annotated[Size, Field(ge=2**20)] | None = None
    files: Annotated[int, Field(ge=16)] | None = None
    open_files: Annotated[int, Field(ge=16)] | None = None
    output: Annotated[Size, Field(ge=1024)] | None = None
    wall: Duration | None = None
    artifacts: Size | None = None


class Ceilings(_Frozen):
    limits: CeilingLimits = CeilingLimits()


class Tenant(_Frozen):
    """`affinity` names the tenant's node group; `service_id` is the service key's owner that created it."""

    name: StrictStr
    trust: Trust = Trust.UNTRUSTED
    affinity: NodeGroup | None = None
    quota: Quota = Quota()
    ceilings: Ceilings = Ceilings()
    service_id: str | None = None


class Principal(_Frozen):
    """Who a key speaks for. A tenant key has `tenant`, a service key has `service_id`, an operator's has neither."""

    key_id: str
    kind: KeyKind
    tenant: str | None = None
    service_id: str | None = None
