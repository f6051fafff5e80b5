"""How long one pass of a site's reaper takes that finds nothing to do, on a cluster with 1000 namespaces of live runs:
`reaper_pass_1000_namespaces_s`, the median. With a tenth as many it should take a tenth of what grows.

The namespaces carry the labels of runs and have no pods: a reaper looks at labels. The database is SQLite, and has the
runs. A pass is what the reaper's process makes: reconcile, list the world, compare, write down what stands.

On the cluster that KUBECONFIG names, else on the lab (tests/cluster/lab).
"""

import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from service.adapters.memory import MemoryDoorbell, MemoryHints
from service.adapters.sql_store import SqlStore
from service.core.boundary import BoundaryKind, BoundaryRef, BoundarySpec
from service.core.controls import Limits, Network
from tests.bench.filled import opened
from tests.bench.live import Document, progress, scratch
from tests.cluster.engines import Ready, make_ready
from tests.cluster.lab.outside import running_lab
from tests.contract.store_steps import add_run, add_tenant, claimed
from workers.boundaries.namespace.driver import NamespaceBoundary, NamespaceHost
from workers.kube import Cluster
from workers.pods.render import render_namespace
from workers.reaper import SITE_SILENT, Reaper, watch_sites
from workers.reconcile import reconcile

NAMESPACES = int(os.environ.get("BENCH_NAMESPACES", "1000"))
PASSES = int(os.environ.get("BENCH_NAMESPACE_PASSES", "10"))
_SITE, _TENANT, _BOUNDARY = "cluster-1", "live", "namespace/gvisor"
_HOUR = timedelta(hours=1)
_AT_ONCE = 8
_SPEC = BoundarySpec(limits=Limits(), network=Network())


def measure(runsc: Path) -> Document:
    with scratch() as place, _cluster(place) as ready, opened(f"sqlite:///{place / 'blastdoor.db'}") as store:
        add_tenant(store, name=_TENANT, concurrent=NAMESPACES)
        host = NamespaceHost(
            installation=store.installation_id(), site=_SITE, kubeconfig=ready.engine_kubeconfig, image=""
        )
        boundary = NamespaceBoundary(host)
        reaper = Reaper([boundary], store, MemoryHints(), installation=host.installation, site=_SITE)
        try:
            few = _passes(ready.engine, store, reaper, NAMESPACES // 10)
            all_ = _passes(ready.engine, store, reaper, NAMESPACES)
        finally:
            for one in ready.admin.list("Namespace", labels={"blastdoor.dev/installation": host.installation}):
                ready.engine.delete("Namespace", one["metadata"]["name"])
    return {
        "reaper_pass_1000_namespaces_s": statistics.median(all_),
        "reaper_pass_namespaces": {
            "namespaces": NAMESPACES, "passes": PASSES, "max_s": max(all_),
            "tenth_p50_s": statistics.median(few),
        },
    }  # fmt: skip


@contextmanager
def _cluster(place: Path) -> Iterator[Ready]:
    if given := os.environ.get("KUBECONFIG"):
        yield make_ready(Path(given), place)
        return
    with running_lab(place / "lab", lambda line: print(line, file=sys.stderr)) as lab:
        yield make_ready(lab.kubeconfig, place)


def _passes(engine: Cluster, store: SqlStore, reaper: Reaper, count: int) -> list[float]:
    """-> seconds of each, with so many live runs in all."""
    known = len(store.inventory(_SITE))
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for number, _ in enumerate(pool.map(lambda ref: _build(engine, ref), _claims(store, count - known))):
            progress(f"namespace {known + number + 1}/{count}")
    took = []
    for number in range(PASSES + 1):
        progress(f"{count} namespaces: pass {number}/{PASSES}")
        started = time.perf_counter()
        reconcile(store, MemoryDoorbell(), MemoryHints(), max_queue=_HOUR, ring_after=timedelta(seconds=30))
        watch_sites(store, MemoryHints(), own=_SITE, silent_after=SITE_SILENT)
        swept = reaper.sweep()
        took.append(time.perf_counter() - started)
        if swept.destroyed or swept.recorded or len(store.inventory(_SITE)) != count:
            raise SystemExit(f"a pass was to find {count} live namespaces and nothing to do: {swept}")
    return took[1:]  # the first writes down what is new


def _claims(store: SqlStore, count: int) -> list[BoundaryRef]:
    """Of runs that workers play."""
    refs = []
    for _ in range(count):
        add_run(store, tenant=_TENANT, boundary=_BOUNDARY)
        claim = claimed(store, site=_SITE, lease=_HOUR, boundaries=(_BOUNDARY,))
        store.mark_running(claim.run.id, claim.fence)
        refs.append(
            BoundaryRef(
                installation=store.installation_id(), kind=BoundaryKind.NAMESPACE, variant="gvisor", site=_SITE,
                tenant=_TENANT, run_id=claim.run.id, fence=claim.fence, expires_at=claim.lease_until,
            )
        )  # fmt: skip
    return refs


def _build(engine: Cluster, ref: BoundaryRef) -> None:
    """Admission lets nobody else."""
    engine.apply(render_namespace(ref, _SPEC)[0])
