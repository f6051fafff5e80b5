"""Which nodes are kept for a group: a label brings its pods there, and only a taint keeps the others away."""

from typing import Any

import pytest

from workers.kube import Manifest
from workers.pods.nodes import GROUP_KEY, groups, kept_for

TAINT = {"key": "blastdoor.dev/group", "value": "blue", "effect": "NoSchedule"}


def node(
    group: str | None = "blue", *taints: Any, ready: str = "True", cordoned: bool = False, **labels: str
) -> Manifest:
    said = labels | ({GROUP_KEY: group} if group else {})
    return {
        "metadata": {"name": "n", "labels": said},
        "spec": {"taints": list(taints), "unschedulable": cordoned},
        "status": {"conditions": [{"type": "Ready", "status": ready}]},
    }


KEPT = node("blue", TAINT)


@pytest.mark.parametrize(
    "shared",
    [
        node("blue"),
        node("blue", TAINT | {"value": "red"}),
        node("blue", TAINT | {"effect": "PreferNoSchedule"}),
        node("blue", TAINT | {"key": "example.org/group"}),
    ],
    ids=["no taint", "another group's", "a wish", "another key"],
)
def test_a_node_without_its_groups_taint_is_shared_and_spoils_the_group(shared: Manifest) -> None:
    assert kept_for(shared) is None
    assert groups([shared], selector={}) == frozenset()
    assert groups([KEPT, shared], selector={}) == frozenset(), "a pod of the group might land on either"
    assert groups([KEPT], selector={}) == {"blue"}, "the control"


def test_a_group_is_offered_where_one_of_its_nodes_can_take_a_pod_now() -> None:
    assert groups([node("blue", TAINT, ready="False")], selector={}) == frozenset()
    assert groups([node("blue", TAINT, cordoned=True)], selector={}) == frozenset()
    assert groups([KEPT, node("blue", TAINT, ready="False"), node(None)], selector={}) == {"blue"}
    assert groups([node(None, TAINT)], selector={}) == frozenset(), "a taint without a label is nobody's group"


def test_a_runtime_class_that_asks_for_other_nodes_has_no_group_here() -> None:
    pool = {"example.org/pool": "sandboxes"}
    assert groups([KEPT], selector=pool) == frozenset()
    assert groups([node("blue", TAINT, **pool)], selector=pool) == {"blue"}
