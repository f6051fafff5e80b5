"""What a tenant can have now: every wall that the platform knows, and which of them a live worker can build."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from service.core.boundary import Capabilities, Guarantees
from service.core.controls import Controls, Limits, apply, ceilings
from service.core.placement import OFFERS, measured
from service.core.ports.tenants import TenantStore, WorkerStore
from service.core.tenancy import Quota


@dataclass(frozen=True, kw_only=True)
class BoundaryShown:
    boundary: str
    available: bool
    guarantees: Guarantees
    missing: Sequence[str]
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Shown:
    """`runtimes`: (name, digest), one row for each digest that a live worker offers under the name."""

    boundaries: Sequence[BoundaryShown]
    runtimes: Sequence[tuple[str, str]]
    defaults: Limits
    ceilings: Limits
    quota: Quota


def show_capabilities(tenants: TenantStore, workers: WorkerStore, *, tenant: str, worker_fresh: timedelta) -> Shown:
    who = tenants.get_tenant(tenant)
    live = list(live_capabilities(workers, worker_fresh=worker_fresh))
    runtimes = {runtime for row in live if row.available for runtime in row.runtimes.items()}
    return Shown(
        boundaries=[_boundary(boundary=o.boundary, promised=o.guarantees, live=live) for o in OFFERS],
        runtimes=sorted(runtimes),
        defaults=apply(Controls(), who).limits,
        ceilings=ceilings(who.ceilings),
        quota=who.quota,
    )


def live_capabilities(workers: WorkerStore, *, worker_fresh: timedelta) -> Iterable[Capabilities]:
    """What workers that were heard of within `worker_fresh` can enforce."""
    for worker in workers.live_workers(fresh=worker_fresh):
        yield from worker.capabilities


def _boundary(*, boundary: str, promised: Guarantees, live: Sequence[Capabilities]) -> BoundaryShown:
    rows = [row for row in live if row.boundary == boundary]
    able = [row for row in rows if row.available]
    reasons = [reason for row in rows for reason in row.missing] or [f"no live worker offers {boundary}"]
    versions: dict[str, set[str]] = {}
    for row in able or rows:
        for name, version in row.versions.items():
            versions.setdefault(name, set()).add(version)
    return BoundaryShown(
        boundary=boundary,
        available=bool(able),
        guarantees=measured(promised, rows),
        missing=[] if able else list(dict.fromkeys(reasons)),
        versions={name: ", ".join(sorted(found)) for name, found in sorted(versions.items())},
    )
