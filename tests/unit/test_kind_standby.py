"""Standby clusters are kept, handed out once, and ended. Clusters here are directories; tests/cluster has real ones."""

import multiprocessing
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from service.core.boundary import BoundaryRef, Cancellation
from service.core.errors import NotYetDestroyed, ProvisionFailed
from tests.unit.test_kind_places import new_ref
from workers.boundaries.cluster.kind import KindHost, KindProvisioner
from workers.boundaries.cluster.kind_render import STANDBY
from workers.boundaries.cluster.provisioners import NoRoom, Tell
from workers.boundaries.cluster.standby import LIFETIME, Standby, Standing
from workers.proc import ProcessFailed

START = datetime(2026, 1, 2, tzinfo=UTC)


class Never:
    def is_set(self) -> bool:
        return False


class PaperProvisioner(KindProvisioner):
    """Makes directories where there would be clusters."""

    def __init__(self, state: Path, *, installation: str = "inst0") -> None:
        super().__init__(KindHost(installation=installation, site="here", state=state, node_image="node"))
        self.made: list[BoundaryRef] = []
        self.broken: set[str] = set()
        self.resisting = self.failing = False
        self.room = 9
        self.image: str | None = "sha256:1"

    def create(self, ref: BoundaryRef, *, cancelled: Cancellation, tell: Tell) -> Path:
        if self.failing:
            raise ProvisionFailed("no")
        if not self.has_room():
            raise NoRoom("no more are allowed at once")
        self.places.place(ref.name).make(ref)
        self.made.append(ref)
        place = self.places.place(ref.name)
        place.kubeconfig.write_text("kubeconfig")
        return place.kubeconfig

    def clear(self, name: str) -> None:
        if self.resisting:
            raise NotYetDestroyed(name)
        self.places.place(name).remove()

    def discover(self) -> Iterator[BoundaryRef]:
        return iter(self._as_claimed(ref) for ref in self.made if self.places.place(ref.name).exists)

    def has_room(self) -> bool:
        return len(self.places.all()) < self.room

    def image_id(self) -> str | None:
        return self.image

    def answers(self, kubeconfig: Path) -> bool:
        return kubeconfig.parent.name not in self.broken


class World:
    """A host with its clock."""

    def __init__(self, state: Path, *, wanted: int = 2) -> None:
        self.now = START
        self.clusters = PaperProvisioner(state)
        self.prepared: list[Path] = []
        self.standby = self.keeper(wanted)

    def keeper(self, wanted: int, *, made_of: str = "") -> Standby:
        return Standby(self.clusters, wanted=wanted, prepare=self.prepare, made_of=made_of, now=lambda: self.now)

    def prepare(self, kubeconfig: Path, cancelled: Cancellation) -> None:
        self.prepared.append(kubeconfig)

    def keep(self, times: int = 1) -> Standing:
        for _ in range(times):
            self.standby.keep(cancelled=Never())
        return self.standby.standing()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "state")


def counts(standing: Standing) -> tuple[int, int, int, int]:
    return standing.ready, standing.claimed, standing.expired, standing.failed


def test_what_is_missing_is_made_one_at_a_time_and_no_more_than_is_wanted(world: World) -> None:
    assert [world.keep().ready for _ in range(4)] == [1, 2, 2, 2]
    assert [place.parent.name for place in world.prepared] == [ref.name for ref in world.clusters.made]


def test_a_standby_cluster_is_a_boundary_of_no_tenant_that_ends_by_itself(world: World) -> None:
    world.keep()
    (ref,) = world.clusters.discover()
    assert (ref.tenant, ref.fence, ref.expires_at, ref.created_at) == (STANDBY, 0, START + LIFETIME, START)


def test_a_claimed_cluster_is_the_runs_and_another_is_made_in_its_place(world: World) -> None:
    world.keep()
    run = new_ref()
    kubeconfig = world.standby.claim(run)
    assert kubeconfig == world.prepared[0]
    assert list(world.clusters.discover()) == [run], "it is found under the run's reference from then on"
    assert world.standby.claim(new_ref()) is None
    assert counts(world.keep()) == (1, 1, 0, 0)
    assert kubeconfig.exists(), "what is claimed is not the keeper's any more"
    world.clusters.destroy(run)
    assert not kubeconfig.parent.exists()


def test_it_is_said_of_each_whether_it_is_being_made_ready_or_claimed(world: World) -> None:
    assert world.standby.states() == {}, "not even a directory"
    world.keep()
    (made,) = world.clusters.made
    assert world.standby.states() == {made.name: "ready"}
    half = new_ref().model_copy(update={"tenant": STANDBY, "fence": 0})
    world.clusters.create(half, cancelled=Never(), tell=lambda _: None)
    own = new_ref()
    world.clusters.create(own, cancelled=Never(), tell=lambda _: None)
    assert world.standby.states() == {made.name: "ready", half.name: "being_made"}, "a run's own is none"
    run = new_ref()
    assert world.standby.claim(run)
    assert world.standby.states() == {made.name: "claimed", run.name: "claimed", half.name: "being_made"}
    world.clusters.resisting = True
    world.keep()
    assert half.name not in world.standby.states(), "it is being ended, as one that was left half-made"


