"""What the memory store holds, and how a run moves from phase to phase in it."""

import json
import secrets
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from service.core.boundary import Bundle
from service.core.cleanup import CleanupPlan, InventoryRow, SiteRecord
from service.core.custody import AuditEntry
from service.core.errors import LeaseLost, NotFound
from service.core.events import OF_PHASES, EventType, cloud_event, finished_data, phase_data
from service.core.ids import new_id
from service.core.lease import LeaseView
from service.core.news import News, NewsKind, StoredNews
from service.core.ports.tenants import KeyRecord, Service, WorkerRecord
from service.core.readers import Span
from service.core.run import ACTIVE, NEXT, Phase, Result, Run
from service.core.scenario import Scenario
from service.core.tenancy import Tenant
from service.core.webhooks.models import Attempt, Endpoint, Owner
from service.core.webhooks.schedule import State


@dataclass
class StoredRun:
    run: Run
    scenario: Scenario
    bundle: Bundle | None
    queued_at: datetime
    traceparent: str | None = None
    fence: int = 0
    destroyed_fence: int = 0
    quarantined_fence: int = 0
    last_seq: int = 0
    phase_seq: int = 0
    news: list[StoredNews] = field(default_factory=list)
    lease_until: datetime | None = None
    lease_owner: str | None = None
    site: str | None = None
    cancel_requested_by: str | None = None
    blobs: dict[str, int] = field(default_factory=dict)
    outputs: Mapping[str, str] = field(default_factory=dict)
    blobs_purged: bool = False

    @property
    def claimable(self) -> bool:
        return self.run.phase is Phase.QUEUED and self.fence == self.destroyed_fence

    def view(self) -> LeaseView:
        return LeaseView(
            run_id=self.run.id,
            tenant=self.run.tenant,
            phase=self.run.phase,
            boundary=self.run.placement.queue,
            attempt=self.run.attempt,
            fence=self.fence,
            lease_until=self.lease_until,
            created_at=self.run.created_at,
            destroyed_fence=self.destroyed_fence,
            quarantined_fence=self.quarantined_fence,
            cancel_requested_by=self.cancel_requested_by,
        )


@dataclass
class StoredTenant:
    tenant: Tenant
    last_served: datetime | None = None
    deleted: bool = False
    purged: bool = False


@dataclass
class StoredEvent:
    run_id: str
    tenant: str
    type: str
    event: Mapping[str, Any]
    at: datetime
    pub_seq: int | None = None
    published: bool = False
    fanned: bool = False

    @property
    def text(self) -> str:
        return json.dumps(self.event, separators=(",", ":"), ensure_ascii=False)


@dataclass
class Taken:
    """An idempotency key."""

    token: str
    at: datetime
    content_digest: str | None = None
    answer: Mapping[str, Any] | None = None


@dataclass
class StoredEndpoint:
    shown: Endpoint
    owner: Owner
    secret: str
    old_secret: str | None = None


@dataclass
class StoredDelivery:
    id: str
    endpoint_id: str
    event_id: str
    tenant: str
    type: str
    next_at: datetime | None
    state: State = State.PENDING
    attempt: int = 0
    tries: int = 0
    fence: int = 0
    status: int | None = None
    error: str | None = None
    settled_at: datetime | None = None
    log: list[tuple[int, Attempt]] = field(default_factory=list)


