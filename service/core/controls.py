"""What constrains a run: limits, network, needs and a floor of isolation. A request only ever raises requirements."""

from datetime import timedelta
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictStr, model_validator

from service.core.errors import DocumentInvalid
from service.core.quantities import Duration, Size, format_duration, format_size
from service.core.tenancy import Ceilings, Tenant, Trust

MIB = 2**20
GIB = 2**30


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Isolation(StrEnum):
    AUTO = "auto"
    SOFT = "soft"
    HARD = "hard"
    DEDICATED_CLUSTER = "dedicated-cluster"


class Need(StrEnum):
    KUBERNETES_API = "kubernetes-api"
    PRIVILEGED = "privileged"


class Limits(_Document):
    """Bytes, counts and durations. `memory` counts everything the sandbox holds: the guest's processes, its files in
    /work and /tmp, and the sandbox's own share (gVisor: about 16 MiB), hence the floor. `disk` and `files` are for
    /work and /tmp together; `output` is per stream and step; `pids` counts threads too."""

    cpu: Annotated[float, Field(ge=0.1, le=64, strict=True)] = 1
    memory: Annotated[Size, Field(ge=32 * MIB)] = 256 * MIB
    pids: Annotated[int, Field(ge=8, le=4096, strict=True)] = 128
    disk: Annotated[Size, Field(ge=1 * MIB)] = 128 * MIB
    files: Annotated[int, Field(ge=16, le=1_000_000, strict=True)] = 4096
    open_files: Annotated[int, Field(ge=16, le=65536, strict=True)] = 1024
    output: Annotated[Size, Field(ge=1024)] = 1 * MIB
    wall: Annotated[Duration, Field(json_schema_extra={"default": "60s"})] = timedelta(seconds=60)
    artifacts: Size = 32 * MIB


PLATFORM_CEILINGS = Limits(
    cpu=8, memory=4 * GIB, pids=1024, disk=2 * GIB, files=100_000, open_files=4096, output=8 * MIB,
    wall=timedelta(seconds=900), artifacts=256 * MIB,
)  # fmt: skip


class Network(_Document):
    mode: Literal["none", "allow"] = "none"
    allow: Annotated[
        tuple[Annotated[StrictStr, Field(pattern=r"^[a-z0-9.-]{1,253}:[0-9]{1,5}$")], ...], Field(max_length=64)
    ] = ()

    @model_validator(mode="after")
    def _list_goes_with_mode(self) -> "Network":
        if (self.mode == "allow") != bool(self.allow):
            raise ValueError(
                "mode allow needs at least one entry such as api.example.com:443, and mode none takes none"
            )
        return self


class Controls(_Document):
    isolation: Isolation = Isolation.AUTO
    code: Trust | None = None
    needs: Annotated[tuple[Need, ...], Field(max_length=8)] = ()
    limits: Limits = Limits()
    network: Network = Network()


class AppliedControls(Controls):
    """Controls after the tenant's defaults and ceilings: what is enforced, and what the run shows."""

    code: Trust


def ceilings(of_tenant: Ceilings) -> Limits:
    """The most that one run of a tenant may ask for: its own ceilings, and nowhere more than the platform's."""
    own = {name: value for name, value in of_tenant.limits if value is not None}
    return Limits(**{name: min(ceiling, own.get(name, ceiling)) for name, ceiling in PLATFORM_CEILINGS})


def apply(controls: Controls, tenant: Tenant) -> AppliedControls:
    """Judge what was asked against who asks. A limit above the tenant's ceiling is an error; a default above
    it, which nobody asked for, is the ceiling.

    Raises DocumentInvalid("controls") that names each place.
    """
    errors: list[dict[str, str]] = []
    if controls.code is Trust.TRUSTED and tenant.trust is Trust.UNTRUSTED:
        errors.append(
            {"path": "code", "message": f"tenant {tenant.name} is untrusted; only a trusted tenant may say trusted"}
        )
    limits: dict[str, Any] = {}
    for name in Limits.model_fields:
        asked, own, ceiling = (
            getattr(controls.limits, name),
            getattr(tenant.ceilings.limits, name),
            getattr(PLATFORM_CEILINGS, name),
        )
        whose = "the platform's"
        if own is not None and own < ceiling:
            ceiling, whose = own, "the tenant's"
        limits[name] = min(asked, ceiling)
        if asked > ceiling and name in controls.limits.model_fields_set:
            message = f"{_show(asked, name)} is above {whose} ceiling; at most {_show(ceiling, name)}"
            errors.append({"path": f"limits.{name}", "message": message})
    if errors:
        raise DocumentInvalid("controls", errors)
    code = Trust.UNTRUSTED if tenant.trust is Trust.UNTRUSTED else controls.code or Trust.TRUSTED
    return AppliedControls(**dict(controls) | {"code": code, "limits": Limits(**limits)})


def _show(value: Any, name: str) -> str:
    if isinstance(value, timedelta):
        return format_duration(value)
    return format_size(value) if name in ("memory", "disk", "output", "artifacts") else f"{value:g}"
