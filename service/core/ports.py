"""What the logic asks of the world. Each port has one adapter for production and one shipped fake (adapters/memory.py).

Synchronous, all of it. Every instant is the database's clock. A method that writes to a run takes the fence it acts
under and raises LeaseLost when the row has moved on: zero rows changed means nothing was written.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from pydantic import BaseModel, ConfigDict

from service.core.boundary import Bundle, Capabilities
from service.core.canary import CanaryView
from service.core.lease import LeaseView
from service.core.news import Mark, Newest, News, NewsPage
from service.core.readers import Span, StreamState
from service.core.run import Outcome, Phase, Result, Run, Verdict
from service.core.scenario import Scenario
from service.core.tenancy import KeyKind, Principal, Tenant
from service.core.waiting import QueueView


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


# --- submitting and reading runs -------------------------------------------------------------------------------------


class IdempotencyClaim(_Frozen):
    """What `begin` found. `answer`: the first answer, when the key was used to the end; None: nobody had the key."""

    token: str
    """Names this attempt: only its holder may complete or release the key."""
    content_digest: str | None = None
    answer: Mapping[str, Any] | None = None


class Page(_Frozen):
    items: tuple[Run, ...]
    next_before: str | None
    """The id of the last item when there are more: the next page starts before it."""


class Kept(_Frozen):
    """A run, and where the bytes are that it does not carry. `purged`: its blobs were given up for their age."""

    run: Run
    outputs: Mapping[str, str]
    purged: bool


class RunStore(Protocol):
    """Runs as their owners see them. `tenant=None` is for operators; otherwise another tenant's run is NotFound."""

    def begin_idempotent(self, tenant: str, key: str, *, stale_after: timedelta) -> IdempotencyClaim:
        """Take the key before the upload is read. Raises IdempotencyInFlight while another holds it. A holder that was
        silent for `stale_after` is replaced; a key older than 24 h is free again."""
        ...

    def release_idempotent(self, tenant: str, key: str, token: str) -> None:
        """The request was refused: the key is free again."""
        ...

    def submit(
        self, run: Run, scenario: Scenario, bundle: Bundle | None, *, max_queued: int,
        idempotency: tuple[str, str, str] | None = None, max_stored: int | None = None, traceparent: str | None = None,
    ) -> Run:  # fmt: skip
        """Insert the run and its queued event in ONE transaction, with (key, token, content digest) completed by the
        run's JSON as the answer. Every event of the run carries `traceparent`, its JSON does not. Raises QuotaExceeded
        when the tenant has `max_queued` runs waiting, or when its blobs would come to more than `max_stored` bytes with
        a bundle that it does not have yet, atomically.
        -> the run with created_at and queue_position as stored."""
        ...

    def get_run(self, run_id: str, tenant: str | None) -> Run: ...

    def list_runs(
        self, tenant: str | None, *, phase: Phase | None, outcome: Outcome | None, limit: int, before: str | None
    ) -> Page:
        """Newest first. `before` is a run id; runs of internal tenants (names that start with `_`) are never listed."""
        ...

    def queue_views(self, run_ids: Sequence[str], *, worker_fresh: timedelta) -> Mapping[str, QueueView]:
        """What those of the runs that are queued wait with; the others are left out. A worker that was silent for
        `worker_fresh` does not count."""
        ...

    def request_cancel(self, run_id: str, tenant: str | None, *, by: str) -> Run:
        """`by`: tenant or operator. A queued run is finished at once; a claimed one is marked for its worker; a
        finished one is left as it is."""
        ...

    def delete_run(self, run_id: str, tenant: str | None) -> tuple[str, ...]:
        """-> the blob names that no other run of the tenant uses any more. Its events stay in the outbox. Raises
        Conflict(not_finished)."""
        ...

    def get_kept(self, run_id: str, tenant: str | None) -> "Kept":
        """As `get_run`, with what else is kept."""
        ...


