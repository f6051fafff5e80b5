"""Runs as their owners see them."""

from datetime import timedelta

from service.adapters.memory.keeping import IDEMPOTENCY_KEPT, MemoryKeeping
from service.adapters.memory.state import StoredRun, Taken
from service.core.boundary import Bundle
from service.core.errors import Conflict, IdempotencyInFlight, NotFound, QuotaExceeded
from service.core.events import EventType
from service.core.ids import new_id
from service.core.lease import cancelled
from service.core.ports.runs import IdempotencyClaim, Kept, Page
from service.core.run import Outcome, Phase, Result, Run
from service.core.scenario import Scenario


class MemoryRuns(MemoryKeeping):
    def begin_idempotent(self, tenant: str, key: str, *, stale_after: timedelta) -> IdempotencyClaim:
        with self._lock:
            held, now = self._idempotency.get((tenant, key)), self.now()
            if (
                held is None
                or held.at < now - IDEMPOTENCY_KEPT
                or (held.answer is None and held.at < now - stale_after)
            ):
                taken = self._idempotency[tenant, key] = Taken(token=new_id("idem"), at=now)
                return IdempotencyClaim(token=taken.token)
            if held.answer is None:
                raise IdempotencyInFlight("a request with this Idempotency-Key is still being answered")
            return IdempotencyClaim(token=held.token, content_digest=held.content_digest, answer=held.answer)

    def release_idempotent(self, tenant: str, key: str, token: str) -> None:
        with self._lock:
            held = self._idempotency.get((tenant, key))
            if held is not None and held.token == token and held.answer is None:
                del self._idempotency[tenant, key]

    def submit(
        self, run: Run, scenario: Scenario, bundle: Bundle | None, *, max_queued: int,
        idempotency: tuple[str, str, str] | None = None, max_stored: int | None = None, traceparent: str | None = None,
    ) -> Run:  # fmt: skip
        with self._lock:
            owner = self._tenants.get(run.tenant)
            if owner is None or owner.deleted:
                raise NotFound
            waiting = [s for s in self._runs.values() if s.run.phase is Phase.QUEUED]
            if sum(s.run.tenant == run.tenant for s in waiting) >= max_queued:
                raise QuotaExceeded(f"{max_queued} runs of tenant {run.tenant} are waiting already")
            if bundle is not None and max_stored is not None:
                self._insist_on_room(run.tenant, bundle, max_stored=max_stored)
            taken = self._idempotency.get((run.tenant, idempotency[0])) if idempotency else None
            if idempotency and (taken is None or taken.token != idempotency[1] or taken.answer is not None):
                raise IdempotencyInFlight("a request with this Idempotency-Key is still being answered")
            queued = run.model_copy(update={"phase": Phase.QUEUED, "attempt": 0, "created_at": self.now()})
            pathless = bundle and bundle.model_copy(update={"path": None})
            stored = StoredRun(
                run=queued, scenario=scenario, bundle=pathless, queued_at=self.now(), traceparent=traceparent
            )
            if bundle is not None:
                stored.blobs[bundle.digest] = bundle.bytes_
            self._runs[run.id] = stored
            self._write(stored, EventType.QUEUED, fence=0)
            shown = self._shown(stored)
            if taken is not None and idempotency is not None:
                taken.content_digest, taken.answer = idempotency[2], shown.model_dump(mode="json")
            return shown

    def get_run(self, run_id: str, tenant: str | None) -> Run:
        with self._lock:
            return self._shown(self._stored(run_id, tenant))

    def get_kept(self, run_id: str, tenant: str | None) -> Kept:
        with self._lock:
            stored = self._stored(run_id, tenant)
            return Kept(run=self._shown(stored), outputs=stored.outputs, purged=stored.blobs_purged)

    def list_runs(
        self, tenant: str | None, *, phase: Phase | None, outcome: Outcome | None, limit: int, before: str | None
    ) -> Page:
        with self._lock:
            found = [
                self._shown(stored)
                for run_id, stored in sorted(self._runs.items(), reverse=True)
                if not stored.run.tenant.startswith("_")
                and tenant in (None, stored.run.tenant)
                and phase in (None, stored.run.phase)
                and outcome in (None, stored.run.outcome)
                and (before is None or run_id < before)
            ]
        items = tuple(found[:limit])
        return Page(items=items, next_before=items[-1].id if items and len(found) > limit else None)

    def request_cancel(self, run_id: str, tenant: str | None, *, by: str) -> Run:
        with self._lock:
            stored = self._stored(run_id, tenant)
            if stored.run.phase is Phase.QUEUED:
                self._end(stored, Result(verdict=cancelled(by)))
            elif stored.run.phase is not Phase.FINISHED:
                stored.cancel_requested_by = stored.cancel_requested_by or by
            return self._shown(stored)

    def delete_run(self, run_id: str, tenant: str | None) -> tuple[str, ...]:
        with self._lock:
            stored = self._stored(run_id, tenant)
            if stored.run.phase is not Phase.FINISHED:
                raise Conflict("only a finished run can be deleted", code="not_finished")
            del self._runs[run_id]
            return self._unshared(stored)
