"""The kinds of Cluster API, as its API server would have them: resource definitions out of the published Go modules.

No program is built from them. They are kept in the lab's cache, by version, and fetched once.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.lab.parts import Say, _module, cache, one_at_a_time
from tests.cluster.lab.toolchain import toolchain

CLUSTER_API = "1.14.2"


@dataclass(frozen=True)
class Definitions:
    """`folders`: of the module, those whose files are wanted."""

    name: str
    module: str
    version: str
    folders: tuple[str, ...]


CORE = Definitions(
    "cluster-api", "sigs.k8s.io/cluster-api", CLUSTER_API,
    tuple(f"{part}/config/crd/bases" for part in ("core", "controlplane/kubeadm", "bootstrap/kubeadm")),
)  # fmt: skip
DEVELOPMENT = Definitions(
    "cluster-api-dev", "sigs.k8s.io/cluster-api/test", CLUSTER_API, ("infrastructure/docker/config/crd/bases",)
)
"""Its own infrastructure provider for tests: containers, or nothing but memory."""
AWS = Definitions("cluster-api-aws", "sigs.k8s.io/cluster-api-provider-aws/v2", "2.13.0", ("config/crd/bases",))
GOOGLE = Definitions("cluster-api-gcp", "sigs.k8s.io/cluster-api-provider-gcp", "1.13.1", ("config/crd/bases",))


def definitions(of: Definitions, say: Say) -> list[dict[str, Any]]:
    """-> CustomResourceDefinitions. Raises NoParts when they cannot be had."""
    folder = cache() / f"{of.name}-{of.version}-json"
    if not folder.is_dir():
        with one_at_a_time("definitions"):
            if not folder.is_dir():
                _fetch(of, folder, say)
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


def _fetch(of: Definitions, folder: Path, say: Say) -> None:
    say(f"{of.name} {of.version}")
    with tempfile.TemporaryDirectory(dir=cache(), prefix=f".{of.name}-") as scratch:
        place, made = Path(scratch) / "module", Path(scratch) / "made"
        place.mkdir()
        made.mkdir()
        module = Path(_module(of.module, of.version, place, toolchain(Path(scratch), say))["Dir"])
        for below in of.folders:
            for file in sorted((module / below).glob("*.yaml")):
                found = yaml.safe_load(file.read_text())  # half a minute for all of them: once is enough
                (made / f"{file.stem}.json").write_text(json.dumps(found))
        made.rename(folder)