class NewsStore(RunStore, Protocol):
    """Runs, and what is told of them while they go on (service/core/news.py)."""

    def read_news(self, run_id: str, tenant: str | None, *, after: Mark, limit: int) -> NewsPage:
        """What was told after that mark. Raises NotFound."""
        ...

    def newest(self, run_ids: Iterable[str]) -> Mapping[str, Newest]:
        """Of those of the runs that exist; one query, for the notifier."""
        ...


# --- the worker's side ----------------------------------------------------------------------------------------------


class Claim(_Frozen):
    """A run that this worker may act on until its lease ends. The bundle's `path` is filled in from the blobs."""

    run: Run
    fence: int
    scenario: Scenario
    bundle: Bundle | None
    lease_until: datetime
    waited: timedelta
    """In the queue, this time."""
    traceparent: str | None

    @property
    def trace_id(self) -> str | None:
        return self.traceparent.split("-")[1] if self.traceparent else None


class Heartbeat(_Frozen):
    """`cancel_requested_by`: tenant, operator or nobody."""

    cancel_requested_by: str | None


class RunLine(Protocol):
    """Claim, record, finish: the worker's writes, each guarded by fence, expected phase and a lease that has not run
    out (LeaseLost). A lease that has run out is never renewed, so that what the reaper concludes from it stays true."""

    def claim(
        self, *, worker_id: str, site: str, boundaries: Sequence[str], runtimes: Sequence[str], lease: timedelta
    ) -> Claim | None:
        """The fairest waiting run that this worker can build, in one statement: the tenant with the fewest active runs
        below its own cap, then the one served longest ago; its oldest run. Raises fence and attempt, records the lease
        and the BoundaryRef's site, and writes the provisioning event in the same transaction. Never claims a run whose
        earlier fence's boundary is not yet known to be gone."""
        ...

    def heartbeat(self, run_id: str, fence: int, *, lease: timedelta) -> Heartbeat: ...

    def look(self, run_id: str, fence: int) -> Heartbeat:
        """As `heartbeat`, without renewing the lease: one read."""
        ...

    def append_news(self, run_id: str, fence: int, news: Sequence[News]) -> None:
        """Tell this of the phase that the run is in, all or nothing; a `k` that is there already is left as it is."""
        ...

    # `news`: what is still to be told of the phase that ends, in the same transaction

    def mark_running(self, run_id: str, fence: int, *, news: Sequence[News] = ()) -> None: ...

    def mark_collecting(self, run_id: str, fence: int, *, news: Sequence[News] = ()) -> None: ...

    def finish(self, run_id: str, fence: int, result: Result, *, news: Sequence[News] = ()) -> None:
        """From provisioning, running or collecting. One terminal event, for ever."""
        ...

    def requeue(self, run_id: str, fence: int, *, why: str, counts: bool = True, news: Sequence[News] = ()) -> Phase:
        """Provisioning failed: back to queued, or after the third failed attempt to finished (errored /
        provision_failed), or when its end was asked for (cancelled). `counts=False`: the wall is gone from this host;
        the attempt is not held against the run.
        -> where it stands now."""
        ...

    def record_destroyed(self, run_id: str, fence: int) -> bool:
        """Nothing is left under this fence's label. Writes the boundary.destroyed event once; -> False when it was
        recorded before or the run is unknown."""
        ...

    def storage_left(self, tenant: str) -> int:
        """Bytes of blobs that the tenant may still add; 0 when its quota is used up."""
        ...

    def waiting(self, boundaries: Sequence[str]) -> bool:
        """True when some run waits that a worker for these boundaries could claim now."""
        ...

    # what the reconciler and the reaper ask

    def leases(self, *, limit: int = 1000) -> Sequence[LeaseView]:
        """Unfinished runs whose lease has run out, then those that wait in the queue, each oldest first."""
        ...

    def lease_of(self, run_id: str) -> LeaseView | None: ...

    def undestroyed(self, site: str, *, limit: int = 1000) -> Sequence[LeaseView]:
        """Runs last claimed at this site whose boundary is not yet known to be gone (fence > destroyed_fence) and that
        nobody acts on now: queued, finished, or with an expired lease. Oldest first."""
        ...

    def recover_finish(self, view: LeaseView, verdict: Verdict) -> bool:
        """End a run nobody acts on; guarded by the view's fence and phase. -> False when it moved on meanwhile."""
        ...

    def recover_requeue(self, view: LeaseView) -> bool: ...

    def queues_waiting(self, *, older_than: timedelta) -> Sequence[str]:
        """Boundaries that have a run queued for longer than this: their doorbells are rung again."""
        ...

    def now(self) -> datetime:
        """The database's clock, aware UTC."""
        ...


