"""What the tests of whole clusters for one run share: an engine, a stack whose worker makes clusters on it, and what
any of them has left."""

import json
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.engine.outside import Engine
from tests.cluster.engine.parts import build
from tests.cluster.runtime_image import write_runtime
from tests.stack import NoStack, Stack, eventually, run_stack

NOTHING: dict[str, list[str]] = {"containers": [], "networks": [], "volumes": [], "directories": []}


def boundary(run: str, fence: int = 1) -> str:
    return f"bd-{run.removeprefix('run_')}-f{fence}"


def docker(engine: Engine, *words: str) -> list[str]:
    return engine.run(engine.docker, *words).split()


def left(engine: Engine, state: Path) -> dict[str, list[str]]:
    """Of every cluster that was ever on this engine, and of what the worker with this state directory kept of it."""
    networks = set(docker(engine, "network", "ls", "--format={{.Name}}")) - {"bridge", "host", "none"}
    return {
        "containers": docker(engine, "ps", "--all", "--quiet"),
        "networks": sorted(networks),
        "volumes": docker(engine, "volume", "ls", "--quiet"),
        "directories": sorted(str(path) for path in (state / "clusters").glob("*/*/clusters/*")),
    }


def settings(engine: Engine, folder: Path, *, more: Mapping[str, Path] | None = None) -> Mapping[str, str]:
    """For processes that make clusters on this engine, of a runtime with `kubectl` that is made in this folder. `more`:
    path in the runtime to a file of this machine."""
    parts = build(print)
    busybox = Path(parts.program("busybox"))
    applets = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
    files = {"bin/kubectl": engine.kubectl, "usr/bin/env": busybox} | dict(more or {})
    image = write_runtime(folder / "run.tar", busybox, applets, more=files)
    return {
        "BLASTDOOR_CLUSTER_IMAGES": json.dumps({"default": image}),
        "BLASTDOOR_CLUSTER_ARCHIVES": json.dumps([str(folder / "run.tar")]),
        "BLASTDOOR_DOCKER": str(engine.docker),
        "BLASTDOOR_DOCKER_HOST": engine.docker_host,
        "BLASTDOOR_KIND": str(engine.kind),
        "BLASTDOOR_KIND_NODE_IMAGE": engine.node_image,
    }


@dataclass(frozen=True)
class Ground:
    stack: Stack
    engine: Engine

    def docker(self, *words: str) -> list[str]:
        return docker(self.engine, *words)

    def left(self) -> dict[str, list[str]]:
        return left(self.engine, self.stack.state)

    def node(self, run: str) -> str:
        """The container that is the run's cluster, once it is there; whichever attempt made it."""
        name = f"name=^{boundary(run).removesuffix('1')}[0-9]+-control-plane$"
        found = eventually(lambda: self.docker("ps", "--quiet", f"--filter={name}"), within_s=60)
        assert len(found) == 1, found
        return str(found[0])

    def in_node(self, run: str, command: str) -> str:
        """-> what a shell prints that is executed in the run's node, beside everything there."""
        return self.engine.run(self.engine.docker, "exec", self.node(run), "sh", "-c", command)

    def address_of(self, run: str) -> str:
        return self._of_network(run, "IPAddress")

    def gateway_of(self, run: str) -> str:
        """Where the engine's host is, for the run's cluster."""
        return self._of_network(run, "Gateway")

    def kubeconfig(self, run: str) -> Path:
        """The worker's own."""
        (path,) = (self.stack.state / "clusters").rglob(f"{boundary(run).removesuffix('1')}*/kubeconfig")
        return path

    def _of_network(self, run: str, what: str) -> str:
        said = f"--format={{{{range .NetworkSettings.Networks}}}}{{{{.{what}}}}}{{{{end}}}}"
        return self.docker("inspect", said, self.node(run))[0]


@pytest.fixture(scope="module")
def ground(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    """A stack whose worker makes clusters. Imported, it is the fixture of that module, beside `engine`."""
    with run_ground(engine, tmp_path_factory.mktemp("dedicated")) as made:
        yield made


@contextmanager
def run_ground(engine: Engine, folder: Path, *, more: Mapping[str, Path] | None = None) -> Iterator[Ground]:
    """`more`: as of `settings`."""
    boundaries = {"BLASTDOOR_BOUNDARIES": '["gvisor", "cluster"]', "BLASTDOOR_PROBE_S": "2"}
    given = {**settings(engine, folder, more=more), **boundaries}
    try:
        with run_stack(folder, **given) as stack:
            ground = Ground(stack, engine)
            assert eventually(lambda: "cluster/kind" in offered(stack), within_s=60), offered(stack)
            yield ground
            assert eventually(lambda: ground.left() == NOTHING, within_s=60), ground.left()
    except NoStack as missing:
        pytest.skip(str(missing))


def offered(stack: Stack) -> dict[str, list[str]]:
    rows = stack.tenant.get("/v1/capabilities").json()["boundaries"]
    return {row["boundary"]: row["missing"] for row in rows if row["available"]}
