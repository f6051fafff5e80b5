"""Every failpoint of a worker's line, with each of its three actions, in real processes: what becomes of the run.

All of it is played at once, in one installation: each case has a worker of its own, whose boundary nobody else offers.
A failpoint acts the first time that it is reached. One that stops its process is woken when somebody else has taken the
run over (at its next phase `running`, with another worker's child), or has ended it.
"""

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from service.adapters.celery_queue import CeleryDoorbell
from service.core.failpoints import Action, Failpoint
from tests.contract.store_steps import add_run, add_tenant
from tests.factories import make_controls, make_scenario
from tests.faults.history import Violation, judge
from tests.faults.paper import KIND
from tests.faults.place import Forks, Place, Program, eventually, run_place
from tests.faults.recorder import Recorder

LINE = [point for point in Failpoint if point.value.partition(".")[0] not in ("submit", "relay", "reaper")]
IN_A_TRANSACTION = {Failpoint.CLAIM_BEFORE_COMMIT, Failpoint.FINISH_BEFORE_COMMIT}
"""Who stops there holds the database's write lock: they are stopped when the others are through."""
PROVISIONING = {
    Failpoint.CLAIM_AFTER, Failpoint.OPEN_BEFORE_CREATE, Failpoint.OPEN_HALF_CREATED, Failpoint.OPEN_CREATED,
    Failpoint.UPLOAD_AFTER,
}  # fmt: skip
ENDED = {Failpoint.FINISH_AFTER, Failpoint.DESTROY_BEFORE, Failpoint.DESTROY_AFTER}
PASSED, PASSED_AGAIN = ("passed", None, 1), ("passed", None, 2)
LOST, INTERNAL = ("errored", "worker_lost", 1), ("errored", "internal", 1)
ALWAYS = "claim.after:exit"
STEPS = [{"name": f"step {n}", "run": ["sleep", "0.3"]} for n in (1, 2)]

pytestmark = pytest.mark.timeout(240)


def expected(point: Failpoint, action: Action) -> list[tuple[str, str | None, int]]:
    """Outcome, reason and attempts that the run may end with."""
    if point in ENDED:
        return [PASSED]
    if point is Failpoint.CLAIM_BEFORE_COMMIT:
        return [PASSED, PASSED_AGAIN] if action is Action.STOP else [PASSED]  # its lease began when it was written
    if point is Failpoint.FINISH_BEFORE_COMMIT and action is Action.STOP:
        return [PASSED]  # it held the lease when it wrote, and nobody else could write
    if action is Action.RAISE and point is not Failpoint.CLAIM_AFTER:
        return [INTERNAL]
    return [PASSED_AGAIN] if point in PROVISIONING else [LOST]


@dataclass
class Case:
    spec: str
    boundary: str
    stops: bool = False
    worker: Program | None = None
    run: str = ""
    woken: bool = False
    row: dict[str, Any] = field(default_factory=dict)
    types: list[str] = field(default_factory=list)

    @property
    def reached(self) -> list[dict[str, Any]]:
        return self.worker.events("failpoint_reached") if self.worker else []


@dataclass
class Played:
    cases: dict[str, Case]
    violations: list[Violation]
    told: str
    took_s: float


@pytest.fixture(scope="module")
def played(forks: Forks) -> Iterator[Played]:
    began = time.monotonic()
    cases = {
        f"{point}:{action}": Case(f"{point}:{action}@1", f"namespace/w{n}", stops=action is Action.STOP)
        for n, (point, action) in enumerate((point, action) for point in LINE for action in Action)
    }
    cases[ALWAYS + " each time"] = Case(ALWAYS, "namespace/always")
    last = {f"{point}:stop" for point in IN_A_TRANSACTION}
    with (
        tempfile.TemporaryDirectory(prefix="bd-faults-") as directory,
        run_place(forks, Path(directory)) as place,
        Recorder(Path(directory) / "history.jsonl") as recorder,
    ):
        add_tenant(place.store, concurrent=100, queued=1000)
        with recorder.watching(place):
            _play(place, recorder, [case for name, case in cases.items() if name not in last])
            for name in sorted(last):
                _play(place, recorder, [cases[name]])
        recorder.conclude(place)
        rows = {row["id"]: row for row in place.rows()}
        for case in cases.values():
            case.row, case.types = rows[case.run], place.types_told(case.run)
        yield Played(cases, judge(recorder.entries), place.told(), time.monotonic() - began)