# --- retention -------------------------------------------------------------------------------------------------------


class Expired(_Frozen):
    """A finished run that has reached an age."""

    run_id: str
    tenant: str


class Retention(Protocol):
    """What is given up because it is old. Ages are counted from the run's end."""

    def expired(
        self, *, older_than: timedelta, with_blobs: bool = False, after: str | None = None, limit: int = 500
    ) -> Sequence[Expired]:
        """Finished runs of that age, by id; `after` is the last id seen. `with_blobs`: only those whose blobs were not
        given up yet."""
        ...

    def delete_run(self, run_id: str, tenant: str | None) -> tuple[str, ...]:
        """As in RunStore."""
        ...

    def give_up_blobs(self, run_id: str) -> tuple[str, ...]:
        """Note that the finished run's blobs are purged, and with them what was told of it. -> those that no other
        run of its tenant uses. A run that is not there, or not finished, has none."""
        ...

    def purge_deliveries(self, *, older_than: timedelta, limit: int, dry_run: bool) -> int:
        """Forget up to `limit` webhook deliveries that ended so long ago, with their log. -> how many; in a dry run,
        how many there are."""
        ...

    def purge_idempotency(self, *, dry_run: bool) -> int:
        """Forget the keys that are free again by their age (24 h). -> how many."""
        ...


# --- tenants, keys, workers -----------------------------------------------------------------------------------------


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


# --- the outbox and what carries it out ------------------------------------------------------------------------------


class OutboxRow(_Frozen):
    """`pub_seq` is the relay's own gap-free stamp, given after commit; it is the stream's entry id."""

    event_id: str
    run_id: str
    tenant: str
    type: str
    pub_seq: int
    event: Mapping[str, Any]


class Outbox(Protocol):
    def lead(self, owner: str, *, lease: timedelta) -> bool:
        """Take or renew the one relay lease; -> False while another holds it."""
        ...

    def stamp(self, owner: str, *, limit: int) -> Sequence[OutboxRow]:
        """Give the next numbers to committed rows that have none, oldest first, while `owner` leads; else nothing.
        Events of internal tenants (names that start with `_`) are kept, and never get a number."""
        ...

    def unpublished(self, *, limit: int) -> Sequence[OutboxRow]:
        """Stamped rows not yet known to be on the bus, by pub_seq."""
        ...

    def mark_published(self, pub_seqs: Sequence[int]) -> None: ...

    def retained(self, *, after: int, limit: int) -> Sequence[OutboxRow]:
        """Stamped rows with pub_seq above `after`, in order: for republishing."""
        ...

    def mark_unpublished_after(self, pub_seq: int) -> int:
        """The bus lost its tail: everything stamped above is to be published again. -> how many rows."""
        ...

    def last_stamp(self) -> int: ...

    def bus_identity(self) -> str | None: ...

    def record_bus_identity(self, identity: str) -> None:
        """Redis' run_id, as the relay last saw it: a new one means that the stream may have been lost."""
        ...

    def owed(self) -> Mapping[str, Sequence[Span]]:
        """By consumer group: numbers that were trimmed off the bus before the group had acknowledged them."""
        ...

    def record_owed(self, owner: str, owed: Mapping[str, Sequence[Span]]) -> bool:
        """Replaces all of it, while `owner` leads. -> whether it was written."""
        ...

    def stamp_again(self, owner: str, *, first: int, last: int, limit: int) -> int:
        """Give the next numbers to rows that have one of `first`..`last`, in order, and count them as not published,
        while `owner` leads; else nothing. -> how many rows."""
        ...


