"""The worker's line on every store: whose turn it is, what a fence may write, and what becomes of an abandoned run."""

from collections.abc import Callable
from datetime import timedelta

import pytest

from service.core.controls import PLATFORM_CEILINGS
from service.core.errors import LeaseLost
from service.core.lease import cancelled
from service.core.placement import queues
from service.core.run import ACTIVE, MAX_ATTEMPTS, Outcome, Phase, Reason, Verdict
from service.core.tenancy import CeilingLimits, Ceilings, Quota
from tests.contract.conftest import Store
from tests.contract.store_steps import (
    DAY,
    LEASE,
    RUN_OUT,
    add_run,
    add_tenant,
    bring_to,
    claim,
    claimed,
    finished_run,
    told,
    types_told,
)
from tests.factories import make_bundle, make_capabilities, make_placement, make_result, make_run_id, make_scenario

LOST = Verdict(outcome=Outcome.ERRORED, reason=Reason.WORKER_LOST)
Write = Callable[[Store, str, int], object]
WRITES: dict[str, Write] = {
    "heartbeat": lambda store, run_id, fence: store.heartbeat(run_id, fence, lease=LEASE),
    "look": lambda store, run_id, fence: store.look(run_id, fence),
    "mark_running": lambda store, run_id, fence: store.mark_running(run_id, fence),
    "mark_collecting": lambda store, run_id, fence: store.mark_collecting(run_id, fence),
    "finish": lambda store, run_id, fence: store.finish(run_id, fence, make_result()),
    "requeue": lambda store, run_id, fence: store.requeue(run_id, fence, why="no room"),
}
LEGAL = {
    Phase.QUEUED: frozenset[str](),
    Phase.PROVISIONING: frozenset({"heartbeat", "look", "mark_running", "finish", "requeue"}),
    Phase.RUNNING: frozenset({"heartbeat", "look", "mark_collecting", "finish"}),
    Phase.COLLECTING: frozenset({"heartbeat", "look", "finish"}),
    Phase.FINISHED: frozenset[str](),
}


