"""Every failpoint of a worker's line, with each of its three actions, in real processes: what becomes of the run.

All of it is played in one installation, on some lanes: a worker each, whose boundary nobody else offers. A fault acts
once. One that stops its process is woken when somebody else plays the run under the next fence, or has ended it.
"""

import os
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from tests.faults.place import SCALED, Forks, Place, eventually, run_place
from tests.faults.program import FAULT_FILE
from tests.faults.recorder import Recorder

LINE = [point for point in Failpoint if point.value.partition(".")[0] not in ("submit", "relay", "reaper", "hook")]
IN_A_TRANSACTION = {Failpoint.CLAIM_BEFORE_COMMIT, Failpoint.FINISH_BEFORE_COMMIT}
"""Who stops there holds the database's write lock: they come when the others are through."""
PROVISIONING = {
    Failpoint.CLAIM_AFTER, Failpoint.OPEN_BEFORE_CREATE, Failpoint.OPEN_HALF_CREATED, Failpoint.OPEN_CREATED,
    Failpoint.UPLOAD_AFTER,
}  # fmt: skip
ENDED = {Failpoint.FINISH_AFTER, Failpoint.DESTROY_BEFORE, Failpoint.DESTROY_AFTER}
PASSED, PASSED_AGAIN = ("passed", None, 1), ("passed", None, 2)
LOST, INTERNAL = ("errored", "worker_lost", 1), ("errored", "internal", 1)
ALWAYS = "claim.after:exit"
LANES = {Action.EXIT: 3, Action.RAISE: 1, Action.STOP: 3}
ONLY_NAMESPACE = {"BLASTDOOR_BOUNDARIES": '["namespace"]'}
LEASE_S = 8.0
TIMES = SCALED | {"BLASTDOOR_LEASE_S": str(LEASE_S), "BLASTDOOR_SELF_FENCE_S": "6"}
"""Eight workers at once on two cores, beside other tests: a lease must outlast their waiting for each other."""
STEPS = [{"name": f"step {n}", "run": ["sleep", "0.3"]} for n in (1, 2)]

pytestmark = pytest.mark.timeout(400)


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
    point: Failpoint
    action: Action
    run: str = ""
    acted: int = 0
    """The process that took the fault."""
    row: dict[str, Any] = field(default_factory=dict)
    types: list[str] = field(default_factory=list)


@dataclass
class Played:
    cases: dict[tuple[Failpoint, Action], Case]
    always: Case
    violations: list[Violation]
    told: str


class Lane:
    """A worker whose boundary nobody else offers, and the cases that it plays one after another."""

    def __init__(
        self, place: Place, recorder: Recorder, name: str, *, boundary: str | None = None, **environment: str
    ) -> None:
        self.place, self.recorder, self.boundary = place, recorder, boundary or f"namespace/{name}"
        self.fault = place.directory / f"fault-{name}"
        self.worker = place.start(
            "worker",
            **({} if boundary else ONLY_NAMESPACE),
            **{KIND: self.boundary, FAULT_FILE: str(self.fault)},
            **environment,
        )
        self.bell = CeleryDoorbell(place.redis.url)

    def play(self, cases: Sequence[Case]) -> None:
        """Those of a line's end first: a run that is over for us may still have a worker on its last steps, which must
        not take the next case's fault."""
        for case in sorted(cases, key=lambda case: LINE.index(case.point), reverse=True):
            self.begin(case)
            self.see_through(case)

    def begin(self, case: Case) -> None:
        """Until the fault has acted."""
        partial = self.fault.with_suffix(".partial")
        partial.write_text(f"{case.point}:{case.action}")
        partial.rename(self.fault)
        case.run = self.submit()
        eventually(lambda: self._acted(case), why=lambda: (case, self.worker.said()[-6000:]))

    def see_through(self, case: Case) -> None:
        if case.action is Action.STOP:
            if case.point in IN_A_TRANSACTION:
                time.sleep(LEASE_S + 0.5)
            else:
                eventually(lambda: self._taken_over(case), why=lambda: (case, self.place.told()))
            os.kill(case.acted, signal.SIGCONT)
        eventually(lambda: self._over(case), why=lambda: (case, self.place.told()))

    def submit(self) -> str:
        run = add_run(
            self.place.store, boundary=self.boundary, scenario=make_scenario(steps=STEPS),
            controls=make_controls(limits={"wall": "60s"}), max_queued=1000,
        )  # fmt: skip
        self.recorder.add("accepted", run=run.id, tenant="acme", key=None, token=None)
        self.bell.ring(self.boundary)
        return run.id

    def _acted(self, case: Case) -> bool:
        for path in self.place.directory.glob(f"{self.fault.name}.[0-9]*"):
            case.acted = int(path.suffix[1:])
            path.unlink()
        return case.acted != 0

    def _taken_over(self, case: Case) -> bool:
        """Somebody has ended the run, or plays it under the next fence. A real sandbox whose files are held by who
        sleeps cannot be taken down: there the next attempt waits in the queue."""
        (row,) = (row for row in self.place.rows() if row["id"] == case.run)
        waits = self.boundary == "gvisor" and row["phase"] == "queued" and row["fence"] == 1
        return row["phase"] == "finished" or waits or (row["fence"] > 1 and row["phase"] == "running")

    def _over(self, case: Case) -> bool:
        (row,) = (row for row in self.place.rows() if row["id"] == case.run)
        return row["phase"] == "finished" and row["fence"] == row["destroyed_fence"]


