"""What boundary `cluster` does around a cluster by kind: it claims or makes one, waits for a place, and lets go of it.
Clusters here are directories, and nobody is inside; tests/cluster has real ones."""

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from service.core.boundary import BoundaryRef, BoundarySpec, ClusterChoices
from service.core.controls import Limits, Network
from service.core.errors import BoundaryLost, ProvisionFailed
from tests.unit.test_kind_places import new_ref
from tests.unit.test_kind_standby import START, Never, PaperProvisioner
from workers.boundaries.cluster import driver
from workers.boundaries.cluster.capi import CapiProvisioner
from workers.boundaries.cluster.driver import PATIENCE_S, ClusterBoundary
from workers.boundaries.cluster.engine import EngineFailed
from workers.boundaries.cluster.kind import KindProvisioner
from workers.boundaries.cluster.kind_render import STANDBY
from workers.boundaries.cluster.provisioners import NoRoom
from workers.boundaries.cluster.standby import Standby

IMAGES = {"default": f"registry.example/run@sha256:{'0' * 64}"}
BOTH = ClusterChoices(
    provisioners=("kind", "capi"), standby=1, node_image="node", capi_kubeconfig=Path("/nonexistent/kubeconfig")
)
SPEC = BoundarySpec(limits=Limits(), network=Network(mode="none"))


@dataclass(frozen=True)
class Here:
    """A `service.core.boundary.Host` that offers clusters of both sorts."""

    state_dir: Path
    installation: str = "inst0"
    site: str = "here"
    runtime_dir: Path = Path("/nonexistent")
    runsc: Path = Path("/nonexistent")
    kubeconfig: Path | None = None
    kube_image: str = IMAGES["default"]
    namespace_variants: tuple[str, ...] = ()
    clusters: ClusterChoices = BOTH


class Clock:
    """Goes on while somebody sleeps, and no faster; then `meanwhile` happens."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.meanwhile: Callable[[], None] = lambda: None

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self.meanwhile()


class PaperInside:
    """Stands in for `inside.Inside`, and for the sandbox in it."""

    def __init__(self, kubeconfig: Path) -> None:
        self.kubeconfig = kubeconfig
        self.is_closed = False

    def open(self, *_: Any, **__: Any) -> "PaperInside":
        return self

    def end(self) -> None:
        pass

    def close(self) -> None:
        self.is_closed = True


class Site:
    def __init__(self, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clusters, self.clock, self.told = PaperProvisioner(state), Clock(), list[str]()
        self.clusters.places.make()
        self.standby = Standby(self.clusters, wanted=1, prepare=lambda *_: None, now=lambda: START)
        self.boundary = ClusterBoundary(
            installation="inst0", site="here", images=IMAGES, provisioners=[self.clusters], standby=self.standby,
            tell=self.told.append,
        )  # fmt: skip
        self.insides: list[PaperInside] = []
        monkeypatch.setattr(driver, "time", self.clock)
        monkeypatch.setattr(driver, "get_ready", self._inside)
        monkeypatch.setattr(driver.Inside, "of_ready", self._inside)

    def _inside(self, kubeconfig: Path, images: object, **_: object) -> PaperInside:
        self.insides.append(PaperInside(kubeconfig))
        return self.insides[-1]

    def begin(self, *, tenant: str) -> BoundaryRef:
        """A cluster that takes a place: another run's, or one of nobody that is still being made."""
        ref = new_ref(tenant=tenant).model_copy(update={"expires_at": START + timedelta(hours=1)})
        self.clusters.create(ref, cancelled=Never(), tell=print)
        return ref


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path / "state", monkeypatch)


def test_a_run_that_waits_for_a_place_takes_the_standby_cluster_that_gets_ready_meanwhile(site: Site) -> None:
    site.clusters.room = 1
    place = site.clusters.places.place(site.begin(tenant=STANDBY).name)
    record = site.standby._record()
    assert record is not None

    def finish() -> None:
        if site.clock.now_s >= PATIENCE_S / 2 and not place.standby.exists():
            place.say_ready(record)

    site.clock.meanwhile = finish
    run = new_ref()
    with site.boundary.open(SPEC, run, cancelled=Never()):
        assert list(site.clusters.discover()) == [run]
        assert site.insides[0].kubeconfig == place.kubeconfig
    assert site.told == ["waiting for another cluster to go", "a standby cluster was claimed"]


def test_a_run_makes_its_own_cluster_as_soon_as_another_has_gone(site: Site) -> None:
    site.clusters.room = 1
    other, run = site.begin(tenant="acme"), new_ref()

    def end() -> None:
        if site.clock.now_s > 5:
            site.clusters.destroy(other)

    site.clock.meanwhile = end
    with site.boundary.open(SPEC, run, cancelled=Never()):
        assert list(site.clusters.discover()) == [run]
        assert 5 < site.clock.now_s < 8
    assert site.told == ["waiting for another cluster to go", "getting the cluster ready"]