def _play(place: Place, recorder: Recorder, cases: list[Case]) -> None:
    kinds = {"BLASTDOOR_BOUNDARIES": '["namespace"]'}
    if not place.programs:
        place.start("reaper", **kinds, **{KIND: "namespace"})
        place.start("relay")
    for case in cases:
        case.worker = place.start(
            "worker", **kinds, **{KIND: case.boundary}, BLASTDOOR_FAILPOINTS=case.spec,
            BLASTDOOR_WORKER_CONCURRENCY="2" if case.stops else "1",
        )  # fmt: skip
    bell = CeleryDoorbell(place.redis.url)
    for case in cases:
        run = add_run(
            place.store, boundary=case.boundary, scenario=make_scenario(steps=STEPS),
            controls=make_controls(limits={"wall": "60s"}), max_queued=1000,
        )  # fmt: skip
        case.run = run.id
        recorder.add("accepted", run=run.id, tenant="acme", key=None, token=None)
        bell.ring(case.boundary)

    def through() -> bool:
        rows = {row["id"]: row for row in place.rows()}
        for case in cases:
            if case.stops and not case.woken:
                case.woken = _wake(case, rows[case.run])
        return place.settled() and all(case.woken or not case.stops for case in cases)

    eventually(through, seconds=120, why=lambda: _said(place, cases))
    for case in cases:
        assert case.worker is not None
        case.worker.end(polite_s=0)


def _said(place: Place, cases: list[Case]) -> str:
    """Of those that are not through."""
    rows = {row["id"]: row for row in place.rows()}
    late = [case for case in cases if rows[case.run]["phase"] != "finished" or (case.stops and not case.woken)]
    logs = "\n".join(f"--- {case.spec}\n{case.worker.said()[:4000]}" for case in late[:3] if case.worker)
    return f"{[(case.spec, case.woken, rows[case.run]) for case in late]}\n{logs}"


def _wake(case: Case, row: dict[str, Any]) -> bool:
    """Whoever stopped itself, once its run is somebody else's, or when it holds the lock that all others wait for."""
    if not case.reached:
        return False
    (reached,) = case.reached
    taken_over = row["phase"] == "finished" or (row["fence"] > 1 and row["phase"] == "running")
    if not taken_over:
        if Failpoint(str(reached["failpoint"])) not in IN_A_TRANSACTION:
            return False
        time.sleep(2.5)  # longer than the lease
    os.kill(int(reached["pid"]), signal.SIGCONT)
    return True


@pytest.mark.parametrize("action", list(Action))
@pytest.mark.parametrize("point", LINE)
def test_a_run_ends_once_and_as_documented(played: Played, point: Failpoint, action: Action) -> None:
    case = played.cases[f"{point}:{action}"]

    assert len(case.reached) == 1, "it was reached, and acted once"
    assert (case.row["outcome"], case.row["reason"], case.row["attempt"]) in expected(point, action), played.told
    assert case.types.count("run.finished") == 1, case.types
    assert case.types.count("boundary.destroyed") == case.types.count("run.provisioning") == case.row["fence"]
    assert [str(one) for one in played.violations if one.run == case.run] == []


def test_a_worker_that_dies_after_each_claim_ends_the_run_at_the_third(played: Played) -> None:
    case = played.cases[ALWAYS + " each time"]

    assert len(case.reached) == 3
    assert (case.row["outcome"], case.row["reason"]) == ("errored", "provision_failed")
    assert case.types.count("run.finished") == 1


def test_the_whole_of_it_holds_the_invariants_and_leaves_nothing(played: Played) -> None:
    assert [str(violation) for violation in played.violations] == []
