"""The end of `make demo-cluster`: a run that has a whole Kubernetes cluster to itself, by kind.

The container engine is the one that BLASTDOOR_KIND_NODE_IMAGE and BLASTDOOR_DOCKER_HOST are about, else one of the
tests. A customer's operator is tried in the cluster (`examples/operator`), and then it is looked for what is left of it
on the engine and on this machine, as it was all the time before, so that finding nothing means something.
"""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from examples.demo import BLASTDOOR, Demo, Disappointed, eventually, say, say_left, title
from workers.boundaries.cluster.engine import Engine, EngineFailed
from workers.boundaries.cluster.kind_render import PREFIX, read_network_name

OPERATOR = Path(__file__).parent / "operator"
WALL = "cluster/kind"
GONE_WITHIN_S = 120.0
_LOOK_S = 2.0
NODE_IMAGE, IMAGE = "BLASTDOOR_KIND_NODE_IMAGE", "BLASTDOOR_KUBE_IMAGE"


def show_own_cluster(folder: Path, failures: list[str], *, only: bool) -> None:
    """`only`: nothing else was asked for; else who gave a cluster of their own need not have an engine as well. Raises
    Disappointed, EngineFailed."""
    if os.environ.get("KUBECONFIG") and not os.environ.get(NODE_IMAGE) and not only:
        title("Not shown: a run in a cluster of its own")
        say(f"{NODE_IMAGE} names no node image for kind (cluster_templates/kind/node-image/README.md)")
        return
    with ground(folder) as there:
        demo = OwnClusterDemo(folder / "own", failures, there=there)
        demo.show()


@dataclass(frozen=True)
class Ground:
    """What makes clusters here, and the image of what runs in them; `archives` hold it, where no node has it."""

    docker: Path
    kind: Path
    docker_host: str
    node_image: str
    image: str
    archives: str

    def settings(self) -> dict[str, str]:
        """With gVisor beside it, for whatever needs no cluster: the platform's own canary."""
        return {
            "BLASTDOOR_BOUNDARIES": '["gvisor", "cluster"]', "BLASTDOOR_DOCKER": str(self.docker),
            "BLASTDOOR_KIND": str(self.kind), "BLASTDOOR_DOCKER_HOST": self.docker_host, NODE_IMAGE: self.node_image,
            IMAGE: self.image, "BLASTDOOR_CLUSTER_ARCHIVES": self.archives, "BLASTDOOR_CLUSTERS_AT_ONCE": "1",
            "BLASTDOOR_PROBE_S": "30", "BLASTDOOR_HOUSEKEEPING_S": "2", "BLASTDOOR_CANARY_S": "600",
        }  # fmt: skip


@contextmanager
def ground(folder: Path) -> Iterator[Ground]:
    if node_image := os.environ.get(NODE_IMAGE):
        yield _given(node_image)
        return
    from tests.cluster.engine.outside import NoLab
    from tests.cluster.engine.run import running_engine
    from tests.cluster.lab.parts import NoParts, Parts
    from tests.cluster.runtime_image import write_runtime

    title("A container engine on this machine, with kind and a node image that has gVisor (tests/cluster/engine)")
    try:
        with running_engine(folder / "engine", say) as engine:
            busybox = Path(Parts.read(engine.state / "config" / "parts.json").program("busybox"))
            applets = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
            archive = folder / "operator.tar"
            image = write_runtime(archive, busybox, applets, more={"bin/kubectl": engine.kubectl})
            say(f"its node image is {engine.node_image}")
            say(f"runs get the image {image}, with kubectl in it")
            yield Ground(
                engine.docker, engine.kind, engine.docker_host, engine.node_image, image, archives=f'["{archive}"]'
            )
            title("Ending the engine")
    except (NoLab, NoParts) as why:
        raise Disappointed(f"no container engine: {why}") from why
    say("its processes, mounts and control groups are gone with it")


def _given(node_image: str) -> Ground:
    found = {name: shutil.which(name) for name in ("docker", "kind")}
    image = os.environ.get(IMAGE, "")
    if "@sha256:" not in image:
        raise Disappointed(
            f"{IMAGE} names no image by digest, with a shell, sed and kubectl in it, for a run in a cluster of its "
            "own; `blastdoor cluster image --help` says how to make one"
        )
    title(f"The container engine that is given, and its node image {node_image}")
    return Ground(
        docker=Path(os.environ.get("BLASTDOOR_DOCKER") or found["docker"] or "/usr/bin/docker"),
        kind=Path(os.environ.get("BLASTDOOR_KIND") or found["kind"] or "/usr/bin/kind"),
        docker_host=os.environ.get("BLASTDOOR_DOCKER_HOST", "unix:///var/run/docker.sock"),
        node_image=node_image, image=image, archives=os.environ.get("BLASTDOOR_CLUSTER_ARCHIVES", "[]"),
    )  # fmt: skip


