"""What stands on the sites, orders of clean-up, the audit log and drains, on every store."""

import threading
from datetime import timedelta

import pytest

from service.core.boundary import BoundaryKind, BoundaryRef
from service.core.cleanup import ActionKind, BoundaryState, Observed, PlannedAction, StandbyState
from service.core.errors import Conflict, NotFound
from service.core.ids import new_run_id
from service.core.ports.tenants import WorkerRecord
from service.core.run import Phase
from tests.contract.conftest import Store
from tests.contract.store_steps import (
    add_run,
    add_tenant,
    bring_to,
    claim,
    claimed,
    told,
    types_told,
)
from tests.factories import make_capabilities

GVISOR = [BoundaryKind.GVISOR]
AT_ONCE, LONG = timedelta(0), timedelta(hours=1)


def a_ref(
    store: Store, *, run_id: str | None = None, fence: int = 1, site: str = "host-1", **more: object
) -> BoundaryRef:
    words = {
        "installation": store.installation_id(), "kind": BoundaryKind.GVISOR, "site": site, "tenant": "acme",
        "run_id": run_id or new_run_id(), "fence": fence, "expires_at": store.now() + timedelta(minutes=1),
    }  # fmt: skip
    return BoundaryRef.model_validate(words | more)


def seen(ref: BoundaryRef, state: BoundaryState = BoundaryState.LIVE) -> Observed:
    return Observed(ref=ref, state=state)


def names(store: Store, site: str | None = None) -> list[str]:
    return [row.ref.name for row in store.inventory(site)]


class TestInventory:
    def test_what_a_site_found_comes_back_as_it_was_found(self, store: Store) -> None:
        ref = a_ref(store, created_at=store.now() - timedelta(seconds=5))
        store.record_inventory("host-1", GVISOR, [seen(ref, BoundaryState.ORPHAN)])
        (row,) = store.inventory()

        assert row.ref == ref
        assert (row.created_at, row.state, row.resisting_since) == (ref.created_at, BoundaryState.ORPHAN, None)
        assert abs(row.observed_at - store.now()) < timedelta(minutes=1)
        assert [site.name for site in store.sites()] == ["host-1"]

    def test_a_later_look_replaces_what_the_same_site_found_of_the_same_kinds(self, store: Store) -> None:
        first, second, other = a_ref(store), a_ref(store), a_ref(store, site="host-2")
        microvm = a_ref(store, kind=BoundaryKind.MICROVM)
        store.record_inventory("host-1", [*GVISOR, BoundaryKind.MICROVM], [seen(first), seen(microvm)])
        store.record_inventory("host-2", GVISOR, [seen(other)])
        store.record_inventory("host-1", GVISOR, [seen(second)])

        assert names(store, "host-1") == sorted([second.name, microvm.name]), "a kind that was not listed is kept"
        assert names(store, "host-2") == [other.name]

    def test_when_it_was_first_seen_and_since_when_it_resists_is_kept(self, store: Store) -> None:
        ref = a_ref(store)
        store.record_inventory("host-1", GVISOR, [seen(ref)])
        since = store.note_resistance("host-1", ref.name)
        (before,) = store.inventory()
        store.record_inventory("host-1", GVISOR, [seen(ref, BoundaryState.OVERDUE)])
        (row,) = store.inventory()

        assert (row.created_at, row.resisting_since, row.state) == (before.created_at, since, BoundaryState.OVERDUE)
        assert store.note_resistance("host-1", ref.name) == since

    def test_what_was_made_before_anybody_asked_is_known_as_such(self, store: Store) -> None:
        ref, own = a_ref(store), a_ref(store)
        for standby in (StandbyState.BEING_MADE, StandbyState.READY, StandbyState.CLAIMED, None):
            kept = Observed(ref=ref, state=BoundaryState.LIVE, standby=standby)
            store.record_inventory("host-1", GVISOR, [kept, seen(own)])

            assert {row.ref.name: row.standby for row in store.inventory()} == {ref.name: standby, own.name: None}

    def test_it_is_quarantined_once_and_gone_when_it_is_dropped(self, store: Store) -> None:
        ref, other = a_ref(store), a_ref(store)
        store.record_inventory("host-1", GVISOR, [seen(ref), seen(other)])

        assert [store.mark_quarantined("host-1", ref.name) for _ in range(2)] == [True, False]
        store.drop_from_inventory("host-1", [ref.name])
        assert names(store) == [other.name]
        assert not store.mark_quarantined("host-1", ref.name)
        assert store.note_resistance("host-1", ref.name) <= store.now(), "another reaper has dropped it: from now on"

    def test_many_are_written_at_once(self, store: Store) -> None:
        refs = [a_ref(store) for _ in range(450)]
        for found in (refs, refs[200:], refs):
            store.record_inventory("host-1", GVISOR, [seen(ref) for ref in found])

            assert names(store) == sorted(ref.name for ref in found)

    def test_a_site_that_is_asked_to_look_has_answered_once_it_looked(self, store: Store) -> None:
        assert not store.is_asked_to_look("host-1")
        store.record_inventory("host-1", GVISOR, [])
        assert not store.is_asked_to_look("host-1")
        asked_at = store.ask_to_look()

        assert store.is_asked_to_look("host-1")
        store.record_inventory("host-1", GVISOR, [])
        assert not store.is_asked_to_look("host-1")
        assert store.sites()[0].last_seen_at >= asked_at


