"""What the logic asks of the store of tenants, keys and workers."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Protocol

from pydantic import BaseModel, ConfigDict

from service.core.boundary import Capabilities
from service.core.canary import CanaryView
from service.core.tenancy import KeyKind, Principal, Tenant


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class KeyRecord(_Frozen):
    """`hash` is of the whole key; the key itself is shown once and stored nowhere. `minted_by`: api, up, cli."""

    id: str
    kind: KeyKind
    hash: str
    tenant: str | None = None
    service_id: str | None = None
    minted_by: str = "api"


class Service(_Frozen):
    id: str
    name: str


class TenantStore(Protocol):
    """`service_id=None` is the operator's view of all; otherwise only what that service created exists."""

    def create_tenant(self, tenant: Tenant) -> Tenant: ...  # Conflict(tenant_exists)
    def get_tenant(self, name: str, *, service_id: str | None = None) -> Tenant: ...  # NotFound
    def list_tenants(self, *, service_id: str | None = None) -> Sequence[Tenant]: ...
    def update_tenant(self, tenant: Tenant) -> Tenant: ...
    def delete_tenant(self, name: str) -> None:
        """Cancels its queued runs, marks active ones, revokes its keys; the name stays taken."""
        ...

    def create_service(self, name: str) -> Service: ...  # Conflict(service_exists)
    def list_services(self) -> Sequence[Service]: ...
    def add_key(self, key: KeyRecord) -> None: ...
    def find_key(self, hash_: str) -> Principal | None: ...
    def revoke_key(self, key_id: str, *, tenant: str | None = None) -> None: ...
    def revoke_minted_by(self, minted_by: str) -> int: ...


class WorkerRecord(_Frozen):
    """What the API knows of a worker: fresh for 90 s after `measured_at`."""

    id: str
    host: str
    site: str
    capabilities: tuple[Capabilities, ...]
    slots: int = 1
    """Runs that it plays at once."""
    draining: bool = False
    """An operator's word, not the worker's: it claims nothing more."""
    measured_at: datetime | None = None


class WorkerStore(Protocol):
    def record_worker(self, worker: WorkerRecord) -> None: ...
    def forget_worker(self, worker_id: str) -> None: ...
    def get_worker(self, worker_id: str) -> WorkerRecord | None: ...
    def live_workers(self, *, fresh: timedelta) -> Sequence[WorkerRecord]: ...


class Canaries(Protocol):
    """The runs of the platform's own tenant, `core.canary`."""

    def canary_view(self, *, fresh: timedelta) -> CanaryView:
        """`fresh`: a worker that was silent for longer does not count."""
        ...

    def old_canaries(self, *, keep: int) -> Sequence[str]:
        """Those that ended and whose boundary is known to be gone, but for the `keep` newest."""
        ...