class TestClaiming:
    def test_nothing_waits_for_nobody(self, store: Store) -> None:
        assert claim(store) is None
        assert not store.waiting(["gvisor"])

    def test_a_claim_has_all_that_is_needed_to_play_the_run(self, store: Store) -> None:
        add_tenant(store)
        scenario = make_scenario(steps=[{"name": "a", "run": "x", "expect": {"stdout": {"json": None}}}])
        run = add_run(store, scenario=scenario, bundle="sha256:" + "a" * 64)
        before = store.now()
        held = claimed(store, lease=LEASE)

        assert (held.run.id, held.run.phase, held.run.attempt, held.fence) == (run.id, Phase.PROVISIONING, 1, 1)
        assert held.scenario == scenario
        assert held.scenario.digest == run.scenario.digest
        assert held.bundle == make_bundle(digest="sha256:" + "a" * 64)
        assert before + LEASE <= held.lease_until <= store.now() + LEASE
        assert held.run == store.get_run(run.id, "acme")
        assert types_told(store, run.id) == ["run.queued", "run.provisioning"]

    def test_a_claim_says_what_its_tenant_may_have_at_once_now(self, store: Store) -> None:
        tenant = add_tenant(store, concurrent=5)
        add_run(store)
        own = Ceilings(limits=CeilingLimits(memory=64 * 2**20))
        store.update_tenant(tenant.model_copy(update={"quota": Quota(concurrent=3), "ceilings": own}))

        share = claimed(store).share
        assert (share.runs, share.limits.memory) == (3, 64 * 2**20)
        assert share.limits.disk == PLATFORM_CEILINGS.disk, "what is not the tenant's own is the platform's"

    def test_a_run_on_a_node_group_is_claimed_where_the_group_is(self, store: Store) -> None:
        add_tenant(store)
        placement = make_placement(boundary="namespace/runc+affinity", node_group="blue")
        run = add_run(store, placement=placement)
        add_run(store, boundary="namespace/runc")

        others = queues([make_capabilities(boundary="namespace/runc", node_groups=frozenset({"red"}))])
        assert claimed(store, boundaries=others).run.placement.node_group is None
        assert claim(store, boundaries=others) is None
        assert not store.waiting(others)
        assert store.queues_waiting(older_than=timedelta()) == ["namespace/runc+affinity/blue"]
        theirs = queues([make_capabilities(boundary="namespace/runc", node_groups=frozenset({"blue", "red"}))])
        held = claimed(store, boundaries=theirs)
        assert (held.run.id, held.run.placement) == (run.id, placement)

    def test_only_what_the_worker_can_build_is_claimed(self, store: Store) -> None:
        add_tenant(store)
        add_run(store, boundary="namespace/gvisor")
        add_run(store, scenario=make_scenario(runtime="python"))

        assert claim(store, boundaries=("gvisor",), runtimes=["default"]) is None
        assert claim(store, boundaries=()) is None
        assert claim(store, runtimes=[]) is None
        assert not store.waiting(["microvm"])
        assert store.waiting(["microvm", "namespace/gvisor"])
        assert claimed(store, boundaries=("gvisor", "namespace/gvisor")).run.placement.boundary == "namespace/gvisor"
        assert claimed(store, runtimes=["default", "python"]).scenario.runtime == "python"

    def test_a_tenants_oldest_run_goes_first(self, store: Store) -> None:
        add_tenant(store, concurrent=3)
        waiting = [add_run(store).id for _ in range(3)]

        assert [claimed(store).run.id for _ in range(3)] == waiting

    def test_a_tenant_at_its_cap_waits_and_the_doorbell_is_told_so(self, store: Store) -> None:
        add_tenant(store, concurrent=1)
        add_run(store)
        add_run(store)
        held = claimed(store)

        assert claim(store) is None
        assert not store.waiting(["gvisor"])
        store.finish(held.run.id, held.fence, make_result())
        assert store.waiting(["gvisor"])
        assert claim(store) is not None

    def test_the_tenant_with_the_fewest_active_runs_goes_first(self, store: Store) -> None:
        for name in ("busy", "idle"):
            add_tenant(store, name=name, concurrent=5)
        for _ in range(3):
            add_run(store, tenant="busy")
        claimed(store)
        claimed(store)
        add_run(store, tenant="idle")

        assert claimed(store).run.tenant == "idle"

    def test_tenants_take_turns_however_long_ones_queue_is(self, store: Store) -> None:
        for name in ("aaa", "bbb", "ccc"):
            add_tenant(store, name=name, concurrent=1)
        for _ in range(4):
            add_run(store, tenant="aaa")
        for name in ("bbb", "ccc"):
            for _ in range(2):
                add_run(store, tenant=name)
        served = []
        for _ in range(6):
            held = claimed(store)
            served.append(held.run.tenant)
            store.finish(held.run.id, held.fence, make_result())
            store.record_destroyed(held.run.id, held.fence)

        assert sorted(served[:3]) == sorted(served[3:]) == ["aaa", "bbb", "ccc"]

    def test_a_changed_cap_holds_from_the_next_claim(self, store: Store) -> None:
        tenant = add_tenant(store, concurrent=1)
        for _ in range(2):
            add_run(store)
        claimed(store)
        store.update_tenant(tenant.model_copy(update={"quota": tenant.quota.model_copy(update={"concurrent": 2})}))

        assert claim(store) is not None


