"""What a reaper writes down of its site, what it quarantines, and what it does on operators' orders."""

import threading
from collections.abc import Iterator, MutableMapping
from datetime import timedelta
from typing import Any

import pytest
import structlog

from service.core.boundary import BoundaryKind, BoundaryRef, tenant_hash
from service.core.cleanup import ActionKind, BoundaryState, PlannedAction, Scope, plan_actions, state_of
from service.core.errors import BoundaryError, NotYetDestroyed
from service.core.ids import new_run_id
from service.core.lease import LeaseView
from service.core.run import Phase
from tests.contract.store_steps import types_told
from tests.scenes import RUN_OUT, Clock
from tests.unit.test_reaper import ANOTHERS, INSTALLATION, SITE, SiteWorld, at_once
from workers.boundaries.fake import FakeBoundary
from workers.reaper import Reaper, sweep, watch_sites


@pytest.fixture(autouse=True)
def logged() -> Iterator[list[MutableMapping[str, Any]]]:
    with structlog.testing.capture_logs() as entries:
        yield entries


@pytest.fixture
def site() -> SiteWorld:
    return SiteWorld()


def states(site: SiteWorld) -> dict[str, str]:
    return {row.ref.name: str(row.state) for row in site.store.inventory(SITE)}


def test_each_pass_writes_down_what_it_found_and_drops_what_it_destroyed(site: SiteWorld) -> None:
    held = site.run(Phase.RUNNING)
    name = next(iter(site.world.labels))
    orphan = site.build(new_run_id(), fence=1)
    reaper = Reaper([site.boundary], site.store, site.hints, installation=INSTALLATION, site=SITE)

    reaper.look()
    assert states(site) == {name: "live", orphan.name: "orphan"}
    assert len(site.standing) == 2, "looking destroys nothing"
    reaper.sweep()
    assert states(site) == {name: "live"}
    site.clock.now += RUN_OUT
    reaper.look()
    assert states(site) == {name: "overdue"}
    assert site.shown(held).phase is Phase.RUNNING


@pytest.mark.parametrize(
    ("phase", "fence", "later", "state"),
    [
        (Phase.RUNNING, 1, timedelta(0), BoundaryState.LIVE),
        (Phase.RUNNING, 2, timedelta(0), BoundaryState.ORPHAN),
        (Phase.RUNNING, 1, RUN_OUT, BoundaryState.OVERDUE),
        (Phase.QUEUED, 1, timedelta(0), BoundaryState.ORPHAN),
        (Phase.FINISHED, 1, timedelta(0), BoundaryState.ORPHAN),
        (None, 1, timedelta(0), BoundaryState.ORPHAN),
        (None, 0, timedelta(0), BoundaryState.LIVE),
        (None, 0, timedelta(minutes=10), BoundaryState.ORPHAN),
    ],
)
@pytest.mark.parametrize("resists", [False, True])
def test_the_state_of_a_boundary(
    phase: Phase | None, fence: int, later: timedelta, state: BoundaryState, resists: bool
) -> None:
    clock = Clock()
    ref = BoundaryRef(
        installation=INSTALLATION, kind=BoundaryKind.GVISOR, site=SITE, tenant="acme", run_id=new_run_id(), fence=fence,
        expires_at=clock.now + timedelta(minutes=5),
    )  # fmt: skip
    view = phase and LeaseView(
        run_id=ref.run_id, phase=phase, attempt=1, fence=1, created_at=clock.now,
        lease_until=clock.now + timedelta(seconds=30) if phase is Phase.RUNNING else None,
    )  # fmt: skip

    found = state_of(ref, view or None, now=clock.now + later, resists=resists)

    unwanted = BoundaryState.QUARANTINED if resists else state
    assert found is (BoundaryState.LIVE if state is BoundaryState.LIVE else unwanted)


def test_a_boundary_whose_own_lifetime_is_over_is_overdue_though_its_lease_is_renewed() -> None:
    clock = Clock()
    later = clock.now + timedelta(minutes=5)
    ref = BoundaryRef(
        installation=INSTALLATION, kind=BoundaryKind.GVISOR, site=SITE, tenant="acme", run_id=new_run_id(), fence=1,
        expires_at=later,
    )  # fmt: skip
    view = LeaseView(
        run_id=ref.run_id, phase=Phase.RUNNING, attempt=1, fence=1, created_at=clock.now, lease_until=later + RUN_OUT
    )

    assert state_of(ref, view, now=later - RUN_OUT) is BoundaryState.LIVE
    assert state_of(ref, view, now=later) is BoundaryState.OVERDUE
    assert state_of(ref.model_copy(update={"tenant": ""}), view, now=later) is BoundaryState.LIVE, "it lost its label"


class Stubborn(FakeBoundary):
    """Resists until it is told not to."""

    gives_way = False

    def destroy(self, ref: BoundaryRef) -> None:
        if not self.gives_way:
            raise NotYetDestroyed(f"{ref.name} resists")
        super().destroy(ref)