@dataclass
class OwnClusterDemo(Demo):
    there: Ground = field(kw_only=True)

    def show(self) -> None:
        self.state.mkdir(mode=0o700)
        os.environ.pop("BLASTDOOR_KUBECONFIG", None)
        os.environ |= self.there.settings()
        up = self.start()
        looker = EngineLooker(self.there, self.state, self.sweeper.installation)
        looker.start()
        try:
            if self.is_offered():
                self.play_operator()
        finally:
            self.stop(up)
            looker.stop()
        looker.show(self.failures)
        self.show_processes()

    def is_offered(self) -> bool:
        """As this host says of itself; what is missing is said, too."""
        title("What this host can build:  blastdoor doctor")
        programs = f"{self.there.docker.parent}:{self.there.kind.parent}:{os.environ['PATH']}"
        doctor = subprocess.run(
            [*BLASTDOOR, "doctor"], capture_output=True, text=True, check=False,
            env=dict(os.environ) | {"PATH": programs},
        )  # fmt: skip
        print(doctor.stdout, end="")
        offered = any(line.split()[:2] == [WALL, "yes"] for line in doctor.stdout.splitlines())
        if not offered:
            self.failures.append(f"{WALL} cannot be built here")
        return offered

    def play_operator(self) -> None:
        """As a person would: what takes the seconds is told on standard error as it comes."""
        title("A customer's operator, in a cluster of its own:  blastdoor run examples/operator")
        began = time.monotonic()
        argv = [*BLASTDOOR, "run", str(OPERATOR), "--state", str(self.state)]
        played = subprocess.run(argv, stderr=subprocess.STDOUT, check=False)
        took_s = time.monotonic() - began
        if played.returncode != 0:
            self.failures.append(f"the run in a cluster of its own ended with exit code {played.returncode}")
        items = self.asked("runs", "--limit", "1", "--json")["items"]
        if not items:
            raise Disappointed("there is no run: it was refused")
        run = eventually(lambda: self._destroyed(items[0]["id"]), seconds=GONE_WITHIN_S)
        if run is None:
            self.failures.append("nobody has seen its cluster gone")
            run = self.asked("runs", "show", items[0]["id"], "--json")
        self.show_wall(run, took_s)

    def show_wall(self, run: dict[str, Any], took_s: float) -> None:
        title("What it was")
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), show_header=False)
        for name, value in facts(run, took_s).items():
            table.add_row(name, value)
        Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False).print(table)
        found = (run["evidence"] or {}).get("cluster")
        if run["outcome"] == "passed" and (run["placement"]["boundary"], found) != (WALL, WALL):
            self.failures.append(f"it landed in {run['placement']['boundary']}, in a cluster of {found or 'nobody'}")

    def show_processes(self) -> None:
        title(f"What is left on this machine of installation {self.sweeper.installation}")
        left = self.sweeper.look()
        for kind in ("processes", "ports"):
            most, now = self.sweeper.most.get(kind, 0), left[kind]
            say_left(kind, most, len(now))
            if now or not most:
                self.failures.append(f"{kind} of this machine: {most} seen while it ran, and now {sorted(now)[:5]}")


def facts(run: dict[str, Any], took_s: float) -> dict[str, str]:
    placement, evidence = run["placement"], run["evidence"]
    guarantees = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in placement["guarantees"].items())
    shown = {"wall": placement["boundary"], "why": "\n".join(placement["why"]), "gives": guarantees}
    if evidence is not None:
        policy = evidence["policy"]
        shown |= {
            "cluster": f"{evidence['cluster']}, node {evidence['node']['name']}",
            "runtime": f"{evidence['runtime']} (RuntimeClass {evidence['runtime_class']})",
            "network": f"{evidence['network']}; all else shut for this pod after {policy['shut_after_s']:.2f} s",
            "namespace": f"{evidence['namespace']['name']}, PodSecurity {evidence['namespace']['pod_security']}",
        }
    shown["outcome"] = run["outcome"]
    if run["started_at"]:
        made_s = (_instant(run["started_at"]) - _instant(run["created_at"])).total_seconds()
        shown["took"] = f"{took_s:.0f} s from submission to result, {made_s:.0f} s of it until the first step"
    if run["boundary_destroyed_at"]:
        gone_s = (_instant(run["boundary_destroyed_at"]) - _instant(run["finished_at"])).total_seconds()
        shown["gone"] = f"{gone_s:.0f} s after its result: {run['boundary_destroyed_at']}"
    return shown


def _instant(text: str) -> datetime:
    return datetime.fromisoformat(text)


class EngineLooker:
    """Looks on the engine, and in the state directory, for what is of the installation."""

    def __init__(self, there: Ground, state: Path, installation: str) -> None:
        home = state.parent / "empty"
        home.mkdir(exist_ok=True)
        self._engine = Engine(docker=there.docker, host=there.docker_host, home=home)
        self._state, self._installation = state, installation
        self.most = {"containers": 0, "networks": 0, "directories": 0}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep_looking, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _keep_looking(self) -> None:
        while not self._stopping.wait(_LOOK_S):
            with suppress(EngineFailed):
                for kind, found in self.look().items():
                    self.most[kind] = max(self.most[kind], len(found))

    def look(self) -> dict[str, list[str]]:
        """Raises EngineFailed."""
        mine = {f"{PREFIX}installation": self._installation}
        networks = [(one.id, read_network_name(one.network)) for one in self._engine.containers()]
        return {
            "containers": [id_ for id_, said in networks if said is not None and said[1] == self._installation],
            "networks": [one.name for one in self._engine.networks(labels=mine, read=())],
            "directories": [str(path) for path in self._state.glob("clusters/*/kind/clusters/*")],
        }

    def show(self, failures: list[str]) -> None:
        title("What is left of its cluster, on the engine and on disk")
        for kind, now in self.look().items():
            say_left(kind, self.most[kind], len(now))
            if now or not self.most[kind]:
                failures.append(f"{kind} of clusters: {self.most[kind]} seen while it ran, and now {now}")
