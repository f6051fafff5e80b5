"""Webhook endpoints, deliveries and their log, with the promises of the real ones."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from service.adapters.memory.state import MemoryState, StoredDelivery, StoredEndpoint
from service.core.errors import Conflict, NotFound, QuotaExceeded
from service.core.ids import new_id
from service.core.webhooks.models import (
    ANY_TYPE,
    Attempt,
    AttemptPage,
    Claimed,
    DeadLetter,
    DeadLetterPage,
    Due,
    Endpoint,
    Owner,
    SealedEndpoint,
    Settlement,
)
from service.core.webhooks.schedule import Fault, State

_PENDING_COUNTED = 1000


class MemoryWebhooks(MemoryState):
    def add_endpoint(self, endpoint: SealedEndpoint, *, most: int) -> Endpoint:
        with self._lock:
            owner = endpoint.owner
            tenant = self._tenants.get(owner.tenant or "")
            if (tenant is None or tenant.deleted) and owner.service_id not in self._services:
                raise NotFound
            if len(self.list_endpoints(owner)) >= most:
                raise QuotaExceeded(f"there are {most} webhooks already, which is the most; delete one")
            shown = Endpoint(id=endpoint.id, url=endpoint.url, types=endpoint.types, created_at=self.now())
            self._endpoints[endpoint.id] = StoredEndpoint(shown, owner, endpoint.secret)
            return shown

    def list_endpoints(self, owner: Owner) -> Sequence[Endpoint]:
        with self._lock:
            return [stored.shown for _, stored in sorted(self._endpoints.items()) if stored.owner == owner]

    def get_endpoint(self, endpoint_id: str, owner: Owner) -> Endpoint:
        with self._lock:
            return self._endpoint(endpoint_id, owner).shown

    def delete_endpoint(self, endpoint_id: str, owner: Owner) -> None:
        with self._lock:
            self._endpoint(endpoint_id, owner)
            self._forget_endpoint(endpoint_id)

    def rotate_secret(self, endpoint_id: str, owner: Owner, *, secret: str, old_signs: timedelta) -> Endpoint:
        with self._lock:
            stored = self._endpoint(endpoint_id, owner)
            stored.secret, stored.old_secret = secret, stored.secret
            stored.shown = stored.shown.model_copy(update={"old_secret_until": self.now() + old_signs})
            return stored.shown

    def list_attempts(self, endpoint_id: str, owner: Owner, *, limit: int, before: int | None) -> AttemptPage:
        with self._lock:
            self._endpoint(endpoint_id, owner)
            mine = [d for d in self._deliveries.values() if d.endpoint_id == endpoint_id]
            found = sorted((line for d in mine for line in d.log), key=lambda line: -line[0])
            found = [line for line in found if before is None or line[0] < before]
            pending = sum(d.state is State.PENDING for d in mine)
        return AttemptPage(
            items=tuple(attempt for _, attempt in found[:limit]),
            next_before=found[limit - 1][0] if len(found) > limit else None,
            pending=min(pending, _PENDING_COUNTED),
        )

    def replay_delivery(self, delivery_id: str, *, endpoint_id: str | None, owner: Owner | None) -> str:
        with self._lock:
            stored = self._deliveries.get(delivery_id)
            if stored is None:
                raise NotFound
            endpoint = self._endpoints[stored.endpoint_id]
            if owner is not None and (owner, endpoint_id) != (endpoint.owner, stored.endpoint_id):
                raise NotFound
            if not endpoint.shown.enabled:
                raise Conflict("this webhook is disabled; make a new one", code="webhook_disabled")
            stored.state, stored.tries, stored.next_at, stored.settled_at = State.PENDING, 0, self.now(), None
            stored.fence += 1
            return stored.endpoint_id

    def dead_letters(self, *, limit: int, before: str | None) -> DeadLetterPage:
        with self._lock:
            found = [
                DeadLetter(
                    id=id_, webhook_id=d.endpoint_id, url=self._endpoints[d.endpoint_id].shown.url, tenant=d.tenant,
                    event_id=d.event_id, type=d.type, attempts=d.attempt, at=d.settled_at or self.now(),
                    status=d.status, error=d.error,
                )
                for id_, d in sorted(self._deliveries.items(), reverse=True)
                if d.state is State.DEAD and (before is None or id_ < before)
            ]  # fmt: skip
        items = tuple(found[:limit])
        return DeadLetterPage(items=items, next_before=items[-1].id if len(found) > limit else None)

    def purge_deliveries(self, *, older_than: timedelta, limit: int, dry_run: bool) -> int:
        with self._lock:
            until = self.now() - older_than
            old = [id_ for id_, d in self._deliveries.items() if d.settled_at is not None and d.settled_at <= until]
            if dry_run:
                return len(old)
            for id_ in old[:limit]:
                del self._deliveries[id_]
            return len(old[:limit])

    def fan_out(self, *, limit: int) -> int:
        with self._lock:
            fresh = [e for e in self._events if not e.fanned and not e.tenant.startswith("_")][:limit]
            for event in fresh:
                event.fanned = True
                made_at = datetime.fromisoformat(event.event["time"])
                for endpoint_id, endpoint in sorted(self._endpoints.items()):
                    shown = endpoint.shown
                    known = {(d.endpoint_id, d.event_id) for d in self._deliveries.values()}
                    if (
                        shown.enabled
                        and self._is_of(endpoint.owner, event.tenant)
                        and shown.created_at <= made_at
                        and (ANY_TYPE in shown.types or event.type in shown.types)
                        and (endpoint_id, event.event["id"]) not in known
                    ):
                        id_ = new_id("dlv")
                        self._deliveries[id_] = StoredDelivery(
                            id_, endpoint_id, event.event["id"], event.tenant, event.type, self.now()
                        )
            return len(fresh)

    def due_endpoints(self, *, not_now: Sequence[str], limit: int) -> Sequence[Due]:
        with self._lock:
            since: dict[str, datetime] = {}
            for d in self._due_deliveries():
                since.setdefault(d.endpoint_id, d.next_at or self.now())
            found = [id_ for id_ in since if id_ not in not_now and self._endpoints[id_].shown.enabled]
            return [Due(endpoint_id=id_, owner=self._endpoints[id_].owner) for id_ in found[:limit]]

    def claim_deliveries(self, wanted: Mapping[str, int], *, lease: timedelta) -> Sequence[Claimed]:
        claimed = []
        with self._lock:
            bodies = {e.event["id"]: e.text for e in self._events}
            left = dict(wanted)
            for d in self._due_deliveries():
                if left.get(d.endpoint_id, 0) < 1:
                    continue
                left[d.endpoint_id] -= 1
                d.fence += 1
                d.next_at = self.now() + lease
                endpoint = self._endpoints[d.endpoint_id]
                until = endpoint.shown.old_secret_until
                old = endpoint.old_secret if until is not None and until > self.now() else None
                claimed.append(
                    Claimed(
                        delivery_id=d.id, endpoint_id=d.endpoint_id, fence=d.fence, tries=d.tries, at=self.now(),
                        url=endpoint.shown.url, secrets=tuple(filter(None, (endpoint.secret, old))),
                        event_id=d.event_id, body=bodies.get(d.event_id),
                    )
                )  # fmt: skip
        return claimed

    def settle_deliveries(self, settlements: Sequence[Settlement]) -> int:
        recorded = 0
        with self._lock:
            for settled in settlements:
                recorded += self._settle(settled)
            for settled in settlements:
                if settled.disable and settled.endpoint_id in self._endpoints:
                    self._disable(settled.endpoint_id)
        return recorded

    def give_back_deliveries(self, claimed: Sequence[Claimed]) -> None:
        with self._lock:
            for one in claimed:
                stored = self._deliveries.get(one.delivery_id)
                if stored is not None and stored.fence == one.fence and stored.state is State.PENDING:
                    stored.next_at = self.now()

    def delivery_counts(self) -> tuple[int, int]:
        with self._lock:
            states = [d.state for d in self._deliveries.values()]
        return states.count(State.PENDING), states.count(State.DEAD)

    def _settle(self, settled: Settlement) -> int:
        stored = self._deliveries.get(settled.delivery_id)
        if stored is None or stored.fence != settled.fence or stored.state is not State.PENDING:
            return 0
        now = self.now()
        stored.state, stored.status = settled.state, settled.status
        stored.error = None if settled.error is None else settled.error.value
        stored.attempt, stored.tries = stored.attempt + 1, stored.tries + 1
        stored.fence += 1
        stored.next_at = None if settled.wait is None else now + settled.wait
        stored.settled_at = None if settled.state is State.PENDING else now
        self._attempts_made += 1
        line = Attempt(
            id=stored.id, event_id=stored.event_id, attempt=stored.attempt, at=now, status=stored.status,
            error=stored.error, next_at=stored.next_at, duration_s=settled.duration.total_seconds(), type=stored.type,
        )  # fmt: skip
        stored.log.append((self._attempts_made, line))
        return 1

    def _disable(self, endpoint_id: str) -> None:
        endpoint = self._endpoints[endpoint_id]
        off = {"enabled": False, "disabled_reason": Fault.GONE.value}
        endpoint.shown = endpoint.shown.model_copy(update=off)
        for d in self._deliveries.values():
            if d.endpoint_id == endpoint_id and d.state is State.PENDING:
                d.state, d.error, d.next_at, d.settled_at = State.DEAD, Fault.DISABLED.value, None, self.now()

    def _due_deliveries(self) -> list[StoredDelivery]:
        now = self.now()
        pending = [d for d in self._deliveries.values() if d.state is State.PENDING and d.next_at is not None]
        return sorted((d for d in pending if d.next_at and d.next_at <= now), key=lambda d: (d.next_at or now, d.id))

    def _endpoint(self, endpoint_id: str, owner: Owner) -> StoredEndpoint:
        stored = self._endpoints.get(endpoint_id)
        if stored is None or stored.owner != owner:
            raise NotFound
        return stored

    def _is_of(self, owner: Owner, tenant: str) -> bool:
        if owner.tenant is not None:
            return owner.tenant == tenant
        return owner.service_id == self._tenants[tenant].tenant.service_id
