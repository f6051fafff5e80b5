"""What one sweep of a site destroys, leaves alone, and says is gone."""

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from datetime import datetime, timedelta
from typing import Any

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from service.adapters.memory import MemoryHints, MemoryStore
from service.core.boundary import BoundaryKind, BoundaryRef, BoundarySpec
from service.core.controls import Limits, Network
from service.core.errors import BoundaryError, NotYetDestroyed, Unavailable
from service.core.ids import new_run_id
from service.core.lease import LeaseView
from service.core.ports.runs import Claim
from service.core.run import Phase, Run
from tests.contract.store_steps import add_run, add_tenant, bring_to, types_told
from tests.scenes import RUN_OUT, Clock
from workers.boundaries.fake import FakeBoundary, FakeWorld, ResistingBoundary
from workers.reaper import Swept, sweep

INSTALLATION, SITE = "fake", "host-1"
ANOTHERS = "another"


class SiteWorld:
    """One site's platform, its database, and a reaper's pass over both."""

    def __init__(self, *, store: MemoryStore | None = None, boundary: FakeBoundary | None = None) -> None:
        self.clock = Clock()
        self.store = store or MemoryStore(clock=self.clock)
        self.boundary = boundary or FakeBoundary()
        self.world = self.boundary.world
        self.hints = MemoryHints()
        self.off = timedelta()
        """How far the host's clock is from the database's."""
        add_tenant(self.store, concurrent=100)

    def sweep(self) -> Swept:
        return sweep(
            [self.boundary], self.store, self.hints, installation=INSTALLATION, site=SITE,
            host_now=lambda: self.host_now,
        )  # fmt: skip

    @property
    def host_now(self) -> datetime:
        return self.clock.now + self.off

    def run(self, phase: Phase, *, built: bool = True) -> Claim:
        """A run brought to that phase by a worker of this site, and its boundary."""
        add_run(self.store)
        held = bring_to(self.store, phase, site=SITE)
        if built:
            self.build(held.run.id, fence=held.fence)
        return held

    def build(self, run_id: str, *, fence: int, installation: str = INSTALLATION, tenant: str = "acme") -> BoundaryRef:
        ref = BoundaryRef(
            installation=installation,
            kind=BoundaryKind.GVISOR,
            site=SITE,
            tenant=tenant,
            run_id=run_id,
            fence=fence,
            expires_at=(self.clock.now if fence else self.host_now) + timedelta(minutes=1),
        )
        self.world.labels[ref.name] = ref
        self.world.running.add(ref.name)
        return ref

    def shown(self, held: Claim) -> Run:
        return self.store.get_run(held.run.id, None)

    @property
    def standing(self) -> list[tuple[str, int]]:
        return [(ref.run_id, ref.fence) for ref in self.world.labels.values()]


@pytest.fixture(autouse=True)
def logged() -> Iterator[list[MutableMapping[str, Any]]]:
    with structlog.testing.capture_logs() as entries:
        yield entries


@pytest.fixture
def site() -> SiteWorld:
    return SiteWorld()


def test_an_empty_site_has_nothing_to_sweep(site: SiteWorld) -> None:
    assert site.sweep() == Swept(destroyed=(), resisted=(), recorded=0)


@pytest.mark.parametrize("phase", [Phase.PROVISIONING, Phase.RUNNING, Phase.COLLECTING])
def test_a_boundary_whose_worker_acts_on_it_is_not_touched(site: SiteWorld, phase: Phase) -> None:
    held = site.run(phase)

    assert site.sweep() == Swept(destroyed=(), resisted=(), recorded=0)
    assert site.standing == [(held.run.id, held.fence)]
    assert site.shown(held).boundary_destroyed_at is None


@pytest.mark.parametrize("phase", [Phase.PROVISIONING, Phase.RUNNING, Phase.COLLECTING])
def test_the_same_boundary_is_destroyed_and_recorded_once_its_lease_has_run_out(site: SiteWorld, phase: Phase) -> None:
    held = site.run(phase)
    site.clock.now += RUN_OUT

    swept = site.sweep()

    assert [ref.run_id for ref in swept.destroyed] == [held.run.id]
    assert swept.recorded == 1
    assert site.standing == []
    assert site.shown(held).boundary_destroyed_at == site.clock.now
    assert site.hints.given == [("outbox", held.run.id)]


