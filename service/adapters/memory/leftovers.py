"""Events that were told long ago, blobs that no run uses, and what is left of deleted tenants."""

from collections.abc import Collection, Sequence
from datetime import timedelta

from service.adapters.memory.state import MemoryState, StoredEvent
from service.core.run import Phase
from service.core.webhooks.schedule import State


class MemoryLeftovers(MemoryState):
    def purge_events(self, *, older_than: timedelta, dry_run: bool) -> int:
        with self._lock:
            until = self.now() - older_than
            old = [event for event in self._events if event.at < until and self._is_told(event)]
            if not dry_run:
                self._events = [event for event in self._events if event not in old]
            return len(old)

    def tenant_names(self) -> Sequence[str]:
        with self._lock:
            return sorted(name for name, stored in self._tenants.items() if not stored.purged)

    def unused_blobs(self, tenant: str, digests: Collection[str]) -> Sequence[str]:
        with self._lock:
            used = {digest for s in self._runs.values() if s.run.tenant == tenant for digest in s.blobs}
            return sorted(set(digests) - used)

    def deleted_tenants(self) -> Sequence[str]:
        with self._lock:
            return sorted(name for name, stored in self._tenants.items() if stored.deleted and not stored.purged)

    def purge_tenant(self, name: str) -> bool:
        with self._lock:
            if name not in self._tenants or not self._tenants[name].deleted:
                return False
            its = [s for s in self._runs.values() if s.run.tenant == name]
            done = [s for s in its if s.run.phase is Phase.FINISHED and s.fence == s.destroyed_fence]
            for stored in done:
                del self._runs[stored.run.id]
            if len(done) < len(its):
                return False
            self._idempotency = {key: taken for key, taken in self._idempotency.items() if key[0] != name}
            self._endpoints = {id_: one for id_, one in self._endpoints.items() if one.owner.tenant != name}
            self._deliveries = {
                id_: one
                for id_, one in self._deliveries.items()
                if one.endpoint_id in self._endpoints and (one.tenant != name or one.state is State.PENDING)
            }
            self._events = [event for event in self._events if event.tenant != name or not self._is_told(event)]
            return all(event.tenant != name for event in self._events)

    def tenant_purged(self, name: str) -> None:
        with self._lock:
            self._tenants[name].purged = self._tenants[name].deleted

    def _is_told(self, event: StoredEvent) -> bool:
        to_be_delivered = {one.event_id for one in self._deliveries.values() if one.state is State.PENDING}
        told = event.tenant.startswith("_") or (event.published and event.fanned)
        return told and event.event["id"] not in to_be_delivered
