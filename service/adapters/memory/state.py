"""What the memory store holds, and how a run moves from phase to phase in it."""

import secrets
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from service.core.boundary import Bundle
from service.core.errors import LeaseLost, NotFound
from service.core.events import EventType, cloud_event, finished_data, phase_data
from service.core.ids import new_id
from service.core.lease import LeaseView
from service.core.ports import KeyRecord, Service, WorkerRecord
from service.core.run import ACTIVE, NEXT, Phase, Result, Run
from service.core.scenario import Scenario
from service.core.tenancy import Tenant


@dataclass
class StoredRun:
    run: Run
    scenario: Scenario
    bundle: Bundle | None
    queued_at: datetime
    fence: int = 0
    destroyed_fence: int = 0
    last_seq: int = 0
    lease_until: datetime | None = None
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
            phase=self.run.phase,
            boundary=self.run.placement.boundary,
            attempt=self.run.attempt,
            fence=self.fence,
            lease_until=self.lease_until,
            created_at=self.run.created_at,
            destroyed_fence=self.destroyed_fence,
            cancel_requested_by=self.cancel_requested_by,
        )


@dataclass
class StoredTenant:
    tenant: Tenant
    last_served: datetime | None = None
    deleted: bool = False


@dataclass
class StoredEvent:
    run_id: str
    tenant: str
    type: str
    event: Mapping[str, Any]
    pub_seq: int | None = None
    published: bool = False


@dataclass
class Taken:
    """An idempotency key."""

    token: str
    at: datetime
    content_digest: str | None = None
    answer: Mapping[str, Any] | None = None


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
        self._idempotency: dict[tuple[str, str], Taken] = {}
        self._events: list[StoredEvent] = []
        self._leader: tuple[str, datetime] | None = None
        self._last_stamp = 0
        self._bus_identity: str | None = None

    def installation_id(self) -> str:
        return self._installation

    def now(self) -> datetime:
        return self._clock()

    # for the other parts; the caller holds the lock

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
        self._move(stored, Phase.FINISHED, finished_at=self.now(), **dict(result.verdict), **result.shown())

    def _write(self, stored: StoredRun, type_: EventType, *, fence: int, more: Mapping[str, Any] | None = None) -> None:
        run = stored.run
        stored.last_seq += 1
        terminal = type_ is EventType.FINISHED
        event = cloud_event(
            event_id=new_id("evt"), installation=self._installation, type_=type_, run_id=run.id, tenant=run.tenant,
            sequence=stored.last_seq, at=self.now(),
            data=finished_data(run) if terminal else phase_data(run, fence=fence) | dict(more or {}),
        )  # fmt: skip
        self._events.append(StoredEvent(run_id=run.id, tenant=run.tenant, type=str(type_), event=event))
