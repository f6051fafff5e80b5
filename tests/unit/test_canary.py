"""Canary runs: when the next is due, what is wrong when they do not pass, and that they are nobody's business."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from service.core.canary import CANARY_TENANT, CanaryView, ailing, due
from service.core.errors import PlacementRefused, Unavailable
from service.core.run import Phase
from service.relay.canary import AGAIN_AFTER, CanaryKeeper
from service.usecases.canary import enrol, send
from service.usecases.submit import Submitting
from tests.factories import NOON
from tests.unit.usecase_world import World

EVERY, WITHIN = timedelta(seconds=30), timedelta(seconds=15)
FRESH = timedelta(seconds=90)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def seen(*, ago_s: float | None = None, waits_s: float | None = None, **more: Any) -> CanaryView:
    """`ago_s`: the last one passed so long ago; `waits_s`: one is under way for so long."""
    passed = None if ago_s is None else NOON - timedelta(seconds=ago_s)
    waiting = None if waits_s is None else NOON - timedelta(seconds=waits_s)
    words: dict[str, Any] = {"passed_at": passed, "ended_at": passed, "waiting_since": waiting}
    return CanaryView(now=NOON, **(words | more))


class TestWhenRunsCanBeReliedOn:
    def test_one_passed_lately(self) -> None:
        assert ailing(seen(ago_s=5), every=EVERY, within=WITHIN) is None

    def test_the_next_one_is_under_way_and_not_late(self) -> None:
        assert ailing(seen(ago_s=35, waits_s=5, phase=Phase.RUNNING), every=EVERY, within=WITHIN) is None

    def test_a_long_queue_is_no_illness(self) -> None:
        waiting = seen(ago_s=600, waits_s=570, phase=Phase.QUEUED, slots=4, active=4)

        assert ailing(waiting, every=EVERY, within=WITHIN) is None


class TestWhatIsWrong:
    def test_nothing_was_tried_yet(self) -> None:
        assert ailing(seen(), every=EVERY, within=WITHIN) == "no canary run has passed yet"

    def test_the_last_one_did_not_pass(self) -> None:
        failed = seen(ago_s=40, failed="errored / boundary_lost")

        assert ailing(failed, every=EVERY, within=WITHIN) == "the last canary run ended errored / boundary_lost"

    @pytest.mark.parametrize(("slots", "active"), [(4, 3), (0, 0)], ids=["a worker is idle", "no worker lives"])
    def test_one_waits_though_nothing_is_in_its_way(self, slots: int, active: int) -> None:
        hung = seen(ago_s=60, waits_s=16, phase=Phase.QUEUED, slots=slots, active=active)

        assert ailing(hung, every=EVERY, within=WITHIN) == "a canary run is queued since 16 s"

    def test_one_was_claimed_and_does_not_end(self) -> None:
        hung = seen(ago_s=60, waits_s=16, phase=Phase.COLLECTING, slots=1, active=1)

        assert ailing(hung, every=EVERY, within=WITHIN) == "a canary run is collecting since 16 s"

    def test_nobody_sends_them_any_more(self) -> None:
        why = ailing(seen(ago_s=106), every=EVERY, within=WITHIN)

        assert why is not None
        assert why.startswith("no canary run has passed since")


@pytest.mark.parametrize(
    ("view", "wanted"),
    [(seen(), True), (seen(ago_s=29), False), (seen(ago_s=30), True), (seen(ago_s=60, waits_s=1), False)],
    ids=["the first", "too early", "in time", "one at a time"],
)
def test_when_the_next_is_due(view: CanaryView, wanted: bool) -> None:
    assert due(view, every=EVERY) is wanted


class TestSending:
    def test_it_goes_through_the_line_of_all_runs_and_is_in_no_list(self, world: World) -> None:
        line = self.line(world)
        enrol(line)
        enrol(line)
        run_id = send(line, world.store, every=EVERY, fresh=FRESH)

        assert run_id is not None
        assert world.store.get_run(run_id, CANARY_TENANT).phase is Phase.QUEUED
        assert world.doorbell.rings[-1] == "gvisor"
        assert send(line, world.store, every=EVERY, fresh=FRESH) is None, "one at a time"
        assert world.play().id == run_id
        assert world.store.canary_view(fresh=FRESH).passed_at is not None
        assert world.store.list_runs(None, phase=None, outcome=None, limit=10, before=None).items == ()

    def test_all_but_the_newest_are_forgotten(self, world: World) -> None:
        line = self.line(world)
        enrol(line)
        sent = []
        for _ in range(5):
            run_id = send(line, world.store, every=timedelta(0), fresh=FRESH)
            assert run_id is not None
            sent.append(world.play().id)
            world.store.record_destroyed(run_id, 1)

        assert list(world.store.old_canaries(keep=0)) == sent[:-4:-1], "the two that are kept, and the last"

    def test_without_a_worker_it_is_refused_as_any_run_is(self, world: World) -> None:
        line = self.line(world)
        world.store.forget_worker("wrk_1")
        enrol(line)

        with pytest.raises(PlacementRefused):
            send(line, world.store, every=EVERY, fresh=FRESH)

    @staticmethod
    def line(world: World) -> Submitting:
        return world.submitting()


class TestKeeper:
    def test_only_the_leader_sends_and_trouble_is_tried_again(self) -> None:
        said: list[str] = []
        now, leads, trouble = 0.0, False, False

        def send_one() -> str:
            said.append("sent")
            if trouble:
                raise Unavailable("the store is away")
            return "run"

        keeper = CanaryKeeper(lambda: said.append("enrolled"), send_one, leading=lambda: leads, clock=lambda: now)
        keeper.step()
        assert said == []
        leads = True
        keeper.step()
        keeper.step()
        assert said == ["enrolled", "sent", "sent"]
        trouble = True
        keeper.step()
        keeper.step()
        assert said.count("sent") == 3, "not at once again"
        now += AGAIN_AFTER.total_seconds()
        keeper.step()
        assert said.count("sent") == 4