class TestFence:
    @pytest.mark.parametrize("phase", list(Phase))
    @pytest.mark.parametrize("name", list(WRITES))
    def test_each_write_is_accepted_in_its_phases_and_in_no_other(self, store: Store, name: str, phase: Phase) -> None:
        add_tenant(store)
        run = add_run(store)
        fence = 0 if phase is Phase.QUEUED else bring_to(store, phase).fence
        if name in LEGAL[phase]:
            WRITES[name](store, run.id, fence)
            return
        before = store.get_run(run.id, "acme"), told(store, run.id)
        with pytest.raises(LeaseLost):
            WRITES[name](store, run.id, fence)

        assert (store.get_run(run.id, "acme"), told(store, run.id)) == before

    @pytest.mark.parametrize("name", list(WRITES))
    def test_a_stale_fence_writes_nothing(self, store: Store, name: str) -> None:
        add_tenant(store)
        add_run(store)
        stale = claimed(store)
        store.requeue(stale.run.id, stale.fence, why="no room")
        store.record_destroyed(stale.run.id, stale.fence)
        current = claimed(store)
        assert current.fence == stale.fence + 1
        before = store.get_run(stale.run.id, "acme"), store.lease_of(stale.run.id), told(store, stale.run.id)
        for fence in (stale.fence, current.fence + 1, 0):
            with pytest.raises(LeaseLost):
                WRITES[name](store, stale.run.id, fence)

        assert before == (store.get_run(stale.run.id, "acme"), store.lease_of(stale.run.id), told(store, stale.run.id))

    @pytest.mark.parametrize("name", list(WRITES))
    def test_a_lease_that_ran_out_writes_nothing_and_is_not_renewed(self, store: Store, name: str) -> None:
        add_tenant(store)
        add_run(store)
        late = claimed(store, lease=RUN_OUT)
        before = store.lease_of(late.run.id), told(store, late.run.id)
        with pytest.raises(LeaseLost):
            WRITES[name](store, late.run.id, late.fence)

        assert (store.lease_of(late.run.id), told(store, late.run.id)) == before

    @pytest.mark.parametrize("name", list(WRITES))
    def test_a_run_that_never_was_is_nobodys(self, store: Store, name: str) -> None:
        with pytest.raises(LeaseLost):
            WRITES[name](store, make_run_id(), 1)

    def test_a_heartbeat_moves_the_end_of_the_lease(self, store: Store) -> None:
        add_tenant(store)
        add_run(store)
        held = claimed(store, lease=LEASE)
        store.heartbeat(held.run.id, held.fence, lease=LEASE * 2)
        view = store.lease_of(held.run.id)

        assert view is not None
        assert view.lease_until is not None
        assert view.lease_until > held.lease_until

    def test_the_phases_are_told_in_order_and_the_end_once(self, store: Store) -> None:
        add_tenant(store)
        run = add_run(store)
        held = bring_to(store, Phase.FINISHED)
        for _ in range(2):
            with pytest.raises(LeaseLost):
                store.finish(run.id, held.fence, make_result(outcome=Outcome.FAILED))
        events = told(store, run.id)

        assert [event["sequence"] for event in events] == [f"{n:010d}" for n in range(1, 6)]
        assert [event["data"]["phase"] for event in events] == [str(phase) for phase in Phase]
        assert events[-1]["data"]["outcome"] == "passed"
        assert len({event["id"] for event in events}) == 5