def test_the_one_that_ends_first_is_handed_out_first(world: World) -> None:
    world.keep()
    world.now += timedelta(minutes=10)
    world.keep()
    first, second = world.clusters.made
    assert [world.standby.claim(new_ref()), world.standby.claim(new_ref())] == [
        world.clusters.places.place(ref.name).kubeconfig for ref in (first, second)
    ]


def test_processes_that_race_for_one_cluster_get_one_between_them(world: World) -> None:
    world.standby = world.keeper(1)
    forked = multiprocessing.get_context("fork")
    for _ in range(5):
        world.keep()
        together, claimed = forked.Barrier(4), forked.Queue()

        def race(together: Any = together, claimed: Any = claimed) -> None:
            together.wait()
            claimed.put(world.standby.claim(new_ref()) is not None)

        racing = [forked.Process(target=race) for _ in range(4)]
        for process in racing:
            process.start()
        assert sorted(claimed.get(timeout=30) for _ in racing) == [False, False, False, True]
        for process in racing:
            process.join()
    assert world.standby.standing().claimed == 5


def test_too_old_a_cluster_is_handed_to_nobody_and_replaced(world: World) -> None:
    world.standby = world.keeper(1)
    world.keep()
    world.now += LIFETIME - timedelta(minutes=1)
    assert world.standby.claim(new_ref()) is None, "a minute before its end"
    assert counts(world.keep()) == (1, 0, 1, 0)
    assert len(world.clusters.made) == 2
    assert world.standby.claim(new_ref()) is not None, "the control: the new one is"


def test_one_that_stopped_answering_is_replaced_and_no_claim_gets_it(world: World) -> None:
    world.standby = world.keeper(1)
    world.keep()
    world.clusters.broken.add(world.clusters.made[0].name)
    assert counts(world.keep()) == (1, 0, 0, 1)
    world.clusters.broken.add(world.clusters.made[1].name)
    run = new_ref()
    assert world.standby.claim(run) is None
    assert list(world.clusters.discover()) == []
    assert counts(world.keep()) == (1, 0, 0, 2)


def test_what_a_keeper_that_died_left_half_made_is_ended(world: World) -> None:
    ref = new_ref(tenant=STANDBY, fence=0).model_copy(update={"expires_at": START + LIFETIME})
    world.clusters.places.make()
    world.clusters.create(ref, cancelled=Never(), tell=print)
    assert (world.standby.standing().ready, world.standby.standing().being_made) == (0, 1)
    assert world.standby.claim(new_ref()) is None, "it was not prepared"
    assert counts(world.keep()) == (1, 0, 0, 1)
    assert not world.clusters.places.place(ref.name).exists


def test_while_one_process_keeps_them_another_does_nothing(world: World) -> None:
    world.clusters.places.make()
    with world.clusters.places.locked("standby"):
        assert world.keep().ready == 0
    assert world.keep().ready == 1


def test_clusters_that_are_made_of_something_else_now_are_replaced(world: World) -> None:
    world.standby = world.keeper(1, made_of="lock-down 1")
    world.keep()
    for change in ("made_of", "image"):
        if change == "image":
            world.clusters.image = "sha256:2"
        else:
            world.standby = world.keeper(1, made_of="lock-down 2")
        before = len(world.clusters.made)
        world.keep(3)
        assert len(world.clusters.made) == before + 1, change
        assert len(world.clusters.places.all()) == 1


def test_a_run_gets_no_cluster_that_is_made_of_something_else_than_now(world: World) -> None:
    world.standby = world.keeper(1, made_of="lock-down 1")
    world.keep()
    assert world.keeper(1, made_of="lock-down 2").claim(new_ref()) is None
    for image in ("sha256:2", None):
        world.clusters.image = image
        assert world.standby.claim(new_ref()) is None, image
    world.clusters.image = "sha256:1"
    assert world.standby.standing().ready == 1, "it is left to whoever keeps them"
    assert world.standby.claim(new_ref()), "the control"


def test_those_that_are_too_many_are_ended_but_not_what_a_run_has(world: World) -> None:
    world.keep(2)
    run = new_ref()
    assert world.standby.claim(run)
    world.standby = world.keeper(0)
    assert world.keep().ready == 0
    assert list(world.clusters.discover()) == [run]


