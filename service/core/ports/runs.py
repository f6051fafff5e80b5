"""What the logic asks of the store of runs: submitting, reading, the line that a worker plays, what is given up by age.

Every instant is the database's clock. A method that writes to a run takes the fence it acts under and raises LeaseLost
when the row has moved on: zero rows changed means nothing was written.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from service.core.boundary import Bundle, Share
from service.core.lease import LeaseView
from service.core.news import Mark, Newest, News, NewsPage
from service.core.run import Outcome, Phase, Result, Run, Verdict
from service.core.scenario import Scenario
from service.core.waiting import QueueView


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


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


class Claim(_Frozen):
    """A run that this worker may act on until its lease ends. The bundle's `path` is filled in from the blobs.
    `share`: of the run's tenant, as it is now."""

    run: Run
    share: Share
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
        earlier fence's boundary is not yet known to be gone. `boundaries`: as `placement.queues` has them."""
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