class TestForgetting:
    def test_what_a_forgotten_site_had_counts_as_gone_and_no_event_says_so(self, store: Store) -> None:
        add_tenant(store, concurrent=9)
        queued, done, lives = (add_run(store) for _ in range(3))
        held = claimed(store)
        store.requeue(held.run.id, held.fence, why="it did not start")
        bring_to(store, Phase.FINISHED)
        acting = bring_to(store, Phase.RUNNING)
        assert (held.run.id, acting.run.id) == (queued.id, lives.id)
        store.record_inventory("host-1", GVISOR, [seen(a_ref(store, run_id=done.id))])
        assert claim(store) is None

        assert store.forget_site("host-1", unless_seen_within=AT_ONCE) == 2

        assert store.sites() == store.inventory() == []
        assert store.undestroyed("host-1") == []
        assert "boundary.destroyed" not in types_told(store, done.id)
        assert store.get_run(done.id, None).boundary_destroyed_at is None
        again = claimed(store)
        assert (again.run.id, again.fence) == (queued.id, 2)
        assert store.lease_of(lives.id).destroyed_fence == 0, "who acts on it may go on"  # type: ignore[union-attr]

    def test_a_site_that_answers_is_not_forgotten(self, store: Store) -> None:
        store.record_inventory("host-1", GVISOR, [seen(a_ref(store))])
        with pytest.raises(Conflict) as refusal:
            store.forget_site("host-1", unless_seen_within=LONG)

        assert refusal.value.code == "site_alive"
        assert len(store.inventory()) == len(store.sites()) == 1

    @pytest.mark.parametrize("name", ["never", "\0"])
    def test_one_that_was_never_there_or_is_forgotten_is_not_found(self, store: Store, name: str) -> None:
        store.record_inventory("gone", GVISOR, [])
        store.forget_site("gone", unless_seen_within=AT_ONCE)
        for unknown in ("gone", name):
            with pytest.raises(NotFound):
                store.forget_site(unknown, unless_seen_within=AT_ONCE)

    def test_one_that_answers_again_is_known_again(self, store: Store) -> None:
        store.record_inventory("host-1", GVISOR, [])
        store.forget_site("host-1", unless_seen_within=AT_ONCE)
        store.record_inventory("host-1", GVISOR, [])

        assert [site.name for site in store.sites()] == ["host-1"]