def test_a_place_is_left_to_runs_and_an_absent_image_is_no_reason_to_end_any(world: World) -> None:
    world.clusters.room = 1
    assert counts(world.keep(3)) == (1, 0, 0, 0)
    world.clusters.image = None
    assert counts(world.keep(2)) == (1, 0, 0, 0)


def test_after_a_failure_it_is_not_tried_again_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.clusters.failing = True
    assert counts(world.keep(5)) == (0, 0, 0, 1)
    world.clusters.failing = False
    assert world.keep().ready == 0
    monkeypatch.setattr("workers.boundaries.cluster.standby.time.monotonic", lambda: 10.0**9)
    assert world.keep().ready == 1


def test_one_that_is_being_prepared_when_nobody_keeps_them_any_more_is_given_up_and_no_failure(world: World) -> None:
    stop = threading.Event()

    def prepare(kubeconfig: Path, cancelled: Cancellation) -> None:
        stop.set()
        if cancelled.is_set():
            raise ProvisionFailed("cancelled while the cluster's nodes got ready")

    world.standby = Standby(world.clusters, wanted=1, prepare=prepare, now=lambda: world.now)
    world.standby.keep(cancelled=stop)
    assert counts(world.standby.standing()) == (0, 0, 0, 0)
    assert list(world.clusters.discover()) == []


def test_one_that_cannot_be_prepared_does_not_count_and_is_gone(world: World) -> None:
    def prepare(kubeconfig: Path, cancelled: Cancellation) -> None:
        raise ProcessFailed("no lock-down")

    world.standby = Standby(world.clusters, wanted=1, prepare=prepare, now=lambda: world.now)
    assert counts(world.keep()) == (0, 0, 0, 1)
    assert list(world.clusters.discover()) == []


def test_one_that_resists_its_end_is_expired_for_the_reaper_and_nobodys(world: World) -> None:
    world.standby = world.keeper(1)
    world.keep()
    world.clusters.broken.add(world.clusters.made[0].name)
    world.clusters.resisting = True
    world.keep()
    left = [ref for ref in world.clusters.discover() if ref.expires_at <= world.now]
    assert [ref.name for ref in left] == [world.clusters.made[0].name]
    world.clusters.resisting = False
    world.clusters.destroy(left[0])
    assert left[0].name not in [ref.name for ref in world.clusters.discover()]


def test_ending_a_standby_cluster_that_a_run_got_meanwhile_ends_nothing(world: World) -> None:
    world.keep()
    (unclaimed,) = world.clusters.discover()
    run = new_ref()
    kubeconfig = world.standby.claim(run)
    world.clusters.destroy(unclaimed)
    assert kubeconfig is not None
    assert kubeconfig.exists()
    world.clusters.destroy(run.model_copy(update={"installation": "other"}))
    assert kubeconfig.exists(), "nor does another installation's run of that name"
    world.clusters.destroy(run)
    assert not kubeconfig.exists(), "the control"


def test_no_run_gets_a_standby_cluster_that_is_ready_while_it_is_being_ended(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = new_ref(tenant=STANDBY, fence=0).model_copy(update={"expires_at": START + LIFETIME})
    world.clusters.places.make()
    world.clusters.create(half, cancelled=Never(), tell=print)
    clear, claimed = world.clusters.clear, list[Path | None]()

    def slowly(name: str) -> None:
        world.clusters.places.place(name).say_ready(world.standby._record() or "")
        claimed.append(world.standby.claim(new_ref()))
        clear(name)

    monkeypatch.setattr(world.clusters, "clear", slowly)
    world.clusters.destroy(half)
    assert claimed == [None]
    assert not world.clusters.places.place(half.name).exists


def test_one_that_could_not_be_prepared_and_resists_its_end_is_expired_for_the_reaper(world: World) -> None:
    def prepare(kubeconfig: Path, cancelled: Cancellation) -> None:
        world.clusters.resisting = True
        raise ProcessFailed("no lock-down")

    world.now = datetime.now(UTC)
    world.standby = Standby(world.clusters, wanted=1, prepare=prepare, now=lambda: world.now)
    world.keep()
    (left,) = world.clusters.discover()
    assert left.name == world.clusters.made[0].name
    assert left.expires_at <= datetime.now(UTC)
    assert left.expires_at < world.clusters.made[0].expires_at, "the control"


def test_nobody_claims_for_another_site(world: World) -> None:
    world.keep()
    with pytest.raises(ProvisionFailed, match="not for this installation and site"):
        world.standby.claim(new_ref().model_copy(update={"site": "elsewhere"}))


def test_whoever_stops_keeping_them_ends_what_nobody_has(world: World) -> None:
    world.standby.keep_none()  # before there is anything, not even a directory
    world.keep(2)
    run = new_ref()
    assert world.standby.claim(run)
    world.standby.keep_none()
    assert list(world.clusters.discover()) == [run]
