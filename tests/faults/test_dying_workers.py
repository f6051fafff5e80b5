"""D44, D45 and D46 with real sandboxes: workers that are killed, that die while they make a sandbox, and that sleep
past their lease. What shows that a check can fail: the same look while no reaper runs, or with a violation planted."""

import os
import signal
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import pytest

from service.core.failpoints import Action, Failpoint
from tests.faults.history import Entry, judge
from tests.faults.place import Forks, eventually
from tests.faults.scene import Scene, open_scene
from tests.faults.test_failpoints import Case, Lane, expected
from tests.sandboxes import require_gvisor

GONE_WITHIN_S = 15.0
PASSED = ("passed", None, 1)

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def scene(forks: Forks, tmp_path: Path) -> Iterator[Scene]:
    """No process yet."""
    require_gvisor()
    with open_scene(forks, tmp_path, paper=False) as scene:
        yield scene


def lane_of(scene: Scene) -> Lane:
    """Once its worker has tried the wall out: what that makes passes the same failpoints."""
    lane = Lane(scene.place, scene.recorder, "gvisor", boundary="gvisor", BLASTDOOR_WORKER_CONCURRENCY="2")
    eventually(lambda: scene.place.query("SELECT id FROM worker"), why=scene.place.told)
    return lane


def ends_as_documented(scene: Scene, case: Case) -> None:
    assert scene.ended(case.run) in expected(case.point, case.action), (case, scene.place.told())


def test_d44_a_killed_child_and_a_killed_worker_take_their_sandbox_along_and_the_run_ends_once(scene: Scene) -> None:
    worker = scene.place.start("worker")
    for victim in ("child", "worker"):
        run = scene.submit(["sleep", "60"])
        scene.until(run, "running")
        eventually(scene.guests, why=scene.place.told)

        if victim == "child":
            os.kill(worker.pool()[0], signal.SIGKILL)
        else:
            worker.send(signal.SIGKILL)

        eventually(lambda: not scene.guests(), seconds=GONE_WITHIN_S, why=scene.place.told)
        assert scene.place.left(within_s=0), "nobody has cleaned up yet, and that must show"
        assert scene.wrong_so_far() >= {"I1", "I6"}
        reaper = scene.place.start("reaper")
        assert scene.ended(run) == ("errored", "worker_lost", 1)
        reaper.end()

    for role in ("worker", "reaper"):
        scene.place.start(role)
    assert scene.ended(scene.submit()) == PASSED
    assert scene.judged() == []


def test_d45_a_worker_that_dies_around_the_making_of_a_sandbox_leaves_none_and_its_run_completes(scene: Scene) -> None:
    lane = lane_of(scene)
    first = Case(Failpoint.OPEN_HALF_CREATED, Action.EXIT)
    others = [
        Case(Failpoint.OPEN_BEFORE_CREATE, Action.EXIT),  # the intent is recorded, and nothing more
        Case(Failpoint.OPEN_HALF_CREATED, Action.RAISE),
        Case(Failpoint.OPEN_CREATED, Action.EXIT),
    ]
    lane.begin(first)
    assert scene.place.left(within_s=0), "what stands there must show, until a reaper comes"
    assert scene.wrong_so_far() >= {"I1", "I6"}

    scene.place.start("reaper")
    lane.see_through(first)
    lane.play(others)

    for case in (first, *others):
        ends_as_documented(scene, case)
    assert scene.judged() == []


def test_d46_a_worker_that_sleeps_past_its_lease_writes_nothing_and_the_run_ends_once(scene: Scene) -> None:
    scene.place.start("reaper")
    cases = [
        Case(point, Action.STOP)
        for point in (
            Failpoint.OPEN_BEFORE_CREATE, Failpoint.OPEN_CREATED, Failpoint.RUNNING_AFTER, Failpoint.FINISH_BEFORE,
            Failpoint.DESTROY_BEFORE,
        )
    ]  # fmt: skip
    lane_of(scene).play(cases)

    for case in cases:
        ends_as_documented(scene, case)
    assert scene.judged() == []
    stale = [entry for entry in scene.recorder.entries if entry["kind"] == "write" and not entry["accepted"]]
    assert {"mark_running", "finish"} <= {entry["what"] for entry in stale}, "woken, they have tried"
    assert _judged_as_if_it_had_been_accepted(scene.recorder.entries) == {"I5"}


def _judged_as_if_it_had_been_accepted(entries: list[Entry]) -> set[str]:
    planted = deepcopy(entries)
    late = next(entry for entry in planted if entry["kind"] == "write" and not entry["accepted"])
    late["accepted"] = True
    return {violation.invariant for violation in judge(planted)}