class TestQuarantine:
    def test_it_is_told_once_for_each_fence_and_then_that_it_is_gone(self, store: Store) -> None:
        add_tenant(store)
        run = add_run(store)
        held = bring_to(store, Phase.FINISHED)

        before = store.lease_of(run.id)
        assert [store.record_quarantined(run.id, held.fence) for _ in range(2)] == [True, False]
        after = store.lease_of(run.id)
        assert before is not None
        assert after is not None
        assert (before.quarantined_fence, after.quarantined_fence) == (0, held.fence)
        assert store.record_destroyed(run.id, held.fence)
        assert not store.record_quarantined(run.id, held.fence), "it is gone"
        assert types_told(store, run.id)[-2:] == ["boundary.quarantined", "boundary.destroyed"]
        events = told(store, run.id)
        assert events[-2]["data"]["fence"] == held.fence
        assert [event["sequence"] for event in events] == sorted({event["sequence"] for event in events})

    @pytest.mark.parametrize("run_id", [new_run_id(), "\0"], ids=["unknown", "nonsense"])
    def test_of_a_run_that_is_not_there_nothing_is_told(self, store: Store, run_id: str) -> None:
        assert not store.record_quarantined(run_id, 1)

    def test_a_fence_that_was_never_taken_is_not(self, store: Store) -> None:
        add_tenant(store)
        add_run(store)
        held = claimed(store)

        assert not store.record_quarantined(held.run.id, held.fence + 1)

    def test_leases_are_read_many_at_once(self, store: Store) -> None:
        add_tenant(store)
        run = add_run(store)
        views = store.leases_of([run.id, new_run_id(), "\0"])

        assert views == {run.id: store.lease_of(run.id)}


