"""What is given up because it is old: runs after 30 days, their blobs after 7, idempotency keys after their 24 hours.

Called from the relay's process (`service.relay.housekeeping`). Workers may not see use cases, so it cannot live with
their reaper; the API has any number of processes; the relay is the one process of the installation that holds a lease
saying that it alone does a thing.

A blob is removed by a process that knows nothing of who is storing the same bytes at that instant: a worker stores a
step's output minutes before it records the run. Storing always writes a new file, so a file that is younger than any
run can last is left alone: at worst a tenant's rubbish stays, never is a new run's output taken away.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import structlog

from service.core.errors import BlastdoorError, NotFound
from service.core.ports.blobs import Blobs
from service.core.ports.runs import Expired, Retention

KEEP_RUNS = timedelta(days=30)
KEEP_BLOBS = timedelta(days=7)
KEEP_DELIVERIES = timedelta(days=7)
"""Of webhooks, counted from their end."""
FRESH = timedelta(hours=1)
"""Longer than the longest run with its teardown, and than any upload."""
_BATCH = 500

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Purged:
    """How much was given up; in a dry run, how much would be. `runs_without_blobs` keep their record. `blobs` were
    removed from the disk; a dry run cannot tell which would be, and says 0."""

    runs: int = 0
    runs_without_blobs: int = 0
    blobs: int = 0
    idempotency_keys: int = 0
    deliveries: int = 0
    events: int = 0
    """`purge` leaves those to who has the outbox."""


def purge(
    store: Retention,
    blobs: Blobs,
    *,
    older_than: timedelta = KEEP_RUNS,
    blobs_older_than: timedelta = KEEP_BLOBS,
    deliveries_older_than: timedelta = KEEP_DELIVERIES,
    dry_run: bool = False,
    clock: Callable[[], float] = time.time,
) -> Purged:
    """Delete finished runs older than `older_than`, and of the others the blobs of those older than `blobs_older_than`.
    May be interrupted at any point, and called again. `clock` is what files are dated by, in seconds since the epoch.
    """
    runs = without_blobs = removed = 0
    old: set[str] = set()
    for run in _all(store, older_than=older_than, with_blobs=False):
        runs += 1
        if dry_run:
            old.add(run.run_id)
            continue
        try:
            given_up = store.delete_run(run.run_id, run.tenant)
        except NotFound:
            continue  # its owner was faster
        removed += _remove(blobs, run.tenant, given_up, clock=clock)
    for run in _all(store, older_than=blobs_older_than, with_blobs=True):
        if run.run_id in old:
            continue
        without_blobs += 1
        if not dry_run:
            removed += _remove(blobs, run.tenant, store.give_up_blobs(run.run_id), clock=clock)
    deliveries = _deliveries(store, older_than=deliveries_older_than, dry_run=dry_run)
    keys = store.purge_idempotency(dry_run=dry_run)
    return Purged(
        runs=runs, runs_without_blobs=without_blobs, blobs=removed, idempotency_keys=keys, deliveries=deliveries
    )


def _deliveries(store: Retention, *, older_than: timedelta, dry_run: bool) -> int:
    """A batch at a time, so that no transaction holds up who delivers."""
    count = some = store.purge_deliveries(older_than=older_than, limit=_BATCH, dry_run=dry_run)
    while some == _BATCH and not dry_run:
        some = store.purge_deliveries(older_than=older_than, limit=_BATCH, dry_run=False)
        count += some
    return count


def _all(store: Retention, *, older_than: timedelta, with_blobs: bool) -> Iterator[Expired]:
    after: str | None = None
    while batch := store.expired(older_than=older_than, with_blobs=with_blobs, after=after, limit=_BATCH):
        yield from batch
        after = batch[-1].run_id


def _remove(blobs: Blobs, tenant: str, digests: tuple[str, ...], *, clock: Callable[[], float]) -> int:
    """-> how many are gone. What cannot be removed is left, and said."""
    removed = 0
    for digest in digests:
        try:
            if blobs.path(tenant, digest).stat().st_mtime > clock() - FRESH.total_seconds():
                continue
            blobs.delete(tenant, digest)
            removed += 1
        except (NotFound, FileNotFoundError):
            continue
        except (BlastdoorError, OSError) as error:
            log.warning("blob_left_behind", tenant=tenant, digest=digest, error=str(error))
    return removed