def test_a_finished_runs_boundary_is_destroyed_and_recorded_once(site: SiteWorld) -> None:
    held = site.run(Phase.FINISHED)

    assert site.sweep().recorded == 1
    assert site.sweep() == Swept(destroyed=(), resisted=(), recorded=0)
    assert types_told(site.store, held.run.id).count("boundary.destroyed") == 1


def test_a_stale_fences_boundary_is_destroyed_and_the_live_one_is_not(site: SiteWorld) -> None:
    first = site.run(Phase.PROVISIONING, built=False)
    site.store.requeue(first.run.id, first.fence, why="it did not start")
    site.store.record_destroyed(first.run.id, first.fence)
    second = bring_to(site.store, Phase.RUNNING, site=SITE)
    site.build(second.run.id, fence=second.fence)
    site.build(first.run.id, fence=first.fence)  # by a worker that was asleep

    swept = site.sweep()

    assert [ref.fence for ref in swept.destroyed] == [1]
    assert site.standing == [(second.run.id, 2)]
    assert swept.recorded == 0, "it was known to be gone already"
    assert site.shown(second).boundary_destroyed_at is None


def test_a_requeued_runs_boundary_is_destroyed_and_then_it_can_be_claimed_again(site: SiteWorld) -> None:
    held = site.run(Phase.PROVISIONING)
    site.store.requeue(held.run.id, held.fence, why="it did not start")
    assert site.store.waiting(["gvisor"]) is False

    site.sweep()

    assert site.standing == []
    assert site.store.waiting(["gvisor"]) is True


def test_what_no_run_claims_is_destroyed(site: SiteWorld) -> None:
    ref = site.build(new_run_id(), fence=1)

    assert site.sweep().destroyed == (ref,)


@pytest.mark.parametrize("off", [timedelta(), timedelta(minutes=10), timedelta(minutes=-10)], ids=str)
def test_a_canary_of_a_probe_is_left_alone_until_it_expires_by_the_hosts_clock(site: SiteWorld, off: timedelta) -> None:
    site.off = off
    ref = site.build(new_run_id(), fence=0, tenant="_canary")

    assert site.sweep() == Swept(destroyed=(), resisted=(), recorded=0)
    site.clock.now += timedelta(minutes=1)
    assert site.sweep().destroyed == (ref,)


@pytest.mark.parametrize("phase", [Phase.RUNNING, Phase.FINISHED])
def test_another_installations_mark_is_never_touched(site: SiteWorld, phase: Phase) -> None:
    """Even where the platform lists it, and whatever its run id says."""

    class Careless(FakeBoundary):
        def discover(self) -> Iterator[BoundaryRef]:
            yield from self.world.labels.values()

    site.boundary = Careless(world=site.world)
    held = site.run(phase, built=False)
    foreign = site.build(held.run.id, fence=held.fence, installation=ANOTHERS)
    orphan = site.build(new_run_id(), fence=1, installation=ANOTHERS)
    site.clock.now += RUN_OUT

    assert site.sweep().destroyed == ()
    assert set(site.world.labels.values()) == {foreign, orphan}


def test_the_same_boundaries_with_our_mark_are_destroyed(site: SiteWorld) -> None:
    held = site.run(Phase.FINISHED, built=False)
    ours = site.build(held.run.id, fence=held.fence)
    orphan = site.build(new_run_id(), fence=1)

    assert set(site.sweep().destroyed) == {ours, orphan}


def test_what_was_never_built_or_is_gone_already_is_recorded_as_gone(site: SiteWorld) -> None:
    held = site.run(Phase.RUNNING, built=False)
    assert site.sweep().recorded == 0, "its worker may be about to build it"
    site.clock.now += RUN_OUT

    swept = site.sweep()

    assert (swept.destroyed, swept.recorded) == ((), 1)
    assert site.shown(held).boundary_destroyed_at is not None