class TestOrders:
    def plan(self, store: Store, *actions: ActionKind, force: bool = False, site: str = "host-1") -> str:
        lines = [PlannedAction(ref=a_ref(store, site=site), action=action, why="because") for action in actions]
        return store.store_plan(lines, asked_by="key_1", force=force).id

    def test_a_plan_comes_back_line_by_line_and_orders_nothing_until_it_is_applied(self, store: Store) -> None:
        lines = [PlannedAction(ref=a_ref(store), action=action, why=f"for {action}") for action in ActionKind]
        made = store.store_plan(lines, asked_by="key_1", force=True)

        assert store.get_plan(made.id) == made
        assert made.actions == tuple(lines)
        assert (made.asked_by, made.force, made.applied_at, made.done_at) == ("key_1", True, None, None)
        assert store.orders("host-1") == []
        assert not store.conclude_order(made.id, 1, "destroyed")

    def test_an_applied_plan_is_its_lines_as_orders_but_those_that_refuse(self, store: Store) -> None:
        plan_id = self.plan(store, ActionKind.DESTROY, ActionKind.REFUSE, ActionKind.KILL)
        applied = store.apply_plan(plan_id)

        assert applied.applied_at is not None
        assert [line.result for line in applied.actions] == [None, "refused", None]
        orders = store.orders("host-1")
        assert [(order.plan_id, order.n, order.ref, order.action) for order in orders] == [
            (plan_id, 1, applied.actions[0].ref, ActionKind.DESTROY),
            (plan_id, 3, applied.actions[2].ref, ActionKind.KILL),
        ]
        assert {order.at for order in orders} == {applied.applied_at}
        assert store.orders("host-2") == []

    def test_it_is_done_with_its_last_line_and_a_result_is_given_once(self, store: Store) -> None:
        plan_id = self.plan(store, ActionKind.DESTROY, ActionKind.KILL)
        store.apply_plan(plan_id)
        assert store.conclude_order(plan_id, 2, "destroyed")
        assert store.get_plan(plan_id).done_at is None
        assert store.conclude_order(plan_id, 1, "refused: it lives")
        done = store.get_plan(plan_id)

        assert done.done_at is not None
        assert [line.result for line in done.actions] == ["refused: it lives", "destroyed"]
        assert not store.conclude_order(plan_id, 1, "destroyed")
        assert store.apply_plan(plan_id) == done == store.get_plan(plan_id), "applying twice is applying once"

    def test_a_plan_of_nothing_is_done_at_once(self, store: Store) -> None:
        applied = store.apply_plan(self.plan(store))

        assert applied.done_at is not None

    @pytest.mark.parametrize("plan_id", ["cln_0", "\0"])
    def test_one_that_never_was_is_not_found(self, store: Store, plan_id: str) -> None:
        for ask in (store.get_plan, store.apply_plan):
            with pytest.raises(NotFound):
                ask(plan_id)

    def test_two_sites_that_conclude_the_last_lines_at_once_leave_a_plan_that_is_done(self, store: Store) -> None:
        for _ in range(5):
            lines = [
                PlannedAction(ref=a_ref(store, site=f"host-{n}"), action=ActionKind.DESTROY, why="") for n in range(4)
            ]
            plan_id = store.apply_plan(store.store_plan(lines, asked_by="key_1", force=False).id).id
            start = threading.Barrier(4)

            def conclude(n: int, plan_id: str = plan_id, start: threading.Barrier = start) -> None:
                start.wait()
                store.conclude_order(plan_id, n, "destroyed")

            threads = [threading.Thread(target=conclude, args=(n,)) for n in range(1, 5)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

            assert store.get_plan(plan_id).done_at is not None


class TestAudit:
    def test_an_act_is_there_before_its_result(self, store: Store) -> None:
        entry_id = store.begin_act(who="key_1", what="run.kill", target="run_\0", detail={"ä": [1, None]})
        ((before,), _) = store.list_acts(limit=10, before=None)
        store.end_act(entry_id, "done")
        store.end_act(entry_id, "said again")
        ((after,), more) = store.list_acts(limit=10, before=None)

        assert (before.who, before.what, before.detail, before.result) == ("key_1", "run.kill", {"ä": [1, None]}, None)
        assert before.target.startswith("run_")
        assert (after, more) == (before.model_copy(update={"result": "done"}), None)

    def test_they_come_newest_first_in_pages(self, store: Store) -> None:
        ids = [store.begin_act(who="key_1", what=f"act.{n}", target="", detail={}) for n in range(5)]
        first, more = store.list_acts(limit=2, before=None)
        second, end = store.list_acts(limit=3, before=more)

        assert [entry.id for entry in (*first, *second)] == ids[::-1]
        assert (more, end) == (ids[3], None)


class TestDrains:
    def worker(self, store: Store, worker_id: str = "wrk_1") -> WorkerRecord:
        made = WorkerRecord(id=worker_id, host="h", site="host-1", capabilities=(make_capabilities(),))
        store.record_worker(made)
        return made

    def test_a_draining_worker_claims_nothing_and_another_does(self, store: Store) -> None:
        add_tenant(store, concurrent=9)
        for _ in range(3):
            add_run(store)
        self.worker(store)
        assert claim(store) is not None

        store.drain_worker("wrk_1")

        assert claim(store) is None
        assert claim(store, worker_id="wrk_2") is not None

    def test_it_stays_so_when_the_worker_says_again_that_it_lives(self, store: Store) -> None:
        made = self.worker(store)
        store.drain_worker("wrk_1")
        store.record_worker(made)
        shown = store.get_worker("wrk_1")

        assert shown is not None
        assert shown.draining
        assert [store.is_draining(id_) for id_ in ("wrk_1", "wrk_2")] == [True, False]

    def test_how_much_each_plays_is_counted_while_it_plays(self, store: Store) -> None:
        add_tenant(store, concurrent=9)
        for _ in range(4):
            add_run(store)
        claimed(store)
        claimed(store)
        held = claimed(store, worker_id="wrk_2")
        assert store.playing() == {"wrk_1": 2, "wrk_2": 1}

        store.requeue(held.run.id, held.fence, why="it did not start")

        assert store.playing() == {"wrk_1": 2}

    @pytest.mark.parametrize("worker_id", ["wrk_0", "\0"])
    def test_a_worker_that_is_not_there_is_not_found(self, store: Store, worker_id: str) -> None:
        with pytest.raises(NotFound):
            store.drain_worker(worker_id)
