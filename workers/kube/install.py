"""What a cluster needs before walls can be built in it, from `cluster_templates/` and an operator's choices. Pure."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from workers.kube.manifests import Manifest, filled, placeholders, templates

ENGINE = "system:serviceaccount:blastdoor-system:engine"
"""Whom workers come as, unless the operator says otherwise."""
POOL = {"blastdoor.node-restriction.kubernetes.io/pool": "untrusted"}
"""A label that a kubelet cannot give itself: of the nodes that sandboxes are put on."""
TAINT = {"key": "blastdoor.dev/untrusted", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
FOLDERS = ("rbac", "priority", "runtimeclass", "admission", "flowcontrol")
"""In the order in which they are applied: what names something comes after it."""
MAX_S = 1200
"""No pod lives longer, in seconds: a run's longest wall time, and what its end may take."""
_USER = re.compile(r"[A-Za-z0-9:._@/-]{1,253}")


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What differs from cluster to cluster. `image_prefix`: what every image of a sandbox begins with, up to `/` or
    `@`. `pool`: labels of the nodes for sandboxes; none: any node. `own_api`: the cluster belongs to one run, whose pod
    may come with a token for it (`workers/pods/own_api.py`)."""

    image_prefix: str
    engine: str = ENGINE
    max_s: int = MAX_S
    pool: Mapping[str, str] = field(default_factory=lambda: dict(POOL))
    own_api: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError. The engine's name becomes part of an expression, so it has no quotation mark."""
        if not _USER.fullmatch(self.engine):
            raise ValueError(f"{self.engine!r} is no name for a user of a cluster")
        if not self.image_prefix.endswith(("/", "@")):
            raise ValueError(f"{self.image_prefix!r} does not end in / or @: another name could begin with it")


def wanted(choices: Choices) -> Sequence[Manifest]:
    """Everything that `blastdoor cluster install` applies, in order."""
    scheduling: dict[str, Any] = {}
    if choices.pool:
        scheduling = {"nodeSelector": dict(choices.pool), "tolerations": [TAINT]}
    values = {
        "engine": choices.engine,
        "image_prefix": choices.image_prefix,
        "max_seconds": choices.max_s,
        "own_api": "true" if choices.own_api else "false",
        "scheduling": scheduling,
    }
    return [
        filled(manifest, {name: values[name] for name in placeholders(manifest)})
        for folder in FOLDERS
        for manifest in templates(folder)
    ]


def differences(ours: Any, live: Any, where: str = "") -> list[str]:
    """-> the places where what is there is not what we say; what we say nothing of is not compared."""
    if isinstance(ours, Mapping) and isinstance(live, Mapping):
        return [
            line
            for key, value in ours.items()
            for line in differences(value, live.get(key), f"{where}.{key}".removeprefix("."))
        ]
    if isinstance(ours, list) and isinstance(live, list) and len(ours) == len(live):
        pairs = enumerate(zip(ours, live, strict=True))
        return [line for i, (one, other) in pairs for line in differences(one, other, f"{where}[{i}]")]
    return [] if ours == live or (not ours and live is None) else [where]
