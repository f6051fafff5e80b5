"""What readiness asks of the store, on every store."""

from service.core.canary import CANARY_TENANT
from service.core.ports.tenants import WorkerRecord
from service.core.run import Outcome, Phase, Reason
from tests.contract.conftest import Store
from tests.contract.store_steps import LEASE, RUN_OUT, add_run, add_tenant, bring_to, claimed, finished_run
from tests.factories import make_capabilities, make_result


def test_nothing_is_known_at_first(store: Store) -> None:
    view = store.canary_view(fresh=LEASE)

    assert (view.passed_at, view.ended_at, view.failed, view.waiting_since) == (None, None, None, None)
    assert (view.slots, view.active) == (0, 0)
    assert abs(view.now - store.now()) < LEASE


def test_how_the_newest_ended_and_when_one_passed_last(store: Store) -> None:
    add_tenant(store, name=CANARY_TENANT)
    passed = finished_run(store, tenant=CANARY_TENANT)
    lost = add_run(store, tenant=CANARY_TENANT)
    store.finish(lost.id, claimed(store).fence, make_result(outcome=Outcome.ERRORED, reason=Reason.BOUNDARY_LOST))
    view = store.canary_view(fresh=LEASE)

    assert view.passed_at == store.get_run(passed.id, None).finished_at
    assert view.ended_at == store.get_run(lost.id, None).finished_at
    assert (view.failed, view.waiting_since, view.phase) == ("errored / boundary_lost", None, None)


def test_what_is_under_way(store: Store) -> None:
    add_tenant(store, name=CANARY_TENANT)
    waits = add_run(store, tenant=CANARY_TENANT)
    queued = store.canary_view(fresh=LEASE)
    claimed(store)
    active = store.canary_view(fresh=LEASE)

    assert (queued.waiting_since, queued.phase, queued.active) == (waits.created_at, Phase.QUEUED, 0)
    assert (active.waiting_since, active.phase, active.active) == (waits.created_at, Phase.PROVISIONING, 1)


def test_every_run_that_is_acted_on_counts_and_every_live_worker(store: Store) -> None:
    add_tenant(store, concurrent=5)
    add_run(store)
    add_run(store)
    claimed(store)
    claimed(store, lease=RUN_OUT)  # nobody acts on it
    for n, slots in enumerate((2, 3)):
        rows = (make_capabilities(),)
        store.record_worker(WorkerRecord(id=f"wrk_{n}", host="h", site="h", capabilities=rows, slots=slots))

    assert (store.canary_view(fresh=LEASE).slots, store.canary_view(fresh=LEASE).active) == (5, 1)
    assert store.canary_view(fresh=RUN_OUT).slots == 0


def test_old_ones_have_ended_and_their_walls_are_gone(store: Store) -> None:
    add_tenant(store, name=CANARY_TENANT)
    runs = [finished_run(store, tenant=CANARY_TENANT) for _ in range(3)]
    add_run(store, tenant=CANARY_TENANT)
    bring_to(store, Phase.FINISHED)  # its wall still stands

    assert list(store.old_canaries(keep=1)) == [runs[1].id, runs[0].id]
