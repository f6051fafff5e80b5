"""What the tests of kind share: an engine of their own, a worker's host on it, other processes, and what is left."""

import json
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from service.core.boundary import BoundaryKind, BoundaryRef
from service.core.ids import new_run_id
from tests.cluster.engine.outside import Engine
from tests.cluster.engine.run import running_engine
from tests.cluster.lab.client import connect
from tests.cluster.lab.outside import NoLab
from tests.cluster.lab.parts import KUBERNETES
from tests.cluster.lab.toolchain import NoParts
from tests.summary import ran
from workers.boundaries.cluster.kind import KindHost, KindProvisioner
from workers.boundaries.cluster.kind_places import MARK
from workers.boundaries.cluster.kind_render import Node

ROOT = Path(__file__).parents[2]
INSTALLATION = f"t{secrets.token_hex(4)}"
"""Of this session alone: others may make clusters on this machine at the same time."""
NODE = Node(memory_bytes=3 * 2**30)
ALWAYS_THERE = {"bridge", "host", "none"}
WITHIN_S = 120.0


class Flag:
    def __init__(self) -> None:
        self.up = False

    def is_set(self) -> bool:
        return self.up


def ref_of(*, tenant: str = "acme", installation: str = INSTALLATION) -> BoundaryRef:
    return BoundaryRef(
        installation=installation, kind=BoundaryKind.CLUSTER, variant="kind", site="here", tenant=tenant,
        run_id=new_run_id(), fence=1, expires_at=datetime.now(UTC) + timedelta(minutes=30),
    )  # fmt: skip


def provisioner_of(engine: Engine, state: Path, **changed: Any) -> KindProvisioner:
    known = {
        "installation": INSTALLATION, "site": "here", "state": state, "node_image": engine.node_image, "node": NODE,
        "docker": engine.docker, "docker_host": engine.docker_host, "kind": engine.kind, "max_clusters": 2,
    }  # fmt: skip
    return KindProvisioner(KindHost(**(known | changed)))


def elsewhere(provisioner: KindProvisioner, do: str, ref: BoundaryRef) -> Any:
    """In another process, which is told what any worker of this host would be. -> what it returned."""
    host = provisioner.host
    told = {
        "installation": host.installation, "site": host.site, "state": str(host.state), "node_image": host.node_image,
        "docker": str(host.docker), "docker_host": host.docker_host, "kind": str(host.kind),
    }  # fmt: skip
    program = f"""
import json, sys
from pathlib import Path
from service.core.boundary import BoundaryRef
from workers.boundaries.cluster.kind import KindHost, KindProvisioner
told = json.loads(sys.argv[1])
told |= {{name: Path(told[name]) for name in ("state", "docker", "kind")}}
there = KindProvisioner(KindHost(**told))
ref = BoundaryRef.model_validate_json(sys.argv[2])
{do}
"""
    argv = [sys.executable, "-c", program, json.dumps(told), ref.model_dump_json()]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout or "null")


def left(engine: Engine, provisioner: KindProvisioner) -> list[str]:
    """All that a cluster could leave: containers, volumes, networks, files, processes."""
    found = engine.run(engine.docker, "ps", "--all", "--format={{.Names}}").split()
    found += engine.run(engine.docker, "volume", "ls", "--quiet").split()
    networks = engine.run(engine.docker, "network", "ls", "--format={{.Name}}").split()
    found += [name for name in networks if name not in ALWAYS_THERE]
    found += [place.name for place in provisioner.places.all()]
    return found + [f"process {pid}" for pid in makers()]


def makers() -> list[int]:
    """Processes that make clusters of ours."""
    mark = re.compile(
        rb"(^|\0)" + re.escape(f"{MARK}=bd-".encode()) + rb"[^\0]*\." + INSTALLATION.encode() + rb"(\0|$)"
    )
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark.search(path.read_bytes()):
                found.append(int(path.parent.name))
    return found


def wait_until(is_so: Callable[[], bool], *, within_s: float = WITHIN_S) -> None:
    deadline = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """One of our own: what is left on it is ours. In a folder with a short name, for the path of its socket."""
    try:
        with tempfile.TemporaryDirectory(prefix="bd-e-") as folder, running_engine(Path(folder) / "e", print) as engine:
            ran("kind", f"{KUBERNETES} on an engine of the tests'")
            yield engine
    except (NoLab, NoParts) as why:
        pytest.skip(f"no engine: {why}")


@pytest.fixture
def kinds(engine: Engine, tmp_path: Path) -> Iterator[KindProvisioner]:
    """A worker's host of its own on the engine, of which nothing is left."""
    provisioner = provisioner_of(engine, tmp_path / "state")
    yield provisioner
    for ref in provisioner.discover():
        provisioner.destroy(ref)


def api_of(kubeconfig: Path) -> httpx.Client:
    with tempfile.NamedTemporaryFile("w") as file:
        json.dump(yaml.safe_load(kubeconfig.read_text()), file)
        file.flush()
        return connect(file.name)
