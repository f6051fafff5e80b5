"""What may follow what: the table itself, and a run that is led through it in any order that anybody may try."""

import itertools
from datetime import timedelta
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.adapters.memory import MemoryStore
from service.core.errors import LeaseLost
from service.core.lease import Recovery, recover
from service.core.run import ACTIVE, MAX_ATTEMPTS, NEXT, Phase, Run
from tests.factories import NOON, make_result, make_run, make_scenario, make_tenant

TABLE = """
queued        -> provisioning finished
provisioning  -> running queued finished
running       -> collecting finished
collecting    -> finished
finished      ->
"""


def test_the_table_is_the_one_in_the_design() -> None:
    rows = (line.partition("->") for line in TABLE.strip().splitlines())
    wanted = {Phase(name.strip()): frozenset(map(Phase, following.split())) for name, _, following in rows}

    assert wanted == NEXT
    assert frozenset(NEXT) - {Phase.QUEUED, Phase.FINISHED} == ACTIVE


def test_finished_absorbs_and_code_that_ran_is_never_queued_again() -> None:
    assert NEXT[Phase.FINISHED] == frozenset()
    assert [phase for phase in Phase if Phase.QUEUED in NEXT[phase]] == [Phase.PROVISIONING]


LEASE = timedelta(seconds=30)
MAX_QUEUE = timedelta(hours=1)


class RunsInAnyOrder(RuleBasedStateMachine):
    """A worker, its late twin, an owner, a reaper and the clock, in any order: no invariant breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.now = NOON
        self.store = MemoryStore(clock=lambda: self.now)
        self.store.create_tenant(make_tenant(concurrent=1))
        self.run = make_run()
        self.store.submit(self.run, make_scenario(), None, max_queued=5)
        self.fences: list[int] = []
        self.alive: set[int] = set()
        """Fences whose boundary exists: made by a claim, gone when that is recorded."""
        self.end: Run | None = None

    @rule()
    def claim(self) -> None:
        held = self.store.claim(
            worker_id="w", site="h", boundaries=["gvisor"], runtimes=["default"], lease=LEASE
        )  # fmt: skip
        if held is not None:
            assert held.fence > max(self.fences, default=0)
            assert not self.alive, "two boundaries of one run"
            self.fences.append(held.fence)
            self.alive.add(held.fence)

    @precondition(lambda self: self.fences)
    @rule(data=st.data(), name=st.sampled_from(["mark_running", "mark_collecting", "finish", "requeue", "heartbeat"]))
    def write(self, data: st.DataObject, name: str) -> None:
        fence = data.draw(st.sampled_from(self.fences))
        before = self.store.get_run(self.run.id, None).phase
        current = self.store.lease_of(self.run.id)
        assert current is not None
        words: dict[str, dict[str, Any]] = {
            "requeue": {"why": "no room"},
            "heartbeat": {"lease": LEASE},
            "finish": {"result": make_result()},
        }
        try:
            getattr(self.store, name)(self.run.id, fence, **words.get(name, {}))
        except LeaseLost:
            return
        assert fence == max(self.fences), "a stale fence wrote"
        assert current.lease_until is not None
        assert current.lease_until >= self.now, "wrote after its lease"
        after = self.store.get_run(self.run.id, None).phase
        assert after == before or after in NEXT[before]

    @rule(by=st.sampled_from(["tenant", "operator"]))
    def cancel(self, by: str) -> None:
        self.store.request_cancel(self.run.id, None, by=by)

    @precondition(lambda self: self.alive)
    @rule()
    def destroyed(self) -> None:
        view = self.store.lease_of(self.run.id)
        assert view is not None
        if view.phase in ACTIVE and view.lease_until is not None and view.lease_until >= self.now:
            return
        fence = self.alive.pop()
        assert self.store.record_destroyed(self.run.id, fence)
        assert not self.store.record_destroyed(self.run.id, fence)

    @rule(seconds=st.sampled_from([1, 29, 31, 4000]))
    def time_passes(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)

    @rule()
    def reconcile(self) -> None:
        for view in self.store.leases():
            decided = recover(view, now=self.now, max_queue=MAX_QUEUE)
            if decided is None:
                continue
            if decided.action is Recovery.REQUEUE:
                assert self.store.recover_requeue(view)
            else:
                assert decided.verdict is not None
                assert self.store.recover_finish(view, decided.verdict)

    @invariant()
    def the_end_never_changes_and_is_told_once(self) -> None:
        run = self.store.get_run(self.run.id, None)
        assert (run.outcome is None) == (run.phase is not Phase.FINISHED)
        assert run.attempt <= MAX_ATTEMPTS
        if run.phase is Phase.FINISHED:
            seen = run.model_copy(update={"boundary_destroyed_at": None})
            assert self.end in (None, seen)
            self.end = seen

    def teardown(self) -> None:
        self.store.lead("relay", lease=LEASE)
        self.store.stamp("relay", limit=1000)
        events = [row.event for row in self.store.retained(after=0, limit=1000)]
        phases = [e["data"]["phase"] for e in events if e["type"].startswith("dev.blastdoor.run.")]

        assert [int(e["sequence"]) for e in events] == list(range(1, len(events) + 1))
        assert all(Phase(b) in NEXT[Phase(a)] for a, b in itertools.pairwise(phases))
        assert phases.count("finished") == (1 if self.end else 0)


TestRunsInAnyOrder = RunsInAnyOrder.TestCase
TestRunsInAnyOrder.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
