"""The boundary `namespace` on a cluster of the tests: drivers with an installation of their own."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from service.core import failpoints
from service.core.boundary import Boundary, BoundaryKind, BoundaryRef
from service.core.errors import BoundaryError
from service.core.failpoints import Failpoint
from tests.cluster.engines import Ready, make_ready
from tests.cluster.lab.components import Place
from tests.cluster.lab.outside import Lab
from tests.cluster.lab.parts import Parts
from tests.cluster.runtime_image import write_runtime
from tests.contract.boundary_kinds import Shelled
from tests.sandboxes import Never, make_ref, make_spec, shell
from tests.summary import ran
from workers.boundaries.namespace.driver import NamespaceBoundary, NamespaceHost
from workers.kube import Cluster, ClusterError
from workers.pods.render import labels, listener_namespace, namespace_name

GIVEN = ("KUBECONFIG_FOR_TESTS", "KUBECONFIG")
"""For a cluster that is given: the first that is set counts."""
GIVEN_IMAGE = "BLASTDOOR_KUBE_IMAGE_FOR_TESTS"
"""For a cluster that is given: the name by digest of an image of ours that its nodes can have."""
DIED = 86
_ALONE = "for p in /proc/[0-9]*; do echo ${p#/proc/}; done; echo $$"


@dataclass(frozen=True)
class Site:
    """A cluster that is ready, and the image that its node knows."""

    ready: Ready
    image: str
    lab: Lab | None

    def host(self, *variants: str, installation: str | None = None) -> NamespaceHost:
        return NamespaceHost(
            installation=installation or f"test{uuid.uuid4().hex[:12]}", site="here",
            kubeconfig=self.ready.engine_kubeconfig, image=self.image, variants=variants or ("runc", "gvisor"),
        )  # fmt: skip


@pytest.fixture(scope="session")
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Of a cluster that is given, else the lab: kind has no gVisor."""
    folder = tmp_path_factory.mktemp("site")
    lab: Lab | None = None
    image = os.environ.get(GIVEN_IMAGE, "")
    if image:
        kubeconfig: Path = request.getfixturevalue("kubeconfig")
    elif any(os.environ.get(variable) for variable in GIVEN):
        pytest.skip(f"{GIVEN_IMAGE} names no image that the nodes of this cluster can have")
    else:
        lab = request.getfixturevalue("lab")
        kubeconfig = lab.kubeconfig
        image = load_runtime(lab, folder / "runtime.tar")
    ready = make_ready(kubeconfig, folder)
    yield Site(ready, image, lab)
    ready.admin.close()
    ready.engine.close()


def load_runtime(lab: Lab, archive: Path) -> str:
    """-> the image's name on the lab's node."""
    busybox = Path(Parts.read(Place(lab.state).config / "parts.json").program("busybox"))
    applets = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
    image = write_runtime(archive, busybox, applets)
    lab.load(archive)
    return image


def sweep(boundary: NamespaceBoundary, ready: Ready) -> list[str]:
    """What is left of an installation, its listener aside; then all of it is removed."""
    mine = {"blastdoor.dev/installation": boundary.host.installation}
    with suppress(BoundaryError):
        for ref in boundary.discover():
            boundary.destroy(ref)
    spare = listener_namespace(boundary.host.installation)
    left = [
        f"{one['kind']} {one['metadata']['name']}"
        for kind in ("Namespace", "Pod")
        for one in ready.admin.list(kind, labels=mine)
        if spare not in (one["metadata"]["name"], one["metadata"].get("namespace"))
    ]
    for one in ready.admin.list("Namespace", labels=mine):
        ready.engine.delete("Namespace", one["metadata"]["name"])
    boundary.close()
    return [name for name in left if not name.startswith("Namespace bd-t-")]  # a tenant's namespace stays


class NamespaceKind(Shelled):
    """As the contract tests see it. One installation for many tests: its listener takes a second to start."""

    def __init__(self, boundary: NamespaceBoundary, variant: str) -> None:
        self.boundary = boundary
        self.installation = boundary.host.installation
        self.variant = variant
        ran("boundary", f"namespace/{variant}")

    def ref(self, *, run_id: str | None = None, fence: int = 1) -> BoundaryRef:
        ref = make_ref(installation=self.installation, run_id=run_id, fence=fence)
        return ref.model_copy(update={"kind": BoundaryKind.NAMESPACE, "variant": self.variant})

    def as_discovered(self, ref: BoundaryRef) -> BoundaryRef:
        """A label has whole seconds, and of the tenant a hash."""
        said = {key.rpartition("/")[2]: value for key, value in labels(ref).items()}
        expires_at = ref.expires_at.fromtimestamp(int(said["expires-at"]), ref.expires_at.tzinfo)
        return ref.model_copy(update={"tenant": said["tenant-hash"], "expires_at": expires_at})

    def another_process(self) -> Boundary:
        return NamespaceBoundary(self.boundary.host)

    def worker_dies_at(self, point: Failpoint, ref: BoundaryRef) -> None:
        """A real process: it ends itself where it reaches the point, as kill -9 would."""
        worker = subprocess.run(
            [sys.executable, "-m", "tests.cluster.namespaces", *self._arguments(ref), point],
            cwd=Path(__file__).parents[2], check=False, timeout=90,
        )  # fmt: skip
        assert worker.returncode == DIED, f"it did not reach {point}"

    def _arguments(self, ref: BoundaryRef) -> list[str]:
        host = self.boundary.host
        return [self.installation, str(host.kubeconfig), host.image, self.variant, ref.model_dump_json()]

    def worker_killed_in(self, ref: BoundaryRef) -> None:
        kill_in_step("tests.cluster.namespaces", self._arguments(ref), lambda: self.running(ref))

    def running(self, ref: BoundaryRef) -> bool:
        return anything_runs(self.boundary.cluster, namespace_name(ref), ref.name)


def kill_in_step(module: str, arguments: Sequence[str], running: Callable[[], bool]) -> None:
    """A real process: it opens the pod, plays a step that does not end, and is killed in it."""
    worker = subprocess.Popen(
        [sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert worker.stdout is not None
    with worker:
        assert any(line == b"playing\n" for line in worker.stdout)
        deadline = time.monotonic() + 10
        while not running() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert running()
        os.kill(worker.pid, signal.SIGKILL)


def anything_runs(cluster: Cluster, namespace: str, name: str) -> bool:
    """Whether there is any process in the pod but the first, and the one that looks."""
    said = bytearray()
    try:
        cluster.exec_(
            namespace, name, "run", ["/bin/sh", "-c", _ALONE],
            on_output=lambda _, data: said.extend(data), deadline=time.monotonic() + 10,
        )  # fmt: skip
    except ClusterError:
        return False
    pids = said.decode().split()
    return bool(set(pids) - {"1", pids[-1]}) if pids else False


def _be_a_worker() -> None:
    """The process that dies."""
    installation, kubeconfig, image, variant, ref, *points = sys.argv[1:]
    failpoints.install(lambda reached: os._exit(DIED) if reached in points else None)
    host = NamespaceHost(
        installation=installation, site="here", kubeconfig=Path(kubeconfig), image=image, variants=(variant,)
    )
    with NamespaceBoundary(host).open(make_spec(), BoundaryRef.model_validate_json(ref), cancelled=Never()) as sandbox:
        print("playing", flush=True)
        sandbox.execute(shell("trap '' TERM INT HUP; sleep 600 & sleep 600", timeout_s=600))


if __name__ == "__main__":
    _be_a_worker()
