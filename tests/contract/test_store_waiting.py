"""What a queued run waits with, on every store: its tenant's cap, what it left, and the workers that live."""

from datetime import timedelta

from service.core.ports.tenants import WorkerRecord
from service.core.run import Phase, QueueReason
from service.core.waiting import QueueView, why_queued
from tests.contract.conftest import Store
from tests.contract.store_steps import DAY, add_run, add_tenant, bring_to, claimed
from tests.factories import make_capabilities, make_result, make_run_id, make_scenario


def show_worker(store: Store, worker_id: str = "wrk_1", *, slots: int = 1, boundary: str = "gvisor") -> None:
    capabilities = (make_capabilities(boundary=boundary),)
    store.record_worker(WorkerRecord(id=worker_id, host="h", site="h", capabilities=capabilities, slots=slots))


def view(store: Store, run_id: str, *, worker_fresh: timedelta = DAY) -> QueueView:
    return store.queue_views([run_id], worker_fresh=worker_fresh)[run_id]


def reason(store: Store, run_id: str, *, worker_fresh: timedelta = DAY) -> QueueReason | None:
    why = why_queued(view(store, run_id, worker_fresh=worker_fresh))
    return None if why is None else why[0]


class TestReasons:
    def test_a_run_whose_turn_it_is_has_nothing_in_its_way(self, store: Store) -> None:
        add_tenant(store)
        show_worker(store)

        assert reason(store, add_run(store).id) is None

    def test_no_live_worker_has_its_boundary(self, store: Store) -> None:
        add_tenant(store)
        run = add_run(store)
        assert reason(store, run.id) is QueueReason.NO_WORKER
        show_worker(store, "wrk_2", boundary="microvm")
        assert reason(store, run.id) is QueueReason.NO_WORKER
        show_worker(store)
        assert reason(store, run.id) is None
        assert reason(store, run.id, worker_fresh=timedelta(0)) is QueueReason.NO_WORKER, "it was silent for too long"

    def test_no_live_worker_has_its_runtime(self, store: Store) -> None:
        add_tenant(store)
        show_worker(store)

        assert reason(store, add_run(store, scenario=make_scenario(runtime="python")).id) is QueueReason.NO_WORKER

    def test_its_tenant_is_at_its_cap_until_one_of_its_runs_ends(self, store: Store) -> None:
        for name in ("acme", "other"):
            add_tenant(store, name=name, concurrent=2)
        show_worker(store, slots=9)
        for _ in range(2):
            add_run(store)
        others, waits = add_run(store, tenant="other"), add_run(store)
        held = [claimed(store) for _ in range(3)]
        assert others.id in {one.run.id for one in held}

        found = view(store, waits.id)
        assert (found.tenant, found.active, found.concurrent) == ("acme", 2, 2)
        assert reason(store, waits.id) is QueueReason.TENANT_AT_CAP
        first = next(one for one in held if one.run.tenant == "acme")
        store.finish(first.run.id, first.fence, make_result())
        assert reason(store, waits.id) is None

    def test_every_worker_is_busy_until_one_has_a_free_place(self, store: Store) -> None:
        add_tenant(store, concurrent=9)
        show_worker(store, "wrk_1", slots=2)
        show_worker(store, "wrk_2", slots=1)
        for _ in range(3):
            add_run(store)
        waits = add_run(store)
        for worker_id in ("wrk_1", "wrk_1"):
            bring_to(store, Phase.RUNNING, worker_id=worker_id)
        assert reason(store, waits.id) is None
        last = bring_to(store, Phase.COLLECTING, worker_id="wrk_2")

        assert sorted((one.playing, one.slots) for one in view(store, waits.id).workers) == [(1, 1), (2, 2)]
        assert reason(store, waits.id) is QueueReason.WORKERS_BUSY
        store.finish(last.run.id, last.fence, make_result())
        assert reason(store, waits.id) is None

    def test_all_that_could_play_it_drain(self, store: Store) -> None:
        add_tenant(store)
        show_worker(store, "wrk_1")
        show_worker(store, "wrk_2")
        show_worker(store, "wrk_3", boundary="microvm")
        run = add_run(store)
        store.drain_worker("wrk_1")
        assert reason(store, run.id) is None
        store.drain_worker("wrk_2")
        assert reason(store, run.id) is QueueReason.DRAINING

    def test_what_an_earlier_attempt_made_is_not_known_to_be_gone(self, store: Store) -> None:
        add_tenant(store)
        show_worker(store)
        run = add_run(store)
        held = claimed(store)
        store.requeue(run.id, held.fence, why="no room")

        assert view(store, run.id).attempt == 1
        assert reason(store, run.id) is QueueReason.CLEANING_UP
        store.record_destroyed(run.id, held.fence)
        assert reason(store, run.id) is None


def test_only_those_that_are_queued_are_in_the_answer(store: Store) -> None:
    add_tenant(store, concurrent=9)
    phases = [*(phase for phase in Phase if phase is not Phase.QUEUED)]
    for phase in phases:
        add_run(store)
        bring_to(store, phase)
    one, two = add_run(store), add_run(store)
    everybody = [run.id for run in store.list_runs("acme", phase=None, outcome=None, limit=99, before=None).items]
    assert len(everybody) == len(phases) + 2

    assert set(store.queue_views([*everybody, make_run_id(), "\0"], worker_fresh=DAY)) == {one.id, two.id}
    assert store.queue_views([], worker_fresh=DAY) == {}
