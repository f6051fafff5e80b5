"""Fairness over a longer time, on every store: each tenant its turn, under its own cap, whatever others have queued.

The databases choose in one statement, the memory store in a few lines of Python: the same history must come out.
"""

import random
from collections import Counter

import pytest

from service.adapters.memory import MemoryStore
from service.adapters.sql_store import SqlStore
from service.core.ports.runs import Claim
from tests.contract.conftest import Store
from tests.contract.store_steps import add_run, add_tenant, claim, claimed
from tests.factories import make_result, make_run_id, make_scenario


def end(store: Store, held: Claim) -> None:
    store.finish(held.run.id, held.fence, make_result())
    store.record_destroyed(held.run.id, held.fence)


def a_moment_later(store: Store) -> None:
    """SQLite's clock has milliseconds: two claims in the same one are a tie, and then the name decides."""
    before = store.now()
    while store.now() == before:
        pass


def worked_off(store: Store, *, slots: int, runs: int) -> list[str]:
    """Tenants in the order of their claims, with `slots` runs under way at once; the first to begin is the first to
    end."""
    under_way: list[Claim] = []
    order = []
    for _ in range(runs):
        if len(under_way) == slots:
            end(store, under_way.pop(0))
        held = claimed(store)
        under_way.append(held)
        order.append(held.run.tenant)
    for held in under_way:
        end(store, held)
    return order


class TestTurns:
    @pytest.mark.parametrize("slots", [1, 2, 3])
    def test_tenants_with_the_same_cap_get_the_same_share_however_much_one_has_queued(
        self, store: Store, slots: int
    ) -> None:
        for name in ("heavy", "light", "small"):
            add_tenant(store, name=name, concurrent=3)
        for _ in range(40):
            add_run(store, tenant="heavy")
        for name in ("light", "small"):
            for _ in range(5):
                add_run(store, tenant=name)
        order = worked_off(store, slots=slots, runs=15)

        assert [sorted(order[n : n + 3]) for n in range(0, 15, 3)] == [["heavy", "light", "small"]] * 5

    def test_who_comes_late_is_next_though_thousands_of_bells_rang_for_another(self, store: Store) -> None:
        for name in ("heavy", "light"):
            add_tenant(store, name=name, concurrent=9)
        for _ in range(30):
            add_run(store, tenant="heavy")
        held = [claimed(store) for _ in range(2)]
        late = add_run(store, tenant="light")

        end(store, held[0])
        assert claimed(store).run.id == late.id

    def test_each_has_its_own_cap_and_a_place_that_one_may_not_take_goes_to_another(self, store: Store) -> None:
        caps = {"one": 1, "two": 2, "five": 5}
        for name, cap in caps.items():
            add_tenant(store, name=name, concurrent=cap)
            for _ in range(6):
                add_run(store, tenant=name)
        held = [claimed(store) for _ in range(sum(caps.values()))]

        assert Counter(one.run.tenant for one in held) == caps
        assert sorted(one.run.tenant for one in held[:3]) == ["five", "one", "two"], "first each its turn"
        assert claim(store) is None
        assert not store.waiting(["gvisor"])
        end(store, next(one for one in held if one.run.tenant == "two"))
        assert store.waiting(["gvisor"])
        assert claimed(store).run.tenant == "two"

    def test_a_tenant_whose_runs_no_worker_here_can_build_stands_in_nobodys_way(self, store: Store) -> None:
        for name in ("aaa", "bbb"):
            add_tenant(store, name=name, concurrent=1)
        for _ in range(3):
            add_run(store, tenant="aaa", boundary="microvm")
        wanted = add_run(store, tenant="bbb")

        assert claimed(store).run.id == wanted.id


@pytest.mark.parametrize("seed", range(4))
def test_both_databases_choose_as_the_memory_store_does(
    sql_store: SqlStore, memory_store: MemoryStore, seed: int
) -> None:
    """Submissions, claims by workers that can build this or that, ends and requeues, at random but the same on both."""
    chance = random.Random(seed)
    caps = {name: chance.randint(1, 3) for name in ("aaa", "bbb", "ccc", "ddd")}
    stores: tuple[Store, Store] = (sql_store, memory_store)
    for store in stores:
        for name, cap in caps.items():
            add_tenant(store, name=name, concurrent=cap)
    under_way: list[tuple[Claim, Claim]] = []
    claims = empty = 0
    for _ in range(120):
        act = chance.choices(("submit", "claim", "end", "requeue"), (4, 5, 3, 1))[0]
        if act == "submit":
            words = {"tenant": chance.choice(list(caps)), "boundary": chance.choice(("gvisor", "microvm"))}
            scenario = make_scenario(runtime=chance.choice(("default", "default", "python")))
            run_id = make_run_id()
            for store in stores:
                add_run(store, id=run_id, scenario=scenario, **words)
        elif act == "claim":
            boundaries = chance.choice((("gvisor",), ("microvm",), ("gvisor", "microvm")))
            runtimes = chance.choice((["default"], ["default", "python"]))
            ours, theirs = (claim(store, boundaries=boundaries, runtimes=runtimes) for store in stores)
            assert (ours and ours.run.id) == (theirs and theirs.run.id)
            if ours is not None and theirs is not None:
                under_way.append((ours, theirs))
                claims += 1
                a_moment_later(sql_store)
            empty += ours is None
        elif under_way:
            for store, held in zip(stores, under_way.pop(chance.randrange(len(under_way))), strict=True):
                if act == "end":
                    store.finish(held.run.id, held.fence, make_result())
                else:
                    store.requeue(held.run.id, held.fence, why="no room", counts=False)
                store.record_destroyed(held.run.id, held.fence)
        active = Counter(ours.run.tenant for ours, _ in under_way)
        assert all(active[name] <= cap for name, cap in caps.items())
        for boundaries in (("gvisor",), ("gvisor", "microvm")):
            assert sql_store.waiting(boundaries) == memory_store.waiting(boundaries)
    assert claims > 10, "or nothing was compared"
    assert empty > 3, "or no cap was ever reached"
