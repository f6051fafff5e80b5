"""What a worker and a reaper count, of runs on the shipped fakes."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from typing import cast

from prometheus_client import CollectorRegistry

from service.adapters.memory import MemoryStore
from service.core.ports.runs import RunLine
from service.core.run import Phase
from tests.contract.store_steps import RUN_OUT, add_run, add_tenant, claimed
from tests.scenes import Stage, Theatre, steps
from workers.boundaries.fake import NeverReadyBoundary
from workers.metrics import MeteredLine, MeteredRecovery, ReaperMetrics, WorkerMetrics
from workers.reconcile import reconcile
from workers.run_scenario import run_waiting

GVISOR = {"boundary": "gvisor"}


def read(registry: CollectorRegistry, name: str, **labels: str) -> float:
    return registry.get_sample_value(name, labels) or 0.0


class Metered:
    """A theatre whose line is counted."""

    def __init__(self, theatre: Theatre) -> None:
        self.theatre, self.registry = theatre, CollectorRegistry()
        self.line = MeteredLine(theatre.store, WorkerMetrics(self.registry))
        theatre.line = replace(theatre.line, runs=cast(RunLine, self.line))

    def play(self, *words: list[str]) -> None:
        self.theatre.submit(steps(*(words or (["exit", "0"],))))
        assert run_waiting(self.theatre.line)
        self.line.rest()

    def read(self, name: str, **labels: str) -> float:
        return read(self.registry, name, **labels)

    def finished(self, outcome: str, reason: str) -> float:
        return self.read("blastdoor_runs_finished_total", outcome=outcome, reason=reason, **GVISOR)

    def phases(self) -> Mapping[str, float]:
        names = ("queue_wait", "provisioning", "playing", "collecting", "teardown")
        count = "blastdoor_run_phase_duration_seconds_count"
        return {name: self.read(count, phase=name, **GVISOR) for name in names}


def test_a_run_is_counted_once_in_each_phase_and_at_its_end() -> None:
    metered = Metered(Theatre())
    active: list[float] = []
    metered.theatre.stage.acts["step"] = lambda: active.append(metered.read("blastdoor_active_runs"))

    metered.play()
    metered.play(["exit", "3"])

    assert (metered.finished("passed", "none"), metered.finished("failed", "exit_code")) == (1, 1)
    assert set(metered.phases().values()) == {2}
    assert metered.read("blastdoor_boundaries_built_total", **GVISOR) == 2
    assert metered.read("blastdoor_boundaries_destroyed_total", **GVISOR) == 2
    assert metered.read("blastdoor_leases_lost_total", **GVISOR) == 0
    assert (active, metered.read("blastdoor_active_runs")) == ([1, 1], 0)


def test_a_boundary_that_cannot_be_built_is_requeued_and_at_last_errored() -> None:
    metered = Metered(Theatre(stage=Stage(NeverReadyBoundary())))
    run = metered.theatre.submit()
    while metered.theatre.store.get_run(run.id, None).phase is Phase.QUEUED:
        assert run_waiting(metered.theatre.line)
        metered.line.rest()

    assert metered.read("blastdoor_runs_requeued_total", **GVISOR) == 2
    assert metered.finished("errored", "provision_failed") == 1
    assert metered.read("blastdoor_boundaries_built_total", **GVISOR) == 0
    assert metered.phases()["provisioning"] == 3


def test_a_run_that_was_lost_is_counted_as_lost_and_not_as_finished() -> None:
    theatre = Theatre()
    metered = Metered(theatre)
    run = theatre.submit()

    def taken_away() -> None:
        theatre.store._runs[run.id].fence += 1
        theatre.stage.saw()

    theatre.stage.acts["step"] = taken_away
    assert run_waiting(theatre.line)
    metered.line.rest()
    metered.line.rest()

    assert metered.read("blastdoor_leases_lost_total", **GVISOR) == 1
    assert not [s for f in metered.registry.collect() if f.name == "blastdoor_runs_finished" for s in f.samples]


def test_nothing_to_claim_is_nothing_to_count() -> None:
    metered = Metered(Theatre())
    assert not run_waiting(metered.theatre.line)
    metered.line.rest()
    assert set(metered.phases().values()) == {0}


def test_what_a_reaper_recovers_is_counted_by_how_it_ended() -> None:
    store, registry = MemoryStore(), CollectorRegistry()
    add_tenant(store, concurrent=10)
    for _ in range(2):
        add_run(store)
    claimed(store, lease=RUN_OUT)
    playing = claimed(store)
    store.mark_running(playing.run.id, playing.fence)
    store._runs[playing.run.id].lease_until = store.now() + RUN_OUT
    runs = cast(RunLine, MeteredRecovery(store, ReaperMetrics(registry)))
    theatre = Theatre()

    hour = timedelta(hours=1)
    reconcile(runs, theatre.doorbell, theatre.hints, max_queue=hour, ring_after=hour)
    reconcile(runs, theatre.doorbell, theatre.hints, max_queue=hour, ring_after=hour)

    recovered = "blastdoor_runs_recovered_total"
    assert read(registry, recovered, outcome="none", reason="none", **GVISOR) == 1
    assert read(registry, recovered, outcome="errored", reason="worker_lost", **GVISOR) == 1