def test_what_another_site_was_to_build_is_for_that_site_to_say(site: SiteWorld) -> None:
    held = site.run(Phase.RUNNING, built=False)
    site.clock.now += RUN_OUT

    swept = sweep([site.boundary], site.store, site.hints, installation=INSTALLATION, site="host-2")

    assert swept.recorded == 0
    assert site.shown(held).boundary_destroyed_at is None


@pytest.mark.parametrize("error", [BoundaryError("the platform does not answer"), PermissionError("cgroups")])
def test_where_the_platform_cannot_be_listed_nothing_is_called_absent(
    site: SiteWorld, error: Exception, logged: list[MutableMapping[str, Any]]
) -> None:
    class Blind(FakeBoundary):
        def discover(self) -> Iterator[BoundaryRef]:
            raise error

    held = site.run(Phase.RUNNING, built=False)
    site.clock.now += RUN_OUT
    site.boundary = Blind(world=site.world)

    assert site.sweep().recorded == 0
    assert site.shown(held).boundary_destroyed_at is None
    assert [entry["log_level"] for entry in logged] == ["error"]

    site.boundary = FakeBoundary(world=site.world)
    assert site.sweep().recorded == 1


def test_a_kind_that_this_site_has_no_driver_for_is_not_called_absent(site: SiteWorld) -> None:
    add_run(site.store, boundary="microvm")
    held = bring_to(site.store, Phase.FINISHED, site=SITE, boundaries=("microvm",))

    assert site.sweep().recorded == 0
    assert site.shown(held).boundary_destroyed_at is None


def test_one_kind_that_cannot_be_listed_does_not_keep_another_from_being_swept(site: SiteWorld) -> None:
    class Blind(FakeBoundary):
        @property
        def kind(self) -> BoundaryKind:
            return BoundaryKind.MICROVM

        def discover(self) -> Iterator[BoundaryRef]:
            raise BoundaryError("the platform does not answer")

    orphan = site.build(new_run_id(), fence=1)

    swept = sweep([Blind(), site.boundary], site.store, site.hints, installation=INSTALLATION, site=SITE)

    assert swept.destroyed == (orphan,)


def test_absence_is_concluded_from_a_list_made_after_the_run_was_seen_unattended(site: SiteWorld) -> None:
    """The run is claimed and built between the two looks: nothing is said of its new fence, nor of its old one."""
    held = site.run(Phase.PROVISIONING)
    site.clock.now += RUN_OUT

    class Late(FakeBoundary):
        def discover(self) -> Iterator[BoundaryRef]:
            (overdue,) = site.store.leases()
            assert site.store.recover_requeue(overdue)
            found = list(super().discover())
            yield from found

    site.boundary = Late(world=site.world)

    swept = site.sweep()

    assert [ref.fence for ref in swept.destroyed] == [1]
    assert site.standing == []
    assert types_told(site.store, held.run.id).count("boundary.destroyed") == 1


def test_a_boundary_that_is_built_while_the_world_is_listed_is_not_called_absent(site: SiteWorld) -> None:
    class Claiming(FakeBoundary):
        """A worker claims and builds just after the platform was listed."""

        def discover(self) -> Iterator[BoundaryRef]:
            found = list(super().discover())
            site.run(Phase.RUNNING)
            yield from found

    site.boundary = Claiming(world=site.world)

    assert site.sweep() == Swept(destroyed=(), resisted=(), recorded=0)
    assert len(site.standing) == 1


@pytest.mark.parametrize("error", [NotYetDestroyed("it resists"), OSError("device busy")])
def test_what_resists_is_reported_not_recorded_and_taken_up_by_a_later_sweep(site: SiteWorld, error: Exception) -> None:
    class Resisting(FakeBoundary):
        def destroy(self, ref: BoundaryRef) -> None:
            raise error

    held = site.run(Phase.FINISHED)
    site.boundary = Resisting(world=site.world)

    swept = site.sweep()

    assert ([ref.run_id for ref in swept.resisted], swept.destroyed, swept.recorded) == ([held.run.id], (), 0)
    assert site.shown(held).boundary_destroyed_at is None

    site.boundary = FakeBoundary(world=site.world)
    assert site.sweep().recorded == 1