def test_what_resists_past_its_deadline_is_quarantined_said_once_and_destroyed_at_last(
    logged: list[MutableMapping[str, Any]],
) -> None:
    stubborn = Stubborn()
    site = SiteWorld(boundary=stubborn)
    held = site.run(Phase.FINISHED)
    counted: list[str] = []
    reaper = Reaper(
        [stubborn], site.store, site.hints, installation=INSTALLATION, site=SITE,
        on_quarantine=lambda: counted.append("one"),
    )  # fmt: skip
    (name,) = site.world.labels

    assert reaper.sweep().quarantined == ()
    site.clock.now += timedelta(seconds=29)
    assert reaper.sweep().quarantined == ()
    assert states(site) == {name: "orphan"}
    site.clock.now += timedelta(seconds=1)
    assert [ref.name for ref in reaper.sweep().quarantined] == [name]
    assert reaper.sweep().recorded == 0
    assert states(site) == {name: "quarantined"}
    assert types_told(site.store, held.run.id)[-1] == "boundary.quarantined"
    assert [entry["event"] for entry in logged].count("boundary quarantined") == len(counted) == 1

    stubborn.gives_way = True
    assert reaper.sweep().recorded == 1
    assert states(site) == {}
    told_of = types_told(site.store, held.run.id)
    assert told_of[-2:] == ["boundary.quarantined", "boundary.destroyed"]
    assert told_of.count("boundary.quarantined") == 1


def test_an_orphan_without_a_run_is_quarantined_too_and_there_is_nobody_to_tell() -> None:
    site = SiteWorld(boundary=Stubborn())
    ref = site.build(new_run_id(), fence=1)
    reaper = Reaper(
        [site.boundary], site.store, site.hints, installation=INSTALLATION, site=SITE, quarantine_after=timedelta(0)
    )

    assert reaper.sweep().quarantined == (ref,)
    assert states(site) == {ref.name: "quarantined"}
    assert site.hints.given == []


def test_two_reapers_quarantine_the_same_boundary_once() -> None:
    site = SiteWorld(boundary=Stubborn())
    held = site.run(Phase.FINISHED)
    start = threading.Barrier(4)

    def reap() -> None:
        start.wait()
        sweep(
            [site.boundary], site.store, site.hints, installation=INSTALLATION, site=SITE, quarantine_after=timedelta(0)
        )

    at_once(reap, times=4)

    assert types_told(site.store, held.run.id).count("boundary.quarantined") == 1


def test_many_that_resist_are_tried_side_by_side() -> None:
    """Each waits for all eight to be there: one after the other would never come through."""
    together = threading.Barrier(8)

    class Slow(FakeBoundary):
        def destroy(self, ref: BoundaryRef) -> None:
            together.wait(20)
            super().destroy(ref)

    site = SiteWorld(boundary=Slow())
    refs = [site.build(new_run_id(), fence=1) for _ in range(8)]

    assert set(site.sweep().destroyed) == set(refs)


def test_a_silent_sites_boundaries_are_quarantined_once_by_another_sites_reaper(site: SiteWorld) -> None:
    lost = site.run(Phase.RUNNING)
    site.sweep()
    site.clock.now += timedelta(minutes=4)
    lives = site.run(Phase.RUNNING)
    five: dict[str, Any] = {"own": "host-2", "silent_after": timedelta(minutes=5)}
    assert watch_sites(site.store, site.hints, **five) == []
    site.clock.now += timedelta(minutes=1, seconds=1)
    with site.store._lock:  # the worker of the second goes on
        site.store._runs[lives.run.id].lease_until = site.clock.now + timedelta(seconds=30)

    assert watch_sites(site.store, site.hints, **five) == [SITE]
    assert watch_sites(site.store, site.hints, own=SITE, silent_after=timedelta(minutes=5)) == [], "it is here itself"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site.store, "record_quarantined", lambda *_: pytest.fail("what was said is not written again"))
        watch_sites(site.store, site.hints, **five)

    assert types_told(site.store, lost.run.id).count("boundary.quarantined") == 1
    assert "boundary.quarantined" not in types_told(site.store, lives.run.id), "somebody acts on it"
    site.sweep()
    assert watch_sites(site.store, site.hints, **five) == [], "it has answered"
    assert types_told(site.store, lost.run.id)[-1] == "boundary.destroyed"


def test_an_order_about_another_installations_boundary_touches_nothing(site: SiteWorld) -> None:
    foreign = site.build(new_run_id(), fence=1, installation=ANOTHERS)
    line = PlannedAction(ref=foreign, action=ActionKind.DESTROY, why="")
    plan = site.store.apply_plan(site.store.store_plan([line], asked_by="key_1", force=True).id)
    reaper = Reaper([site.boundary], site.store, site.hints, installation=INSTALLATION, site=SITE)

    assert reaper.obey() == 1
    assert str(site.store.get_plan(plan.id).actions[0].result).startswith("refused")
    assert site.standing == [(foreign.run_id, 1)]


