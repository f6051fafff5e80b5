"""How long one pass of a site's reaper takes that finds nothing to do, with 10,000 recorded runs and 500 live
boundaries, on each database; `reaper_pass_s` is the slower one's median. The boundaries are of the fake kind: what a
platform takes to list its own is not in it.

A pass is what the reaper's process does every ten seconds: reconcile, look at the other sites, list the world, write
down what stands. Then all leases are let go at once, and a last pass destroys 500.
"""

import os
import statistics
import time
from datetime import timedelta
from pathlib import Path

import sqlalchemy as sa
import structlog

from service.adapters.memory import MemoryDoorbell, MemoryHints
from service.adapters.sql.engine import db_now
from service.adapters.sql.schema import run
from service.adapters.sql_store import SqlStore
from service.core.boundary import BoundaryKind, BoundaryRef
from tests.bench.filled import databases, fill, opened
from tests.bench.live import Document, progress
from tests.contract.store_steps import add_run, add_tenant, claimed
from workers.boundaries.fake import FakeBoundary
from workers.reaper import SITE_SILENT, Reaper, Swept, watch_sites
from workers.reconcile import reconcile

RECORDED = int(os.environ.get("BENCH_REAP_RUNS", "10000"))
LIVE = int(os.environ.get("BENCH_REAP_LIVE", "500"))
PASSES = int(os.environ.get("BENCH_REAP_PASSES", "20"))
_SITE, _TENANT = "host-1", "live"
_HOUR = timedelta(hours=1)


def measure(runsc: Path) -> Document:
    with databases(1) as kinds:
        found = {kind.kind: _of_one(kind.kind, *kind.urls) for kind in kinds}
    slowest = max(found.values(), key=lambda one: one["p50_s"])
    return {
        "reaper_pass_s": slowest["p50_s"],
        "reaper_pass": {"recorded": RECORDED, "live": LIVE, "passes": PASSES} | found,
    }


def _of_one(kind: str, url: str) -> Document:
    with opened(url) as store:
        fill(store, ended=RECORDED - LIVE, queued=0)
        boundary = FakeBoundary(installation=store.installation_id(), site=_SITE)
        _build(store, boundary)
        reaper = Reaper([boundary], store, MemoryHints(), installation=store.installation_id(), site=_SITE)
        took = []
        for number in range(PASSES):
            progress(f"{kind}: pass {number + 1}/{PASSES}")
            seconds, swept = _pass(store, reaper)
            took.append(seconds)
            if swept.destroyed or swept.recorded or len(store.inventory(_SITE)) != LIVE:
                raise SystemExit(f"a pass was to find {LIVE} live boundaries and nothing to do: {swept}")
        progress(f"{kind}: destroying {LIVE}")
        _let_all_go(store)
        with structlog.testing.capture_logs():  # two lines for each
            destroying_s, swept = _pass(store, reaper)
        if len(swept.destroyed) != LIVE or swept.recorded != LIVE or boundary.world.labels:
            raise SystemExit(f"of {LIVE} abandoned boundaries a pass destroyed {len(swept.destroyed)}")
    return {"p50_s": statistics.median(took), "max_s": max(took), "destroying_all_s": destroying_s}


def _build(store: SqlStore, boundary: FakeBoundary) -> None:
    """As workers do: claimed, marked as running, and standing."""
    add_tenant(store, name=_TENANT, concurrent=LIVE)
    for number in range(LIVE):
        if number % 50 == 0:
            progress(f"building {number}/{LIVE}")
        add_run(store, tenant=_TENANT)
        claim = claimed(store, site=_SITE, lease=_HOUR)
        store.mark_running(claim.run.id, claim.fence)
        ref = BoundaryRef(
            installation=store.installation_id(), kind=BoundaryKind.GVISOR, site=_SITE, tenant=_TENANT,
            run_id=claim.run.id, fence=claim.fence, expires_at=claim.lease_until, created_at=claim.run.created_at,
        )  # fmt: skip
        boundary.world.labels[ref.name] = ref
        boundary.world.running.add(ref.name)


def _pass(store: SqlStore, reaper: Reaper) -> tuple[float, Swept]:
    """As `workers.app.housekeep` makes one."""
    started = time.perf_counter()
    reconcile(store, MemoryDoorbell(), MemoryHints(), max_queue=_HOUR, ring_after=timedelta(seconds=30))
    watch_sites(store, MemoryHints(), own=_SITE, silent_after=SITE_SILENT)
    swept = reaper.sweep()
    return time.perf_counter() - started, swept


def _let_all_go(store: SqlStore) -> None:
    """Every worker has died, and its lease run out."""
    gone = sa.update(run).where(run.c.tenant == _TENANT).values(lease_until=db_now() - timedelta(seconds=1))
    with store._db.write() as connection:
        connection.execute(gone)