class TestRequeueing:
    def test_a_run_returns_to_the_queue_but_waits_until_its_boundary_is_known_to_be_gone(self, store: Store) -> None:
        add_tenant(store)
        run = add_run(store)
        held = claimed(store)

        assert store.requeue(run.id, held.fence, why="no room") is Phase.QUEUED
        assert store.get_run(run.id, "acme").queue_position == 1
        assert claim(store) is None
        assert not store.waiting(["gvisor"])
        assert store.record_destroyed(run.id, held.fence)
        again = claimed(store)
        assert (again.fence, again.run.attempt, again.run.boundary_destroyed_at) == (2, 2, None)
        assert types_told(store, run.id) == [
            "run.queued", "run.provisioning", "run.requeued", "boundary.destroyed", "run.provisioning",
        ]  # fmt: skip
        assert told(store, run.id)[2]["data"]["why"] == "no room"

    def test_a_boundary_known_to_be_gone_before_the_requeue_lets_it_be_claimed_at_once(self, store: Store) -> None:
        add_tenant(store)
        run = add_run(store)
        held = claimed(store)
        store.record_destroyed(run.id, held.fence)
        store.requeue(run.id, held.fence, why="no room")

        assert claimed(store).fence == 2

    def test_the_third_failed_attempt_ends_the_run(self, store: Store) -> None:
        add_tenant(store)
        run = add_run(store)
        stands = []
        for _ in range(MAX_ATTEMPTS):
            held = claimed(store)
            stands.append(store.requeue(run.id, held.fence, why="no \0 room"))
            store.record_destroyed(run.id, held.fence)
        done = store.get_run(run.id, "acme")

        assert stands == [Phase.QUEUED, Phase.QUEUED, Phase.FINISHED]
        assert (done.outcome, done.reason, done.attempt) == (Outcome.ERRORED, Reason.PROVISION_FAILED, 3)
        assert done.message is not None
        assert "no \0 room" in done.message
        assert types_told(store, run.id)[-2:] == ["run.finished", "boundary.destroyed"]

    def test_an_attempt_that_does_not_count_is_not_held_against_the_run(self, store: Store) -> None:
        add_tenant(store)
        run = add_run(store)
        for _ in range(MAX_ATTEMPTS + 2):
            held = claimed(store)
            assert held.run.attempt == 1
            assert store.requeue(run.id, held.fence, why="gone from this host", counts=False) is Phase.QUEUED
            store.record_destroyed(run.id, held.fence)

    def test_a_run_whose_end_was_asked_for_is_not_queued_again(self, store: Store) -> None:
        add_tenant(store)
        run = add_run(store)
        held = claimed(store)
        store.request_cancel(run.id, "acme", by="tenant")

        assert store.requeue(run.id, held.fence, why="no room") is Phase.FINISHED
        assert store.get_run(run.id, "acme").reason is Reason.CANCELLED_BY_TENANT


class TestDestroyed:
    @pytest.mark.parametrize("phase", [Phase.RUNNING, Phase.FINISHED])
    def test_it_is_recorded_and_told_once(self, store: Store, phase: Phase) -> None:
        add_tenant(store)
        run = add_run(store)
        fence = bring_to(store, phase).fence

        assert [store.record_destroyed(run.id, fence) for _ in range(3)] == [True, False, False]
        assert store.get_run(run.id, "acme").boundary_destroyed_at is not None
        assert types_told(store, run.id).count("boundary.destroyed") == 1
        assert told(store, run.id)[-1]["data"]["fence"] == fence

    def test_a_fence_that_was_never_given_and_a_run_that_never_was_are_not_recorded(self, store: Store) -> None:
        add_tenant(store)
        run = add_run(store)

        assert not store.record_destroyed(run.id, 1)
        assert not store.record_destroyed(run.id, 0)
        assert not store.record_destroyed(make_run_id(), 1)
        assert not store.record_destroyed("bd-\0", 1)

    def test_what_is_not_known_to_be_gone_is_listed_at_its_site_once_nobody_acts_on_it(self, store: Store) -> None:
        add_tenant(store, concurrent=10)
        acted_on, done, back, lost = (add_run(store).id for _ in range(4))
        held = {claim_.run.id: claim_ for claim_ in (claimed(store) for _ in range(3))}
        claimed(store, lease=RUN_OUT)
        add_run(store)
        store.finish(done, held[done].fence, make_result())
        store.requeue(back, held[back].fence, why="no room")

        assert acted_on in held
        assert [view.run_id for view in store.undestroyed("host-1")] == [done, back, lost]
        assert [view.run_id for view in store.undestroyed("host-1", limit=1)] == [done]
        assert store.undestroyed("host-2") == []
        store.record_destroyed(done, 1)
        assert [view.run_id for view in store.undestroyed("host-1")] == [back, lost]


