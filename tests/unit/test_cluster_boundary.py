"""The cluster boundary without a cluster: what it says of itself."""

from pathlib import Path

from tests.unit.test_kind_standby import PaperProvisioner
from workers.boundaries.cluster.driver import ClusterBoundary
from workers.boundaries.cluster.standby import Standby


def test_one_that_tells_of_what_it_makes_is_in_all_else_the_same(tmp_path: Path) -> None:
    kinds = PaperProvisioner(tmp_path)
    silent = ClusterBoundary(
        installation="inst0", site="here", images={"default": "run@sha256:0"}, provisioners=[kinds],
        standby=Standby(kinds, wanted=1, prepare=lambda *_: None), without={"capi": "a management cluster"},
    )  # fmt: skip
    told: list[str] = []

    telling = silent.telling(told.append)

    assert [row.boundary for row in telling.probe()] == ["cluster/kind", "cluster/capi"]
    assert telling.probe() == silent.probe()
    differs = {name for name, value in vars(silent).items() if vars(telling)[name] != value}
    assert differs == {"_tell"}
