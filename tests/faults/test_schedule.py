"""Workers, API, relay, webhooks and Redis killed, stopped and flushed by a seed, under load, over two sites and one
with real sandboxes; then the judge. `make soak` is the same with the times as they are shipped, and longer.

FAULTS_SEED=N in the environment plays the schedule of that seed again.
"""

import os
from pathlib import Path

import pytest

from tests.faults.inflict import WEIGHTS, plan
from tests.faults.place import Forks
from tests.faults.schedule import REAL_SANDBOXES, Setup, recoveries_s, run
from tests.sandboxes import require_gvisor
from tests.servers import PostgresServer
from tests.summary import ran

RUNS = 500
SEED = "FAULTS_SEED"

pytestmark = pytest.mark.timeout(600)


def test_the_same_seed_is_the_same_schedule_and_everything_is_in_it() -> None:
    words = {"lasts_s": 200.0, "calm_s": 1.5, "longest_s": 4.0}

    assert plan(3, ["a", "b"], **words) == plan(3, ["a", "b"], **words) != plan(4, ["a", "b"], **words)
    assert {(fault.what, fault.action) for fault in plan(3, ["a", "b"], **words)} == WEIGHTS.keys()


def test_recovery_is_from_a_faults_beginning_to_the_end_of_what_it_found_and_a_later_run_that_passed() -> None:
    def ended(run: str, at: float, outcome: str) -> dict[str, object]:
        return {"kind": "bus", "at": at, "run": run, "type": "run.finished", "outcome": outcome}

    entries: list[dict[str, object]] = [
        {"kind": "accepted", "at": 1.0, "run": "over"}, {"kind": "accepted", "at": 2.0, "run": "hit"},
        ended("over", 3.0, "passed"), {"kind": "fault", "at": 4.0}, {"kind": "accepted", "at": 5.0, "run": "after"},
        ended("after", 6.0, "passed"), ended("hit", 9.0, "errored"), ended("hit", 20.0, "errored"),
    ]  # fmt: skip

    assert recoveries_s(entries) == [5.0]
    assert recoveries_s([entry for entry in entries if entry.get("run") != "hit"]) == [2.0]


def test_runs_under_a_schedule_of_faults_hold_every_invariant(
    forks: Forks, tmp_path: Path, postgres_server: PostgresServer
) -> None:
    require_gvisor()
    ran("database", f"postgresql {postgres_server.version}")
    seed = int(os.environ.get(SEED) or int.from_bytes(os.urandom(4), "big"))
    print(f"{SEED}={seed} plays this schedule again")

    with postgres_server.fresh_database() as database:
        done = run(forks, Setup(seed=seed, runs=RUNS, directory=tmp_path / "place", database=database))

    figures = done.figures()
    print(figures)
    assert done.violations == [], str(done)
    assert figures["accepted"] == figures["terminal"] == RUNS, str(done)
    assert (figures["lost"], figures["duplicated"], figures["left_behind"]) == (0, 0, 0), str(done)
    assert figures["planted_leak_found"]
    assert figures["outcomes"].get("passed", 0) > RUNS / 2, f"too little of it was a run at all: {done}"
    assert all(figures["played_at"].get(site, 0) >= 20 for site in ("a", "b", REAL_SANDBOXES)), figures