class Standing(_Frozen):
    """How things stand, in numbers and the database's clock. `waited`: of the run that is in the queue for longest;
    `lag`: how long the oldest event waits to be on the bus."""

    runs: Mapping[Phase, int]
    waited: timedelta
    unpublished: int
    lag: timedelta


class Standings(Protocol):
    def standing(self) -> Standing:
        """Of every tenant together, internal ones too (their events are never published, and never lag). Unfinished
        phases only, each of them. Cheap: it reads what is not yet done, never what is."""
        ...


class Bus(Protocol):
    """The stream that the main application reads. Internal tenants' events are stamped and skipped."""

    def publish(self, rows: Sequence[OutboxRow]) -> None:
        """XADD with explicit ids, in order; an id that is there already with the same event is success."""
        ...

    def last_published(self) -> int | None:
        """The stream's last pub_seq; 0 for an empty one, None when there is no stream."""
        ...

    def create_stream(self) -> None: ...

    def identity(self) -> str: ...

    def max_length(self) -> int:
        """Entries that are kept in any case; up to twice as many while a reader is behind."""
        ...

    def stream(self) -> StreamState | None:
        """How long it is, and how far its readers are; None when there is none."""
        ...

    def pending(self, group: str, *, first: int, below: int) -> Sequence[int]:
        """Of the numbers in between, those that the group was given and has not acknowledged; none of one that is
        gone."""
        ...

    def trim(self, below: int) -> None:
        """Remove every entry with a lower number."""
        ...


class Hints(Protocol):
    """Wakes whoever waits, sooner than polling would. Lossy: nothing may depend on it."""

    def hint(self, topic: str, run_id: str) -> None:
        """`topic`: run (it has ended, or gone back to the queue), outbox (there is something to relay) or news (more is
        told of it)."""
        ...

    def listen(self, topics: Sequence[str], *, poll_s: float) -> Iterator[tuple[str, str] | None]:
        """Yields (topic, run_id), and None each time `poll_s` seconds pass without one, also while Redis is away."""
        ...


class Doorbell(Protocol):
    def ring(self, boundary: str) -> None:
        """Tell the workers of this boundary's queue that something waits. Carries no run. Raises Unavailable."""
        ...


class Blobs(Protocol):
    """Bytes by content digest, apart for each tenant. Writes are complete or absent."""

    def put_file(self, tenant: str, path: Path, digest: str) -> None:
        """Take a finished temporary file (same file system) as `sha256:...`; moved, or dropped when it is known."""
        ...

    def put_bytes(self, tenant: str, data: bytes) -> str: ...
    def put_stream(self, tenant: str, source: BinaryIO, *, max_bytes: int) -> tuple[str, int]: ...
    def path(self, tenant: str, digest: str) -> Path: ...  # NotFound
    def delete(self, tenant: str, digest: str) -> None: ...
    def older_than(self, tenant: str, age: timedelta) -> Sequence[str]:
        """Digests of those that were stored so long ago, by the clock that dates files."""
        ...

    def discard(self, tenant: str, digest: str, *, age: timedelta) -> bool:
        """Delete one that was stored so long ago. One that somebody stores again at this instant stays. -> whether it
        was deleted."""
        ...

    def clear(self, tenant: str) -> None:
        """Delete all that the tenant has."""
        ...

    def staging(self) -> AbstractContextManager[Path]:
        """A private directory on the same file system, gone with its contents when the context ends."""
        ...