class TestRecovery:
    def test_only_waiting_runs_and_leases_that_ran_out_are_listed_the_leases_first(self, store: Store) -> None:
        add_tenant(store, concurrent=5)
        finished_run(store)
        acted_on, late, waiting = (add_run(store).id for _ in range(3))
        claimed(store)
        claimed(store, lease=RUN_OUT)
        views = store.leases()

        assert [(view.run_id, view.phase) for view in views] == [(late, Phase.PROVISIONING), (waiting, Phase.QUEUED)]
        assert views[0] == store.lease_of(late)
        assert views[0].boundary == "gvisor"
        assert [view.run_id for view in store.leases(limit=1)] == [late]
        assert store.lease_of(acted_on) is not None
        assert store.lease_of(make_run_id()) is None
        assert store.lease_of("\0") is None

    @pytest.mark.parametrize("phase", sorted(ACTIVE))
    def test_an_abandoned_run_is_ended_once(self, store: Store, phase: Phase) -> None:
        add_tenant(store)
        run = add_run(store)
        held = bring_to(store, phase)
        acted_on = store.lease_of(run.id)
        assert acted_on is not None
        assert not store.recover_finish(acted_on, LOST)
        store.heartbeat(run.id, held.fence, lease=RUN_OUT)
        (view,) = store.leases()

        assert [store.recover_finish(view, LOST) for _ in range(2)] == [True, False]
        done = store.get_run(run.id, "acme")
        assert (done.phase, done.outcome, done.reason) == (Phase.FINISHED, Outcome.ERRORED, Reason.WORKER_LOST)
        with pytest.raises(LeaseLost):
            store.finish(run.id, held.fence, make_result())
        assert types_told(store, run.id).count("run.finished") == 1

    def test_a_run_nobody_claimed_is_ended(self, store: Store) -> None:
        add_tenant(store)
        run = add_run(store)
        (view,) = store.leases()

        assert store.recover_finish(view, LOST)
        assert store.get_run(run.id, "acme").phase is Phase.FINISHED

    def test_a_view_that_is_no_longer_true_changes_nothing(self, store: Store) -> None:
        add_tenant(store)
        add_run(store)
        (queued,) = store.leases()
        held = claimed(store)

        assert not store.recover_finish(queued, LOST)
        assert store.lease_of(held.run.id) is not None
        assert store.get_run(held.run.id, "acme").phase is Phase.PROVISIONING

    def test_a_run_lost_while_provisioning_returns_to_the_queue(self, store: Store) -> None:
        add_tenant(store)
        run = add_run(store)
        claimed(store, lease=RUN_OUT)
        (view,) = store.leases()

        assert [store.recover_requeue(view) for _ in range(2)] == [True, False]
        assert claim(store) is None
        store.record_destroyed(run.id, 1)
        assert claimed(store).run.attempt == 2

    @pytest.mark.parametrize("phase", [Phase.RUNNING, Phase.COLLECTING])
    def test_code_that_has_run_is_never_queued_again(self, store: Store, phase: Phase) -> None:
        add_tenant(store)
        add_run(store)
        held = bring_to(store, phase)
        store.heartbeat(held.run.id, held.fence, lease=RUN_OUT)
        (view,) = store.leases()

        assert not store.recover_requeue(view)

    def test_a_lost_run_whose_end_was_asked_for_is_not_queued_again(self, store: Store) -> None:
        add_tenant(store)
        run = add_run(store)
        claimed(store, lease=RUN_OUT)
        (view,) = store.leases()
        store.request_cancel(run.id, "acme", by="tenant")

        assert not store.recover_requeue(view)
        (view,) = store.leases()
        assert view.cancel_requested_by == "tenant"
        assert store.recover_finish(view, cancelled("tenant"))

    def test_queues_that_have_waited_are_named_for_their_doorbells(self, store: Store) -> None:
        add_tenant(store)
        for boundary in ("gvisor", "gvisor", "microvm"):
            add_run(store, boundary=boundary)

        assert list(store.queues_waiting(older_than=timedelta(0))) == ["gvisor", "microvm"]
        assert list(store.queues_waiting(older_than=DAY)) == []