@pytest.fixture(scope="module")
def played(forks: Forks) -> Iterator[Played]:
    cases = {(point, action): Case(point, action) for point in LINE for action in Action}
    with (
        tempfile.TemporaryDirectory(prefix="bd-faults-") as directory,
        run_place(forks, Path(directory), settings=TIMES) as place,
        Recorder(Path(directory) / "history.jsonl") as recorder,
    ):
        add_tenant(place.store, concurrent=100, queued=1000)
        place.start("reaper", **ONLY_NAMESPACE, **{KIND: "namespace"})
        place.start("relay")
        with recorder.watching(place):
            always = _play(place, recorder, cases)
            eventually(place.settled, why=place.told)
        recorder.conclude(place)
        rows = {row["id"]: row for row in place.rows()}
        for case in (*cases.values(), always):
            case.row, case.types = rows[case.run], place.types_told(case.run)
        yield Played(cases, always, judge(recorder.entries), place.told())


def _play(place: Place, recorder: Recorder, cases: Mapping[tuple[Failpoint, Action], Case]) -> Case:
    """-> the case whose failpoint acts each time."""
    last = [case for case in cases.values() if case.action is Action.STOP and case.point in IN_A_TRANSACTION]
    plan: list[tuple[Lane, list[Case]]] = []
    for action, lanes in LANES.items():
        mine = [case for case in cases.values() if case.action is action and case not in last]
        for n in range(lanes):
            # A second child takes over while the first is stopped.
            concurrency = {"BLASTDOOR_WORKER_CONCURRENCY": "2" if action is Action.STOP else "1"}
            plan.append((Lane(place, recorder, f"{action}{n}", **concurrency), mine[n::lanes]))
    each_time = Lane(place, recorder, "each-time", BLASTDOOR_FAILPOINTS=ALWAYS)
    always = Case(Failpoint.CLAIM_AFTER, Action.EXIT, run=each_time.submit())
    with ThreadPoolExecutor(len(plan)) as pool:
        for done in [pool.submit(lane.play, mine) for lane, mine in plan]:
            done.result()
    plan[-1][0].play(last)
    return always


@pytest.mark.parametrize("action", list(Action))
@pytest.mark.parametrize("point", LINE)
def test_a_run_ends_once_and_as_documented(played: Played, point: Failpoint, action: Action) -> None:
    case = played.cases[point, action]

    assert (case.row["outcome"], case.row["reason"], case.row["attempt"]) in expected(point, action), played.told
    assert case.types.count("run.finished") == 1, case.types
    assert case.types.count("boundary.destroyed") == case.types.count("run.provisioning") == case.row["fence"]
    assert [str(one) for one in played.violations if one.run == case.run] == []


def test_a_worker_that_dies_after_each_claim_ends_the_run_at_the_third(played: Played) -> None:
    case = played.always

    assert (case.row["outcome"], case.row["reason"], case.row["attempt"]) == ("errored", "provision_failed", 3)
    assert case.types.count("run.finished") == 1


def test_the_whole_of_it_holds_the_invariants_and_leaves_nothing(played: Played) -> None:
    assert [str(violation) for violation in played.violations] == []
