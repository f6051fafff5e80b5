"""A cluster of the tests made ready for sandboxes, and the two who use it: its administrator, and the engine."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.pods import eventually
from workers.cluster_cli import engine_kubeconfig
from workers.kube import Cluster
from workers.kube.check import check
from workers.kube.install import Choices, wanted

IMAGE_PREFIX = "blastdoor.test/"
"""What the names of all images of the lab begin with."""
CHOICES = Choices(image_prefix=IMAGE_PREFIX, pool={})
"""Its one node is of no pool."""
TOKEN_S = 6 * 3600


@dataclass(frozen=True)
class Ready:
    """`kubeconfig` is the administrator's, `engine_kubeconfig` the engine's, with a token."""

    admin: Cluster
    engine: Cluster
    kubeconfig: Path
    engine_kubeconfig: Path


def make_ready(kubeconfig: Path, folder: Path) -> Ready:
    """Installs all that sandboxes need, and waits until every defence holds; any number of times for one cluster."""
    admin = Cluster.from_kubeconfig(kubeconfig)
    for manifest in wanted(CHOICES):
        admin.apply(manifest)
    theirs = folder / "engine.kubeconfig"
    theirs.touch(mode=0o600)
    theirs.write_text(json.dumps(engine_kubeconfig(admin, seconds=TOKEN_S)))
    engine = Cluster.from_kubeconfig(theirs)
    eventually(
        lambda: all(row.holds for row in check(admin, engine, CHOICES)),
        lambda: "\n".join(str(row) for row in check(admin, engine, CHOICES) if not row.holds),
    )
    return Ready(admin, engine, kubeconfig, theirs)


@pytest.fixture(scope="module")
def ready(kubeconfig: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ready]:
    """Import it where it is used."""
    ready = make_ready(kubeconfig, tmp_path_factory.mktemp("engine"))
    yield ready
    ready.admin.close()
    ready.engine.close()
