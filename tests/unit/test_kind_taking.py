"""How a place is taken on an engine that others use too. There is no engine here: networks are names."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from service.core.boundary import BoundarySpec
from service.core.controls import Limits, Network
from service.core.errors import ProvisionFailed
from tests.unit.test_kind_places import new_ref
from tests.unit.test_kind_standby import Never
from workers.boundaries.cluster import engine as engines
from workers.boundaries.cluster import kind
from workers.boundaries.cluster.driver import ClusterBoundary
from workers.boundaries.cluster.engine import EngineFailed
from workers.boundaries.cluster.kind import KindHost, KindProvisioner
from workers.boundaries.cluster.kind_render import network_name
from workers.boundaries.cluster.provisioners import NameTaken, NoRoom

SPEC = BoundarySpec(limits=Limits(), network=Network(mode="none"))
IMAGES = {"default": f"registry.example/run@sha256:{'0' * 64}"}


class PaperEngine:
    """`meanwhile`: what another installation does just before this one's network is made."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.meanwhile: Callable[[], None] = lambda: None

    def networks(self, *, labels: Mapping[str, str], read: Sequence[str]) -> list[engines.Network]:
        return [engines.Network(id=name, name=name, labels={}) for name in self.names]

    def has_network(self, name: str) -> bool:
        return name in self.names

    def create_network(self, name: str, *, labels: Mapping[str, str], options: Sequence[str]) -> None:
        self.meanwhile()
        self.names.append(name)

    def remove_network(self, name: str) -> None:
        if name in self.names:
            self.names.remove(name)

    def containers(self) -> list[engines.Container]:
        return []

    def about(self) -> engines.About:
        raise EngineFailed("no more than networks")


@pytest.fixture
def engine() -> PaperEngine:
    return PaperEngine()


@pytest.fixture
def kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: PaperEngine) -> KindProvisioner:
    made = KindProvisioner(KindHost(installation="inst0", site="here", state=tmp_path, node_image="node"))
    monkeypatch.setattr(made, "_engine", engine)
    monkeypatch.setattr(kind, "lacks", lambda *_, **__: ())
    monkeypatch.setattr(kind, "memory_lacks", tuple)
    return made


def test_what_has_a_runs_name_already_is_not_undone_by_the_run(kinds: KindProvisioner, engine: PaperEngine) -> None:
    boundary = ClusterBoundary(installation="inst0", site="here", images=IMAGES, provisioners=[kinds])
    ref = new_ref()
    kinds.places.make()
    kinds.places.place(ref.name).make(ref)
    engine.names = [network_name(ref.name, "inst0")]
    with pytest.raises(NameTaken), boundary.open(SPEC, ref, cancelled=Never()):
        raise AssertionError
    assert engine.names == [network_name(ref.name, "inst0")]
    assert kinds.places.place(ref.name).exists
    other = new_ref()
    with pytest.raises(ProvisionFailed, match="no more than networks"), boundary.open(SPEC, other, cancelled=Never()):
        raise AssertionError
    assert engine.names == [network_name(ref.name, "inst0")], "the control: what it made itself is"


def test_two_installations_that_see_the_last_place_at_once_do_not_both_take_it(
    kinds: KindProvisioner, engine: PaperEngine
) -> None:
    engine.names = ["bd-1.theirs"]
    engine.meanwhile = lambda: engine.names.append("bd-2.theirs")
    with pytest.raises(NoRoom):
        kinds.create(new_ref(), cancelled=Never(), tell=print)
    assert engine.names == ["bd-1.theirs", "bd-2.theirs"], "and what it made is taken back"
    assert kinds.places.all() == []
    engine.names, engine.meanwhile = ["bd-1.theirs"], lambda: None
    with pytest.raises(ProvisionFailed, match="no more than networks"):
        kinds.create(new_ref(), cancelled=Never(), tell=print)