def test_one_that_resists_does_not_keep_the_others_standing() -> None:
    class Stubborn(ResistingBoundary):
        def destroy(self, ref: BoundaryRef) -> None:
            if ref.run_id == stubborn.run.id:
                super().destroy(ref)
            else:
                FakeBoundary.destroy(self, ref)

    site = SiteWorld(boundary=Stubborn())
    stubborn, other = site.run(Phase.FINISHED), site.run(Phase.FINISHED)

    assert [(len(s.destroyed), len(s.resisted), s.recorded) for s in (site.sweep(), site.sweep(), site.sweep())] == [
        (1, 1, 1), (0, 1, 0), (1, 0, 1)
    ]  # fmt: skip
    assert site.shown(other).boundary_destroyed_at is not None


def test_a_database_that_is_away_stops_the_sweep_before_anything_is_destroyed() -> None:
    class Away(MemoryStore):
        def leases_of(self, run_ids: Collection[str]) -> Mapping[str, LeaseView]:
            raise Unavailable("the database cannot be used at the moment")

    clock = Clock()
    site = SiteWorld(store=Away(clock=clock))
    site.run(Phase.FINISHED)

    with pytest.raises(Unavailable):
        site.sweep()
    assert len(site.standing) == 1


def test_two_sweeps_at_once_destroy_everything_overdue_and_record_each_once() -> None:
    site = SiteWorld()
    overdue = [site.run(Phase.RUNNING) for _ in range(20)]
    orphans = [site.build(new_run_id(), fence=1) for _ in range(20)]
    site.clock.now += RUN_OUT
    live = [site.run(Phase.RUNNING) for _ in range(20)]
    start = threading.Barrier(4)
    swept: list[Swept] = []

    def reap() -> None:
        boundary = FakeBoundary(world=site.world)
        start.wait()
        swept.append(sweep([boundary], site.store, site.hints, installation=INSTALLATION, site=SITE))

    at_once(reap, times=4)

    assert len(swept) == 4, "none of them failed"
    assert sum(one.recorded for one in swept) == len(overdue)
    assert {ref.name for one in swept for ref in one.destroyed} >= {ref.name for ref in orphans}
    assert sorted(site.standing) == sorted((held.run.id, held.fence) for held in live)
    assert all(types_told(site.store, held.run.id).count("boundary.destroyed") == 1 for held in overdue)


def at_once(work: Callable[[], None], *, times: int) -> None:
    threads = [threading.Thread(target=work) for _ in range(times)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


RUNS = st.lists(
    st.tuples(
        st.sampled_from([Phase.PROVISIONING, Phase.RUNNING, Phase.COLLECTING, Phase.FINISHED]),
        st.booleans(),
        st.booleans(),
    ),
    max_size=8,
)


@settings(deadline=None, max_examples=60)
@given(RUNS)
def test_whatever_the_world_looks_like_a_sweep_leaves_exactly_what_is_acted_on(
    runs: list[tuple[Phase, bool, bool]],
) -> None:
    """Each run: its phase, whether it was built, whether its worker is still there."""
    site = SiteWorld()
    lost = [site.run(phase, built=built) for phase, built, lives in runs if not lives]
    site.clock.now += RUN_OUT
    lives = [(site.run(phase, built=built), phase, built) for phase, built, lives in runs if lives]

    site.sweep()

    acted_on = [(held.run.id, held.fence) for held, phase, built in lives if built and phase is not Phase.FINISHED]
    assert sorted(site.standing) == sorted(acted_on)
    assert all(site.shown(held).boundary_destroyed_at is not None for held in lost)
    for held, phase, _ in lives:
        assert (site.shown(held).boundary_destroyed_at is not None) is (phase is Phase.FINISHED)
    assert site.sweep() == Swept(destroyed=(), resisted=(), recorded=0)


def test_a_world_is_listed_by_what_really_stands_there(site: SiteWorld) -> None:
    """The positive control of the fake: what `open` made and left is what the sweep finds."""
    ref = site.build(new_run_id(), fence=1)
    site.boundary.destroy(ref)
    spec = BoundarySpec(limits=Limits(), network=Network())
    with site.boundary.open(spec, ref, cancelled=threading.Event()):
        assert site.sweep().destroyed == (ref,)

    assert site.world == FakeWorld()
