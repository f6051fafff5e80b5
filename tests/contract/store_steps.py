"""What the store's tests do again and again. A lease in the past has run out at once: nothing here sleeps."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from service.core.ports.runs import Claim
from service.core.run import Outcome, Phase, Run
from service.core.tenancy import Tenant
from tests.contract.conftest import Store
from tests.factories import make_bundle, make_result, make_run, make_scenario, make_tenant

LEASE = timedelta(seconds=30)
RUN_OUT = timedelta(seconds=-1)
DAY = timedelta(days=1)


def add_tenant(store: Store, *, name: str = "acme", **more: Any) -> Tenant:
    return store.create_tenant(make_tenant(name=name, **more))


def add_run(
    store: Store, *, tenant: str = "acme", boundary: str = "gvisor", bundle: str | None = None, **more: Any
) -> Run:
    """Submitted and waiting; `bundle` is a digest."""
    scenario = more.pop("scenario", make_scenario())
    brought = None if bundle is None else make_bundle(digest=bundle)
    idempotency, max_queued = more.pop("idempotency", None), more.pop("max_queued", 100)
    traceparent = more.pop("traceparent", None)
    run = make_run(tenant=tenant, boundary=boundary, scenario=scenario, bundle=brought, **more)
    return store.submit(run, scenario, brought, max_queued=max_queued, idempotency=idempotency, traceparent=traceparent)


def claim(
    store: Store, *, boundaries: Sequence[str] = ("gvisor",), lease: timedelta = LEASE, **more: Any
) -> Claim | None:
    words = {"worker_id": "wrk_1", "site": "host-1", "runtimes": ["default"]} | more
    return store.claim(boundaries=boundaries, lease=lease, **words)


def claimed(store: Store, **more: Any) -> Claim:
    found = claim(store, **more)
    assert found is not None
    return found


def bring_to(store: Store, phase: Phase, **more: Any) -> Claim:
    """Claim the next run and move it on, until it is there."""
    held = claimed(store, **more)
    if phase is not Phase.PROVISIONING:
        store.mark_running(held.run.id, held.fence)
    if phase in (Phase.COLLECTING, Phase.FINISHED):
        store.mark_collecting(held.run.id, held.fence)
    if phase is Phase.FINISHED:
        store.finish(held.run.id, held.fence, make_result(outcome=Outcome.PASSED))
    return held


def finished_run(store: Store, **more: Any) -> Run:
    run = add_run(store, **more)
    held = bring_to(store, Phase.FINISHED)
    assert held.run.id == run.id
    store.record_destroyed(run.id, held.fence)
    return store.get_run(run.id, run.tenant)


def told(store: Store, run_id: str) -> list[Mapping[str, Any]]:
    """The run's events, in the order in which the relay would publish them."""
    assert store.lead("relay", lease=LEASE)
    store.stamp("relay", limit=10_000)
    return [row.event for row in store.retained(after=0, limit=10_000) if row.run_id == run_id]


def types_told(store: Store, run_id: str) -> list[str]:
    return [event["type"].removeprefix("dev.blastdoor.") for event in told(store, run_id)]
