"""Clean-up with real workers and reapers, as processes, over real sandboxes: orders as the API gives them.

The site and what is checked after each test are those of `test_worker_processes`.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta

import pytest

from service.adapters.memory import MemoryHints
from service.core.boundary import BoundaryKind, BoundaryRef
from service.core.cleanup import BoundaryState, CleanupPlan, Scope
from service.core.ids import new_run_id
from service.core.run import Outcome, Phase, Reason, Run
from service.usecases.cleanup import apply_plan, have_looked, make_plan
from tests.contract.store_steps import types_told
from tests.integration.test_worker_processes import Process, Site, eventually, installed, site, sleeps, steps
from tests.sandboxes import Never, make_spec, new_installation, traces
from workers.boundaries.gvisor.driver import GvisorBoundary, GvisorHost
from workers.boundaries.gvisor.places import Places
from workers.runtimes.store import RuntimeStore

__all__ = ["installed", "site"]  # fixtures
SILENT = timedelta(minutes=5)
GONE_WITHIN_S, SLOW_S = 5.0, 5.0

pytestmark = pytest.mark.timeout(240)


def unclaimed(site: Site, installation: str) -> BoundaryRef:
    return BoundaryRef(
        installation=installation, kind=BoundaryKind.GVISOR, site="here", tenant="acme", run_id=new_run_id(), fence=1,
        expires_at=site.store.now() + timedelta(minutes=10),
    )  # fmt: skip


def labelled(site: Site) -> BoundaryRef:
    """What a worker leaves that dies before it has made anything but the label: it is there at once."""
    ref = unclaimed(site, site.installation)
    Places(runtime_dir=site.runtime_dir, installation=site.installation, site="here").place(ref.name).make(ref)
    return ref


@contextmanager
def standing(site: Site, *, installation: str | None = None) -> Iterator[BoundaryRef]:
    """What a worker leaves that dies when its guest has ended: a real sandbox's directory, mount and control groups,
    and no run that claims them. (A guest never outlives its worker, and a worker that lives holds the mount.)"""
    host = GvisorHost(
        installation=installation or site.installation, site="here", runtime_dir=site.runtime_dir,
        runtimes=RuntimeStore(site.directory / "state" / "runtimes"),
    )  # fmt: skip
    boundary = GvisorBoundary(host)
    ref = unclaimed(site, host.installation)
    try:
        with boundary.open(make_spec(), ref, cancelled=Never()):
            pass
        assert left_of(site, ref)
        yield ref
    finally:
        boundary.destroy(ref)
        boundary.close()


def left_of(site: Site, ref: BoundaryRef) -> list[str]:
    return [trace for trace in traces(ref.installation, site.runtime_dir) if ref.name in trace]


def state(site: Site, name: str) -> str | None:
    return next((str(row.state) for row in site.store.inventory() if row.ref.name == name), None)


def patient(site: Site, **environment: str) -> Process:
    """A reaper that sweeps once and then only does what it is told."""
    since = site.store.now()
    reaper = site.start("reaper", BLASTDOOR_HOUSEKEEPING_S="600", **environment)
    eventually(lambda: any(row.last_seen_at > since for row in site.store.sites()), why=site.told)
    return reaper


def plan(site: Site, scope: Scope, *, force: bool = False) -> CleanupPlan:
    since = site.store.ask_to_look()
    eventually(lambda: have_looked(site.store, since=since, silent_after=SILENT), why=site.told)
    return make_plan(site.store, scope=scope, force=force, asked_by="key_test", silent_after=SILENT)


def applied(site: Site, shown: CleanupPlan, *, seconds: float = 60.0) -> CleanupPlan:
    apply_plan(site.store, plan_id=shown.id, who="key_test", runs=site.store, hints=MemoryHints())
    eventually(lambda: site.store.get_plan(shown.id).done_at is not None, seconds=seconds, why=site.told)
    return site.store.get_plan(shown.id)


def results(plan: CleanupPlan) -> list[tuple[str, str, str | None]]:
    return [(line.ref.run_id, str(line.action), line.result) for line in plan.actions]


def test_a_live_run_is_refused_and_with_force_it_is_killed_and_nothing_of_it_is_left(site: Site) -> None:
    assert site.worker.running
    reaper = patient(site)
    run = site.submit(sleeps())
    site.wait(run, until=Phase.RUNNING)
    eventually(lambda: site.guests(), why=site.told)
    scope = Scope(run=run.id)

    refused = applied(site, plan(site, scope))
    assert results(refused) == [(run.id, "refuse", "refused")]
    time.sleep(1.0)
    assert site.guests(), "it plays on"
    assert site.shown(run).phase is Phase.RUNNING

    killed = applied(site, plan(site, scope, force=True), seconds=30)

    assert results(killed) == [(run.id, "kill", "destroyed")]
    assert not site.guests()
    done = site.wait(run, seconds=20)
    assert (done.outcome, done.reason) == (Outcome.CANCELLED, Reason.CANCELLED_BY_OPERATOR)
    assert left_of(site, killed.actions[0].ref) == []
    site.wait_destroyed(run)
    reaper.stop()


def test_an_orphan_stands_until_the_plan_is_applied_and_is_observed_gone_within_5_s(site: Site) -> None:
    reaper = patient(site)
    with standing(site) as ref, standing(site) as spared:
        shown = plan(site, Scope(boundary=ref.name))
        assert results(shown) == [(ref.run_id, "destroy", None)]
        assert {state(site, ref.name), state(site, spared.name)} == {"orphan"}
        time.sleep(1.0)
        assert left_of(site, ref), "a plan that was shown does nothing"

        began = time.monotonic()
        done = applied(site, shown)
        assert time.monotonic() - began < GONE_WITHIN_S + SLOW_S

        assert results(done) == [(ref.run_id, "destroy", "destroyed")]
        assert left_of(site, ref) == []
        assert left_of(site, spared), "the plan was not about it"
        assert state(site, ref.name) is None
    reaper.stop()


def test_two_reapers_sweep_an_orphan_and_leave_what_another_installation_has_here(site: Site) -> None:
    other = new_installation()
    with standing(site, installation=other) as foreign, standing(site) as ours:
        reapers = [site.start("reaper") for _ in range(2)]
        eventually(lambda: not left_of(site, ours), why=site.told)
        looked = site.store.sites()[0].last_seen_at
        eventually(lambda: site.store.sites()[0].last_seen_at > looked, why=site.told)

        assert left_of(site, foreign)
        assert state(site, foreign.name) is None, "it is not even listed"
        assert all(reaper.running for reaper in reapers)
    for reaper in reapers:
        assert reaper.stop() == 0
    (site.runtime_dir / other).rmdir()


def test_what_resists_is_quarantined_does_not_hold_up_the_others_and_goes_at_last(site: Site) -> None:
    """A worker that stands still keeps a descriptor in its run's tmpfs: the guest can be killed, the mount cannot be
    undone until the worker goes on."""
    worker = site.worker
    reaper = site.start("reaper", BLASTDOOR_QUARANTINE_AFTER_S="3")
    run = site.submit(steps("sleep 2", "echo late"))
    site.wait(run, until=Phase.RUNNING)
    eventually(lambda: site.guests(), why=site.told)
    (child,) = worker.pool()

    os.kill(child, signal.SIGSTOP)
    try:
        done = site.wait(run)
        assert (done.outcome, done.reason) == (Outcome.ERRORED, Reason.WORKER_LOST)
        eventually(lambda: quarantined_events(site, run) == 1, why=site.told)
        (row,) = site.store.inventory()
        assert (row.ref.run_id, row.state) == (run.id, BoundaryState.QUARANTINED)
        orphan = labelled(site)
        took = eventually(lambda: not left_of(site, orphan), why=site.told)
        assert took < GONE_WITHIN_S + SLOW_S, "one that resists takes a moment of each sweep, and not more"
        assert site.shown(run).boundary_destroyed_at is None
        again = applied(site, plan(site, Scope(run=run.id)))
        assert str(again.actions[0].result).startswith("quarantined: ")
    finally:
        os.kill(child, signal.SIGCONT)

    site.wait_destroyed(run)
    eventually(lambda: not site.store.inventory(), why=site.told)
    assert types_told(site.store, run.id)[-2:] == ["boundary.quarantined", "boundary.destroyed"]
    assert quarantined_events(site, run) == 1
    reaper.stop()


def quarantined_events(site: Site, run: Run) -> int:
    return types_told(site.store, run.id).count("boundary.quarantined")


def test_a_drained_worker_finishes_what_it_plays_and_leaves_the_rest_to_others(site: Site) -> None:
    first = site.worker
    with ExitStack() as stack:
        run = site.submit(steps("sleep 3"))
        site.wait(run, until=Phase.RUNNING)
        site.store.drain_worker(first.id)
        eventually(lambda: "draining" in first.events(), why=site.told)
        waits = site.submit(steps("true"))

        assert site.wait(run).outcome is Outcome.PASSED
        eventually(lambda: "drained" in first.events(), why=site.told)
        assert site.store.playing() == {}
        assert site.shown(waits).phase is Phase.QUEUED, "nobody else is there"
        assert first.running

        second = site.start("worker")
        stack.callback(second.stop)
        reaper = site.reaper  # rings again for what waits
        assert reaper.running
        assert site.wait(waits).outcome is Outcome.PASSED
        assert first.id not in json.dumps([dict(site.store.playing())])
    first.stop()
