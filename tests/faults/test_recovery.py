"""Each way in which a run can be orphaned, alone, with real processes and a boundary of paper: what becomes of it; and
first, while nobody recovers it, that it would show."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.core.failpoints import Action, Failpoint
from service.core.ids import new_run_id
from service.core.run import Phase
from tests.faults.place import SCALED, Forks, eventually
from tests.faults.scene import Scene, open_scene
from tests.faults.test_failpoints import Case, Lane

PASSED, PASSED_AGAIN, LOST = ("passed", None, 1), ("passed", None, 2), ("errored", "worker_lost", 1)
CANCELLED = ("cancelled", "cancelled_by_tenant")
RUNG_AGAIN_S = float(SCALED["BLASTDOOR_RING_AFTER_S"]) + float(SCALED["BLASTDOOR_HOUSEKEEPING_S"])
LONG_LEASE = {"BLASTDOOR_LEASE_S": "30", "BLASTDOOR_SELF_FENCE_S": "20"}

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def scene(forks: Forks, tmp_path: Path) -> Iterator[Scene]:
    """No process yet."""
    with open_scene(forks, tmp_path) as scene:
        yield scene


def start(scene: Scene, *roles: str) -> None:
    for role in roles:
        scene.place.start(role)


def test_accepted_and_never_rung(scene: Scene) -> None:
    start(scene, "worker")
    eventually(lambda: scene.place.query("SELECT id FROM worker"), why=scene.place.told)
    run = scene.submit(rings=0)
    time.sleep(RUNG_AGAIN_S)
    assert "I1" in scene.wrong_so_far(), "nobody rings for it"

    start(scene, "reaper")

    assert scene.ended(run) == PASSED
    assert scene.judged() == []


@pytest.mark.parametrize(("phase", "end"), [(Phase.PROVISIONING, PASSED_AGAIN), (Phase.RUNNING, LOST)])
def test_claimed_by_a_worker_that_is_dead(scene: Scene, phase: Phase, end: tuple[str, str | None, int]) -> None:
    start(scene, "worker")
    run = scene.abandon(phase, site="here")
    assert {"I1", "I6"} <= scene.wrong_so_far()

    start(scene, "reaper")

    assert scene.ended(run) == end
    assert scene.judged() == []


def test_rung_many_times(scene: Scene) -> None:
    runs = [scene.submit(["sleep", "0.2"], rings=6) for _ in range(3)]
    scene.place.start("worker", BLASTDOOR_WORKER_CONCURRENCY="3")
    start(scene, "reaper")

    assert [scene.ended(run) for run in runs] == [PASSED] * 3
    assert scene.judged() == []
    opened = [entry["run"] for entry in scene.recorder.entries if entry.get("what") == "opened"]
    assert sorted(opened) == sorted(runs), "each was built and played once"


def test_finished_and_not_published(scene: Scene) -> None:
    start(scene, "worker", "reaper")
    run = scene.submit()
    assert scene.ended(run) == PASSED
    assert "I3" in scene.wrong_so_far(), "nobody has told of it"
    start(scene, "relay")

    assert scene.judged() == []


def test_a_boundary_without_a_run(scene: Scene) -> None:
    scene.place.store.request_cancel(scene.submit(rings=0), None, by="tenant")
    scene.build(new_run_id(), fence=1, site="here")
    assert "I6" in scene.wrong_so_far()

    start(scene, "reaper")

    eventually(lambda: not scene.place.left(within_s=0), why=scene.place.told)
    scene.place.programs[-1].end()
    assert scene.judged() == []


def test_a_run_that_nobody_claims_expires_in_the_queue(scene: Scene) -> None:
    reaper = scene.place.start("reaper")
    run = scene.submit()
    time.sleep(2.0)
    assert scene.row(run)["phase"] == "queued", "it may wait for an hour"
    reaper.end()

    scene.place.start("reaper", BLASTDOOR_MAX_QUEUE_S="1")

    assert scene.ended(run) == ("errored", "queue_expired", 0)
    assert scene.judged() == []


def test_a_site_that_falls_silent(scene: Scene) -> None:
    there = scene.place.start("reaper", site="there")
    eventually(lambda: scene.place.query("SELECT name FROM site WHERE name = 'there'"), why=scene.place.told)
    there.end()
    run = scene.abandon(Phase.RUNNING, site="there")

    scene.place.start("reaper", site="here", BLASTDOOR_SITE_SILENT_S="2")
    eventually(lambda: "boundary.quarantined" in scene.place.types_told(run), why=scene.place.told)
    assert scene.row(run)["reason"] == "worker_lost"
    assert scene.place.left(within_s=0), "it stands, and nobody may say that it is gone"
    assert "I6" in scene.wrong_so_far()

    scene.place.start("reaper", site="there")
    assert scene.ended(run) == LOST
    assert scene.judged() == []
    types = scene.place.types_told(run)
    assert (types.count("boundary.quarantined"), types.count("boundary.destroyed")) == (1, 1)


def test_cancelled_in_each_phase_while_it_goes_on(scene: Scene) -> None:
    """What was asked before the guest is over is done; after that, completion may win the race. One end in any case."""
    start(scene, "reaper")
    lane = Lane(scene.place, scene.recorder, "gvisor", boundary="gvisor", **LONG_LEASE)
    must = [Failpoint.RUNNING_AFTER, Failpoint.OPEN_CREATED, Failpoint.CLAIM_AFTER]
    may = [Failpoint.FINISH_BEFORE, Failpoint.COLLECT_AFTER, Failpoint.COLLECT_BEFORE]
    too_late = [Failpoint.DESTROY_BEFORE, Failpoint.FINISH_AFTER]
    for point in [*too_late, *may, *must]:  # see `Lane.play`
        case = Case(point, Action.STOP)
        lane.begin(case)
        scene.place.store.request_cancel(case.run, "acme", by="tenant")
        os.kill(case.acted, signal.SIGCONT)

        end = scene.ended(case.run)[:2]

        assert end in [*([CANCELLED] if point not in too_late else []), *([] if point in must else [PASSED[:2]])], case
        assert scene.place.types_told(case.run).count("run.finished") == 1
    assert scene.judged() == []
