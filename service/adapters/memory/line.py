"""The worker's line."""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta

from service.adapters.memory.state import MemoryState, StoredRun
from service.core.boundary import Share
from service.core.controls import ceilings
from service.core.events import EventType
from service.core.lease import LeaseView, instead_of_another_attempt
from service.core.news import News
from service.core.ports.runs import Claim, Heartbeat
from service.core.run import ACTIVE, NEXT, Phase, Result, Verdict


class MemoryRunLine(MemoryState):
    def claim(
        self, *, worker_id: str, site: str, boundaries: Sequence[str], runtimes: Sequence[str], lease: timedelta
    ) -> Claim | None:
        with self._lock:
            stored = None if worker_id in self._draining else self._fairest(boundaries, runtimes)
            if stored is None:
                return None
            now = self.now()
            stored.fence += 1
            stored.site, stored.lease_owner, stored.lease_until = site, worker_id, now + lease
            owner = self._tenants[stored.run.tenant]
            owner.last_served = now
            self._move(stored, Phase.PROVISIONING, attempt=stored.run.attempt + 1, boundary_destroyed_at=None)
            return Claim(
                run=stored.run,
                share=Share(runs=owner.tenant.quota.concurrent, limits=ceilings(owner.tenant.ceilings)),
                fence=stored.fence,
                scenario=stored.scenario,
                bundle=stored.bundle,
                lease_until=now + lease,
                waited=now - stored.queued_at,
                traceparent=stored.traceparent,
            )

    def heartbeat(self, run_id: str, fence: int, *, lease: timedelta) -> Heartbeat:
        with self._lock:
            stored = self._held(run_id, fence)
            stored.lease_until = self.now() + lease
            return Heartbeat(cancel_requested_by=stored.cancel_requested_by)

    def look(self, run_id: str, fence: int) -> Heartbeat:
        with self._lock:
            return Heartbeat(cancel_requested_by=self._held(run_id, fence).cancel_requested_by)

    def append_news(self, run_id: str, fence: int, news: Sequence[News]) -> None:
        with self._lock:
            self._tell(self._held(run_id, fence), news)

    def mark_running(self, run_id: str, fence: int, *, news: Sequence[News] = ()) -> None:
        with self._lock:
            stored = self._held(run_id, fence, to=Phase.RUNNING)
            self._tell(stored, news)
            self._move(stored, Phase.RUNNING, started_at=self.now())

    def mark_collecting(self, run_id: str, fence: int, *, news: Sequence[News] = ()) -> None:
        with self._lock:
            stored = self._held(run_id, fence, to=Phase.COLLECTING)
            self._tell(stored, news)
            self._move(stored, Phase.COLLECTING)

    def finish(self, run_id: str, fence: int, result: Result, *, news: Sequence[News] = ()) -> None:
        with self._lock:
            stored = self._held(run_id, fence, to=Phase.FINISHED)
            self._tell(stored, news)
            self._end(stored, result)

    def requeue(self, run_id: str, fence: int, *, why: str, counts: bool = True, news: Sequence[News] = ()) -> Phase:
        with self._lock:
            stored = self._held(run_id, fence, to=Phase.QUEUED)
            self._tell(stored, news)
            verdict = instead_of_another_attempt(stored.view(), why=why, counts=counts)
            if verdict is not None:
                self._end(stored, Result(verdict=verdict))
            else:
                self._back_to_the_queue(stored, why=why, attempt=stored.run.attempt - (0 if counts else 1))
            return stored.run.phase

    def record_destroyed(self, run_id: str, fence: int) -> bool:
        with self._lock:
            stored = self._runs.get(run_id)
            if stored is None or not stored.destroyed_fence < fence <= stored.fence:
                return False
            stored.destroyed_fence = fence
            stored.run = stored.run.model_copy(update={"boundary_destroyed_at": self.now()})
            self._write(stored, EventType.DESTROYED, fence=fence)
            return True

    def waiting(self, boundaries: Sequence[str]) -> bool:
        with self._lock:
            return self._fairest(boundaries, None) is not None

    def leases(self, *, limit: int = 1000) -> Sequence[LeaseView]:
        with self._lock:
            overdue = [s for s in self._runs.values() if s.lease_until is not None and self._unheld(s)]
            overdue.sort(key=lambda s: s.lease_until or s.queued_at)
            queued = [s for _, s in sorted(self._runs.items()) if s.run.phase is Phase.QUEUED]
            return [stored.view() for stored in (*overdue, *queued)][:limit]

    def lease_of(self, run_id: str) -> LeaseView | None:
        with self._lock:
            stored = self._runs.get(run_id)
            return None if stored is None else stored.view()

    def undestroyed(self, site: str, *, limit: int = 1000) -> Sequence[LeaseView]:
        with self._lock:
            found = [
                stored.view()
                for _, stored in sorted(self._runs.items())
                if stored.site == site and stored.fence > stored.destroyed_fence and self._unheld(stored)
            ]
            return found[:limit]

    def recover_finish(self, view: LeaseView, verdict: Verdict) -> bool:
        with self._lock:
            stored = self._as_seen(view, to=Phase.FINISHED)
            if stored is not None:
                self._end(stored, Result(verdict=verdict))
            return stored is not None

    def recover_requeue(self, view: LeaseView) -> bool:
        with self._lock:
            stored = self._as_seen(view, to=Phase.QUEUED)
            if stored is None or stored.cancel_requested_by is not None:
                return False
            self._back_to_the_queue(stored, why="the worker was lost while provisioning", attempt=stored.run.attempt)
            return True

    def queues_waiting(self, *, older_than: timedelta) -> Sequence[str]:
        with self._lock:
            queued = [s for s in self._runs.values() if s.run.phase is Phase.QUEUED]
            return sorted({s.run.placement.queue for s in queued if s.queued_at <= self.now() - older_than})

    def _fairest(self, boundaries: Iterable[str], runtimes: Iterable[str] | None) -> StoredRun | None:
        candidates = [
            stored
            for stored in self._runs.values()
            if stored.claimable
            and stored.run.placement.queue in boundaries
            and (runtimes is None or stored.scenario.runtime in runtimes)
        ]

        def active(tenant: str) -> int:
            return sum(s.run.tenant == tenant and s.run.phase in ACTIVE for s in self._runs.values())

        def turn(tenant: str) -> tuple[int, bool, datetime | None, str]:
            served = self._tenants[tenant].last_served
            return active(tenant), served is not None, served, tenant

        below = {s.run.tenant for s in candidates}
        below = {name for name in below if active(name) < self._tenants[name].tenant.quota.concurrent}
        next_ = min(below, key=turn, default=None)
        return min((s for s in candidates if s.run.tenant == next_), key=lambda s: s.run.id, default=None)

    def _as_seen(self, view: LeaseView, *, to: Phase) -> StoredRun | None:
        """The run, when it still is what the view says and nobody acts on it."""
        stored = self._runs.get(view.run_id)
        if stored is None or (stored.fence, stored.run.phase) != (view.fence, view.phase):
            return None
        return stored if to in NEXT[view.phase] and self._unheld(stored) else None

    def _back_to_the_queue(self, stored: StoredRun, *, why: str, attempt: int) -> None:
        stored.lease_until, stored.queued_at = None, self.now()
        self._move(stored, Phase.QUEUED, more={"why": why[:1000]}, attempt=attempt)