class MemoryState:
    def __init__(self, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._clock = clock
        self._lock = threading.RLock()
        self._installation = secrets.token_hex(6)
        self._runs: dict[str, StoredRun] = {}
        self._tenants: dict[str, StoredTenant] = {}
        self._services: dict[str, Service] = {}
        self._keys: dict[str, KeyRecord] = {}
        self._workers: dict[str, WorkerRecord] = {}
        self._draining: set[str] = set()
        self._sites: dict[str, SiteRecord] = {}
        self._asked: set[str] = set()
        self._inventory: dict[tuple[str, str], InventoryRow] = {}
        self._plans: dict[str, CleanupPlan] = {}
        self._acts: dict[str, AuditEntry] = {}
        self._idempotency: dict[tuple[str, str], Taken] = {}
        self._events: list[StoredEvent] = []
        self._endpoints: dict[str, StoredEndpoint] = {}
        self._deliveries: dict[str, StoredDelivery] = {}
        self._attempts_made = 0
        self._leader: tuple[str, datetime] | None = None
        self._last_stamp = 0
        self._bus_identity: str | None = None
        self._owed: dict[str, tuple[Span, ...]] = {}

    def installation_id(self) -> str:
        return self._installation

    def now(self) -> datetime:
        return self._clock()

    # for the other parts; the caller holds the lock

    def _forget_endpoint(self, endpoint_id: str) -> None:
        del self._endpoints[endpoint_id]
        self._deliveries = {id_: d for id_, d in self._deliveries.items() if d.endpoint_id != endpoint_id}

    def _stored(self, run_id: str, tenant: str | None) -> StoredRun:
        stored = self._runs.get(run_id)
        if stored is None or tenant not in (None, stored.run.tenant):
            raise NotFound
        return stored

    def _held(self, run_id: str, fence: int, *, to: Phase | None = None, among: Iterable[Phase] = ACTIVE) -> StoredRun:
        """The run, when its holder may still act on it, and may move it on to `to`. Raises LeaseLost."""
        stored = self._runs.get(run_id)
        if (
            stored is None
            or stored.fence != fence
            or stored.run.phase not in among
            or (to is not None and to not in NEXT[stored.run.phase])
            or stored.lease_until is None
            or stored.lease_until < self.now()
        ):
            raise LeaseLost(f"fence {fence} of {run_id} may no longer be acted under")
        return stored

    def _tell(self, stored: StoredRun, news: Iterable[News]) -> None:
        """What is there already is left as it is."""
        there = {told.mark for told in stored.news}
        more = (StoredNews(seq=stored.phase_seq, **dict(one)) for one in news)
        stored.news += [told for told in more if told.mark not in there]

    def _shown(self, stored: StoredRun) -> Run:
        if stored.run.phase is not Phase.QUEUED:
            return stored.run
        queue = [
            s.run.id
            for s in self._runs.values()
            if s.run.phase is Phase.QUEUED and s.run.placement.queue == stored.run.placement.queue
        ]
        position = sum(run_id <= stored.run.id for run_id in queue)
        return stored.run.model_copy(update={"queue_position": position})

    def _unheld(self, stored: StoredRun) -> bool:
        return stored.lease_until is None or stored.lease_until < self.now()

    def _move(self, stored: StoredRun, to: Phase, *, more: Mapping[str, Any] | None = None, **changes: Any) -> None:
        assert to in NEXT[stored.run.phase], (stored.run.phase, to)
        stored.run = stored.run.model_copy(update={"phase": to, "queue_position": None} | changes)
        type_ = EventType.REQUEUED if to is Phase.QUEUED else EventType(f"dev.blastdoor.run.{to}")
        self._write(stored, type_, fence=stored.fence, more=more)

    def _end(self, stored: StoredRun, result: Result) -> None:
        stored.lease_until = None
        stored.blobs |= result.blobs()
        stored.outputs = dict(result.outputs)
        live = sum(len(told.data) for told in stored.news if told.kind is NewsKind.OUTPUT)
        if live:
            stored.blobs[f"live:{stored.run.id}"] = live
        self._move(stored, Phase.FINISHED, finished_at=self.now(), **dict(result.verdict), **result.shown())

    def _write(self, stored: StoredRun, type_: EventType, *, fence: int, more: Mapping[str, Any] | None = None) -> None:
        run = stored.run
        stored.last_seq += 1
        if type_ in OF_PHASES:
            stored.phase_seq = stored.last_seq
        terminal = type_ is EventType.FINISHED
        event = cloud_event(
            event_id=new_id("evt"), installation=self._installation, type_=type_, run_id=run.id, tenant=run.tenant,
            sequence=stored.last_seq, at=self.now(), traceparent=stored.traceparent,
            data=finished_data(run) if terminal else phase_data(run, fence=fence) | dict(more or {}),
        )  # fmt: skip
        self._events.append(StoredEvent(run_id=run.id, tenant=run.tenant, type=str(type_), event=event, at=self.now()))
