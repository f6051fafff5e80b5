"""Tenants, services, keys and workers."""

from collections.abc import Sequence
from datetime import timedelta

from service.adapters.memory.state import MemoryState, StoredTenant
from service.core.errors import Conflict, NotFound
from service.core.ids import new_id
from service.core.lease import cancelled
from service.core.ports.tenants import KeyRecord, Service, WorkerRecord
from service.core.run import Phase, Result
from service.core.tenancy import Principal, Tenant


class MemoryTenants(MemoryState):
    def create_tenant(self, tenant: Tenant) -> Tenant:
        with self._lock:
            if tenant.name in self._tenants:
                raise Conflict(f"there is a tenant {tenant.name} already, or was", code="tenant_exists")
            self._tenants[tenant.name] = StoredTenant(tenant)
            return tenant

    def get_tenant(self, name: str, *, service_id: str | None = None) -> Tenant:
        with self._lock:
            return self._tenant(name, service_id=service_id).tenant

    def list_tenants(self, *, service_id: str | None = None) -> Sequence[Tenant]:
        with self._lock:
            return [
                stored.tenant
                for name, stored in sorted(self._tenants.items())
                if not stored.deleted and not name.startswith("_") and service_id in (None, stored.tenant.service_id)
            ]

    def update_tenant(self, tenant: Tenant) -> Tenant:
        with self._lock:
            stored = self._tenant(tenant.name, service_id=None)
            stored.tenant = tenant.model_copy(update={"service_id": stored.tenant.service_id})
            return stored.tenant

    def delete_tenant(self, name: str) -> None:
        with self._lock:
            self._tenant(name, service_id=None).deleted = True
            self._keys = {id_: key for id_, key in self._keys.items() if key.tenant != name}
            for endpoint_id in [id_ for id_, stored in self._endpoints.items() if stored.owner.tenant == name]:
                self._forget_endpoint(endpoint_id)
            for _, stored in sorted(self._runs.items()):
                if stored.run.tenant != name or stored.run.phase is Phase.FINISHED:
                    continue
                if stored.run.phase is Phase.QUEUED:
                    self._end(stored, Result(verdict=cancelled("operator")))
                else:
                    stored.cancel_requested_by = stored.cancel_requested_by or "operator"

    def create_service(self, name: str) -> Service:
        with self._lock:
            if any(service.name == name for service in self._services.values()):
                raise Conflict(f"there is a service {name} already", code="service_exists")
            service = Service(id=new_id("svc"), name=name)
            self._services[service.id] = service
            return service

    def list_services(self) -> Sequence[Service]:
        with self._lock:
            return sorted(self._services.values(), key=lambda service: service.name)

    def add_key(self, key: KeyRecord) -> None:
        with self._lock:
            if key.tenant is not None:
                self._tenant(key.tenant, service_id=None)
            if key.service_id is not None and key.service_id not in self._services:
                raise NotFound
            self._keys[key.id] = key

    def find_key(self, hash_: str) -> Principal | None:
        with self._lock:
            key = next((key for key in self._keys.values() if key.hash == hash_), None)
        if key is None:
            return None
        return Principal(key_id=key.id, kind=key.kind, tenant=key.tenant, service_id=key.service_id)

    def revoke_key(self, key_id: str, *, tenant: str | None = None) -> None:
        with self._lock:
            if key_id not in self._keys or tenant not in (None, self._keys[key_id].tenant):
                raise NotFound
            del self._keys[key_id]

    def revoke_minted_by(self, minted_by: str) -> int:
        with self._lock:
            kept = {id_: key for id_, key in self._keys.items() if key.minted_by != minted_by}
            revoked, self._keys = len(self._keys) - len(kept), kept
            return revoked

    def _tenant(self, name: str, *, service_id: str | None) -> StoredTenant:
        stored = self._tenants.get(name)
        if stored is None or stored.deleted or service_id not in (None, stored.tenant.service_id):
            raise NotFound
        return stored


class MemoryWorkers(MemoryState):
    def record_worker(self, worker: WorkerRecord) -> None:
        with self._lock:
            self._workers[worker.id] = worker.model_copy(
                update={"measured_at": self.now(), "draining": worker.id in self._draining}
            )

    def forget_worker(self, worker_id: str) -> None:
        with self._lock:
            self._workers.pop(worker_id, None)

    def get_worker(self, worker_id: str) -> WorkerRecord | None:
        with self._lock:
            return self._workers.get(worker_id)

    def live_workers(self, *, fresh: timedelta) -> Sequence[WorkerRecord]:
        with self._lock:
            since = self.now() - fresh
            return [
                worker
                for _, worker in sorted(self._workers.items())
                if worker.measured_at is not None and worker.measured_at > since
            ]