def test_a_run_waits_for_a_place_for_so_long_and_no_longer(site: Site) -> None:
    site.clusters.room = 1
    other = site.begin(tenant="acme")
    with pytest.raises(NoRoom), site.boundary.open(SPEC, new_ref(), cancelled=Never()):
        raise AssertionError
    assert PATIENCE_S <= site.clock.now_s < PATIENCE_S + 5
    assert list(site.clusters.discover()) == [other]


def test_a_run_that_is_cancelled_waits_for_no_place(site: Site) -> None:
    site.clusters.room = 1
    site.begin(tenant="acme")

    class Soon:
        def is_set(self) -> bool:
            return site.clock.now_s > 3

    with (
        pytest.raises(ProvisionFailed, match="cancelled while it waited for another cluster to go"),
        site.boundary.open(SPEC, new_ref(), cancelled=Soon()),
    ):
        raise AssertionError
    assert site.clock.now_s < 6


def test_the_flag_that_ends_the_keeping_ends_the_preparing_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boundary = ClusterBoundary.for_host(Here(state_dir=tmp_path))
    seen: list[object] = []

    def get_ready(kubeconfig: Path, images: object, *, cancelled: object) -> PaperInside:
        seen.append(cancelled)
        return PaperInside(kubeconfig)

    monkeypatch.setattr(driver, "get_ready", get_ready)
    stop, standby = Never(), boundary._standby
    assert standby is not None
    standby._prepare(tmp_path, stop)
    assert seen == [stop]


def test_a_cluster_by_one_provisioner_is_none_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, capi = ClusterBoundary.for_host(Here(state_dir=tmp_path))._provisioners.values()
    assert isinstance(kind, KindProvisioner)
    assert isinstance(capi, CapiProvisioner)
    monkeypatch.setattr(kind, "_engine", SimpleNamespace(containers=list, networks=lambda **_: []))
    ref = new_ref().model_copy(update={"variant": "capi"})
    theirs = capi._write_kubeconfig(ref, "kubeconfig")
    assert list(kind.discover()) == []
    kind.places.make()
    kind.places.place(ref.name).make(ref.model_copy(update={"variant": "kind"}))
    assert [found.name for found in kind.discover()] == [ref.name], "the control: one of its own"
    kind.places.place(ref.name).remove()
    assert theirs.exists()


def fails(site: Site, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def away() -> None:
        raise EngineFailed("the engine at unix:///x: no answer")

    if where == "the engine is away":
        monkeypatch.setattr(site.clusters, "image_id", away)
    elif where == "the disk is full":
        monkeypatch.setattr("workers.boundaries.cluster.kind_places.os.fsync", full)
    else:
        monkeypatch.setattr(site.clusters.places.__class__, "count", full)


@pytest.mark.parametrize("where", ["the engine is away", "the disk is full", "the disk is full for counts"])
def test_a_host_on_which_nothing_can_be_claimed_is_one_on_which_none_could_be_made(
    site: Site, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """So that another attempt is made; anything else would be called a defect, and be the end of the run."""
    site.standby.keep(cancelled=Never())
    fails(site, monkeypatch, where)
    with (
        pytest.raises(ProvisionFailed, match=r"No space left|no answer"),
        site.boundary.open(SPEC, new_ref(), cancelled=Never()),
    ):
        raise AssertionError
    assert not list(site.clusters.places.state.rglob(".claim*"))


@pytest.mark.parametrize("error", [ProvisionFailed("no wall"), BoundaryLost("gone"), RuntimeError("a defect")])
def test_a_cluster_that_could_not_be_used_is_ended_and_nobody_holds_connections_to_it(
    site: Site, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(PaperInside, "open", refuse)
    with (
        pytest.raises(RuntimeError if isinstance(error, RuntimeError) else ProvisionFailed, match=str(error)),
        site.boundary.open(SPEC, new_ref(), cancelled=Never()),
    ):
        raise AssertionError
    assert [inside.is_closed for inside in site.insides] == [True]
    assert list(site.clusters.discover()) == []


def test_a_run_that_no_node_holds_is_refused_with_the_figures_before_anything_is_made(site: Site) -> None:
    large = SPEC.model_copy(update={"limits": Limits(memory=4 * 2**30)})
    with (
        pytest.raises(ProvisionFailed, match="does not hold 4096 MiB of memory: a cluster's node has 2176 MiB left"),
        site.boundary.open(large, new_ref(), cancelled=Never()),
    ):
        raise AssertionError
    assert site.clusters.made == []
    with site.boundary.open(SPEC.model_copy(update={"limits": Limits(memory=2 * 2**30)}), new_ref(), cancelled=Never()):
        assert len(site.clusters.made) == 1, "the control"
