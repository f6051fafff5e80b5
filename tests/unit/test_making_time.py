"""A boundary is not overdue while it is still being made, however long its maker is allowed to take."""

from datetime import timedelta
from pathlib import Path

import pytest

from service.core.boundary import ClusterChoices
from tests.scenes import Stage, Theatre
from tests.unit.test_kind_driver import BOTH, Here
from workers.boundaries.cluster.driver import ClusterBoundary
from workers.boundaries.cluster.inside import LONGEST_S

READY_S = (60.0, 900.0, 7200.0)


class SlowStage(Stage):
    """Of a kind that may take so long as a cluster of Cluster API that is given `ready_s`."""

    ready_s = 0.0

    def making_s(self, variant: str) -> float:
        return self.ready_s


@pytest.mark.parametrize("ready_s", READY_S)
def test_a_boundary_lives_longer_than_making_it_and_playing_in_it_may_take(ready_s: float) -> None:
    stage = SlowStage()
    stage.ready_s = ready_s
    theatre = Theatre(stage=stage)
    now = theatre.store.now()

    theatre.play(limits={"wall": "7s"})

    (ref,) = stage.refs
    assert ref.expires_at - now >= timedelta(seconds=ready_s + 7)
    assert ref.expires_at - now <= timedelta(seconds=ready_s + 7) + timedelta(minutes=5)


@pytest.mark.parametrize("ready_s", READY_S)
def test_the_time_that_a_cluster_may_take_to_get_ready_is_part_of_it(tmp_path: Path, ready_s: float) -> None:
    choices = ClusterChoices.model_validate({**BOTH.model_dump(), "ready_s": ready_s})
    boundary = ClusterBoundary.for_host(Here(state_dir=tmp_path, clusters=choices))
    assert boundary.making_s("capi") >= ready_s + LONGEST_S
    assert boundary.making_s("kind") == ClusterBoundary.for_host(Here(state_dir=tmp_path)).making_s("kind")


def test_each_archive_that_a_node_is_given_takes_its_time(tmp_path: Path) -> None:
    archives = (tmp_path / "one.tar", tmp_path / "two.tar")
    choices = ClusterChoices.model_validate({**BOTH.model_dump(), "archives": archives})
    more = ClusterBoundary.for_host(Here(state_dir=tmp_path, clusters=choices)).making_s("kind")
    assert more >= ClusterBoundary.for_host(Here(state_dir=tmp_path)).making_s("kind") + 2 * 120
