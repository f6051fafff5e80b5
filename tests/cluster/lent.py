"""The boundary `cluster` on a cluster that all its runs are lent: whoever makes clusters is a folder with their names,
and everything after that is as in one of their own. What makes real ones is tried where those are made."""

import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from service.core.boundary import Boundary, BoundaryKind, BoundaryRef, Cancellation
from service.core.controls import Limits
from service.core.errors import NotYetDestroyed
from tests.cluster.namespaces import anything_runs, kill_in_step
from tests.contract.boundary_kinds import Shelled
from tests.sandboxes import Never, make_ref, make_spec, shell
from tests.summary import ran
from workers.boundaries.cluster.driver import ClusterBoundary
from workers.boundaries.cluster.inside import RUNTIME_CLASS
from workers.boundaries.cluster.provisioners import NameTaken, Tell
from workers.kube import Cluster
from workers.pods.render import namespace_name

VARIANT = "kind"
_GONE_S = 60.0


@dataclass(frozen=True)
class Lent:
    """Implements `workers.boundaries.cluster.provisioners.Provisioner`. `kubeconfig`: of the administrator of the
    cluster that all share; `folder`: where it is kept who has it."""

    kubeconfig: Path
    folder: Path

    @property
    def variant(self) -> str:
        return VARIANT

    def lacks(self) -> Sequence[str]:
        return ()

    def versions(self) -> Mapping[str, str]:
        return {}

    def create(self, ref: BoundaryRef, *, cancelled: Cancellation, tell: Tell) -> Path:
        half = self.folder / f".{ref.name}.{os.getpid()}"
        half.mkdir()
        (half / "ref.json").write_text(ref.model_dump_json())
        shutil.copy(self.kubeconfig, half / "kubeconfig")
        try:
            half.rename(self.folder / ref.name)
        except OSError as error:
            shutil.rmtree(half)
            raise NameTaken(f"there is a cluster {ref.name} already") from error
        return self.folder / ref.name / "kubeconfig"

    def too_small_for(self, limits: Limits) -> str | None:
        return None

    def longest_s(self) -> float:
        return _GONE_S

    def discover(self) -> Iterator[BoundaryRef]:
        for found in sorted(self.folder.glob("bd-*/ref.json")):
            yield BoundaryRef.model_validate_json(found.read_text())

    def destroy(self, ref: BoundaryRef) -> None:
        """With a cluster all in it would be gone: here the run's pod is."""
        place = self.folder / ref.name
        if not place.exists():
            return
        name, cluster = namespace_name(_in_its_cluster(ref)), Cluster.from_kubeconfig(self.kubeconfig)
        try:
            cluster.delete("Namespace", name)
            cluster.delete("Pod", ref.name, name, grace_s=1)
            deadline = time.monotonic() + _GONE_S
            while cluster.get("Pod", ref.name, name) is not None:
                if time.monotonic() > deadline:
                    raise NotYetDestroyed(f"pod {ref.name} is still there")
                time.sleep(0.05)
        finally:
            cluster.close()
        shutil.rmtree(place)


def _in_its_cluster(ref: BoundaryRef) -> BoundaryRef:
    return ref.model_copy(update={"kind": BoundaryKind.NAMESPACE, "variant": RUNTIME_CLASS})


def lent_boundary(installation: str, kubeconfig: Path, image: str, folder: Path) -> ClusterBoundary:
    return ClusterBoundary(
        installation=installation, site="here", images={"default": image}, provisioners=[Lent(kubeconfig, folder)]
    )


class LentKind(Shelled):
    """As the contract tests see it."""

    def __init__(self, installation: str, engine: Cluster, kubeconfig: Path, image: str, folder: Path) -> None:
        self.installation = installation
        self.boundary: Boundary = lent_boundary(installation, kubeconfig, image, folder)
        self._engine, self._kubeconfig, self._image, self._folder = engine, kubeconfig, image, folder
        ran("boundary", "cluster, in one that is shared")

    def ref(self, *, run_id: str | None = None, fence: int = 1) -> BoundaryRef:
        ref = make_ref(installation=self.installation, run_id=run_id, fence=fence)
        return ref.model_copy(update={"kind": BoundaryKind.CLUSTER, "variant": VARIANT})

    def as_discovered(self, ref: BoundaryRef) -> BoundaryRef:
        return ref

    def another_process(self) -> Boundary:
        return lent_boundary(self.installation, self._kubeconfig, self._image, self._folder)

    def worker_killed_in(self, ref: BoundaryRef) -> None:
        words = [self.installation, str(self._kubeconfig), self._image, str(self._folder), ref.model_dump_json()]
        kill_in_step("tests.cluster.lent", words, lambda: self.running(ref))

    def running(self, ref: BoundaryRef) -> bool:
        return anything_runs(self._engine, namespace_name(_in_its_cluster(ref)), ref.name)


def _be_a_worker() -> None:
    """The process that is killed."""
    installation, kubeconfig, image, folder, ref = sys.argv[1:]
    boundary = lent_boundary(installation, Path(kubeconfig), image, Path(folder))
    with boundary.open(make_spec(), BoundaryRef.model_validate_json(ref), cancelled=Never()) as sandbox:
        print("playing", flush=True)
        sandbox.execute(shell("trap '' TERM INT HUP; sleep 600 & sleep 600", timeout_s=600))


if __name__ == "__main__":
    _be_a_worker()
