"""What is kept beside the runs' records, how much of it each tenant has, and what is given up for its age."""

from collections.abc import Sequence
from datetime import timedelta

from service.adapters.memory.state import MemoryState, StoredRun
from service.core.boundary import Bundle
from service.core.errors import QuotaExceeded
from service.core.ports.runs import Expired
from service.core.run import Phase

IDEMPOTENCY_KEPT = timedelta(hours=24)


class MemoryKeeping(MemoryState):
    def storage_left(self, tenant: str) -> int:
        with self._lock:
            owner = self._tenants.get(tenant)
            return 0 if owner is None else max(0, owner.tenant.quota.storage_bytes - self._stored_bytes(tenant))

    def expired(
        self, *, older_than: timedelta, with_blobs: bool = False, after: str | None = None, limit: int = 500
    ) -> Sequence[Expired]:
        with self._lock:
            until = self.now() - older_than
            found = [
                Expired(run_id=run_id, tenant=stored.run.tenant)
                for run_id, stored in sorted(self._runs.items())
                if stored.run.finished_at is not None
                and stored.run.finished_at <= until
                and run_id > (after or "")
                and not (with_blobs and stored.blobs_purged)
            ]
            return found[:limit]

    def give_up_blobs(self, run_id: str) -> tuple[str, ...]:
        with self._lock:
            stored = self._runs.get(run_id)
            if stored is None or stored.run.phase is not Phase.FINISHED:
                return ()
            unshared = self._unshared(stored)
            stored.blobs, stored.blobs_purged, stored.news = {}, True, []
            return unshared

    def purge_idempotency(self, *, dry_run: bool) -> int:
        with self._lock:
            since = self.now() - IDEMPOTENCY_KEPT
            free_again = [key for key, taken in self._idempotency.items() if taken.at < since]
            for key in [] if dry_run else free_again:
                del self._idempotency[key]
            return len(free_again)

    def _insist_on_room(self, tenant: str, bundle: Bundle, *, max_stored: int) -> None:
        if any(bundle.digest in stored.blobs for stored in self._of(tenant)):
            return
        used = self._stored_bytes(tenant)
        if used + bundle.bytes_ > max_stored:
            raise QuotaExceeded(
                f"tenant {tenant} keeps {used} bytes of its quota of {max_stored}; this bundle has {bundle.bytes_}"
            )

    def _unshared(self, stored: StoredRun) -> tuple[str, ...]:
        """The blobs that no other run of the tenant uses."""
        others = [other.blobs for other in self._of(stored.run.tenant) if other is not stored]
        mine = {digest for digest in stored.blobs if digest.startswith("sha256:")}
        return tuple(sorted(mine - {digest for blobs in others for digest in blobs}))

    def _stored_bytes(self, tenant: str) -> int:
        sizes: dict[str, int] = {}
        for stored in self._of(tenant):
            sizes |= stored.blobs
        return sum(sizes.values())

    def _of(self, tenant: str) -> list[StoredRun]:
        return [stored for stored in self._runs.values() if stored.run.tenant == tenant]
