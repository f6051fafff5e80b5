"""PURE: which nodes are kept for which group, by what the cluster says of them.

A group's node has the group's label, so that its pods come there, and the group's taint, so that no other pod does. A
node with the label alone is shared with whoever comes, and then the group is not dedicated: it is not offered at all,
since the scheduler might take that node.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from workers.kube import PREFIX, Manifest

GROUP_KEY = "blastdoor.node-restriction.kubernetes.io/group"
TAINT_KEY = f"{PREFIX}group"


def toleration(group: str) -> dict[str, Any]:
    """Of the taint that keeps others away."""
    return {"key": TAINT_KEY, "operator": "Equal", "value": group, "effect": "NoSchedule"}


def is_ready(node: Manifest) -> bool:
    conditions = {row["type"]: row["status"] for row in node["status"].get("conditions", ())}
    return conditions.get("Ready") == "True" and not node["spec"].get("unschedulable")


def has_labels(node: Manifest, selector: Mapping[str, str]) -> bool:
    return selector.items() <= _labels(node).items()


def kept_for(node: Manifest) -> str | None:
    """The group that nobody else shares this node with."""
    group = _labels(node).get(GROUP_KEY)
    taints = [(row["key"], row.get("value", ""), row["effect"]) for row in node["spec"].get("taints") or ()]
    return group if group and (TAINT_KEY, group, "NoSchedule") in taints else None


def groups(nodes: Sequence[Manifest], *, selector: Mapping[str, str]) -> frozenset[str]:
    """Those that a pod can be placed on now, and nobody shares. `selector`: what else the pod asks of its node, as its
    RuntimeClass has it."""
    shared = {_labels(node).get(GROUP_KEY) for node in nodes if kept_for(node) is None}
    usable = [node for node in nodes if is_ready(node) and has_labels(node, selector)]
    return frozenset(group for node in usable if (group := kept_for(node)) is not None) - shared


def _labels(node: Manifest) -> Mapping[str, str]:
    found: Mapping[str, str] = node["metadata"].get("labels") or {}
    return found