class Blind(FakeBoundary):
    """Its platform does not answer, for as long as it is told."""

    sees = False

    def discover(self) -> Iterator[BoundaryRef]:
        if not self.sees:
            raise BoundaryError("the platform does not answer")
        return super().discover()


def test_what_a_platform_has_that_does_not_answer_for_long_is_quarantined_until_it_does(
    logged: list[MutableMapping[str, Any]],
) -> None:
    blind, counted = Blind(), list[str]()
    site = SiteWorld(boundary=blind)
    reaper = Reaper(
        [blind], site.store, site.hints, installation=INSTALLATION, site=SITE, silent_after=timedelta(minutes=5),
        on_quarantine=lambda: counted.append("one"),
    )  # fmt: skip
    lost, (name,) = site.run(Phase.RUNNING), tuple(site.world.labels)
    blind.sees = True
    assert reaper.sweep().destroyed == ()
    blind.sees = False

    site.clock.now += RUN_OUT
    assert reaper.sweep().quarantined == ()
    site.clock.now += timedelta(minutes=4, seconds=59)
    assert reaper.sweep().quarantined == ()
    assert states(site) == {name: "live"}, "as it was when it was last seen"
    site.clock.now += timedelta(seconds=1)
    assert [ref.name for ref in reaper.sweep().quarantined] == [name]
    assert reaper.sweep().quarantined == (), "it is said once"
    assert states(site) == {name: "quarantined"}
    assert types_told(site.store, lost.run.id).count("boundary.quarantined") == len(counted) == 1
    assert {entry["boundary"] for entry in logged if "is quarantined" in entry["event"]} == {name}
    assert site.standing, "nothing was destroyed blindly, and nothing is called gone"

    blind.sees = True
    assert [ref.name for ref in reaper.sweep().destroyed] == [name]
    assert states(site) == {}
    assert types_told(site.store, lost.run.id)[-1] == "boundary.destroyed"


def test_a_tenant_of_whom_only_a_hash_was_read_back_is_called_by_its_name_where_the_run_is_known(
    site: SiteWorld,
) -> None:
    held = site.run(Phase.RUNNING, built=False)
    hashed = tenant_hash(INSTALLATION, "acme")
    known = site.build(held.run.id, fence=held.fence, tenant=hashed)
    orphan = site.build(new_run_id(), fence=1, tenant=hashed)
    another = site.build(new_run_id(), fence=1, tenant=tenant_hash(INSTALLATION, "globex"))
    liar = site.build(held.run.id, fence=held.fence + 1, tenant=tenant_hash(INSTALLATION, "globex"))
    Reaper([site.boundary], site.store, site.hints, installation=INSTALLATION, site=SITE).look()

    rows = {row.ref.name: row for row in site.store.inventory(SITE)}
    assert {name: row.ref.tenant for name, row in rows.items()} == {
        known.name: "acme",
        orphan.name: hashed,  # its run is in no database
        another.name: another.tenant,
        liar.name: liar.tenant,  # a label that contradicts the database is shown as it is
    }
    planned = plan_actions(rows.values(), Scope(tenant="acme"), now=site.clock.now, force=True)
    assert {line.ref.name for line in planned} == {known.name, orphan.name}


def test_where_the_platform_cannot_be_listed_an_order_waits() -> None:
    site = SiteWorld()
    ref = site.build(new_run_id(), fence=1)
    line = PlannedAction(ref=ref, action=ActionKind.DESTROY, why="")
    plan = site.store.apply_plan(site.store.store_plan([line], asked_by="key_1", force=False).id)
    blind = Reaper([Blind(world=site.world)], site.store, site.hints, installation=INSTALLATION, site=SITE)
    sees = Reaper([site.boundary], site.store, site.hints, installation=INSTALLATION, site=SITE)

    assert blind.obey() == 0
    assert site.store.get_plan(plan.id).actions[0].result is None
    assert sees.obey() == 1
    assert site.store.get_plan(plan.id).actions[0].result == "destroyed"


def test_two_reapers_obey_the_same_order_once(site: SiteWorld) -> None:
    lines = [PlannedAction(ref=site.build(new_run_id(), fence=1), action=ActionKind.DESTROY, why="") for _ in range(10)]
    plan = site.store.apply_plan(site.store.store_plan(lines, asked_by="key_1", force=False).id)
    start, concluded = threading.Barrier(3), list[int]()

    def obey() -> None:
        reaper = Reaper([site.boundary], site.store, site.hints, installation=INSTALLATION, site=SITE)
        start.wait()
        concluded.append(reaper.obey())

    at_once(obey, times=3)

    assert sum(concluded) == 10
    assert site.standing == []
    assert {line.result for line in site.store.get_plan(plan.id).actions} == {"destroyed"}
