"""How long a run takes in a cluster of its own, beside the same by hand: `kind create cluster`, the same pod, one exec,
`kind delete cluster`; and how soon a run begins in a standby cluster, beside the same pod by hand in that very cluster.

Interleaved, with the same node image and the same archive of the pod's image. The engine is the tests' own
(tests/cluster/engine). Memory is what the engine says of a node's container; clusters at once, how many this machine
holds by that.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from service.core.boundary import BoundaryKind, BoundaryRef, BoundarySpec, ClusterChoices
from service.core.controls import Limits, Network
from service.core.ids import new_run_id
from tests.bench.live import Client, form, must_pass, progress, running, scratch
from tests.bench.pods import FORM, SCENARIO
from tests.cluster.engine.outside import Engine
from tests.cluster.engine.parts import build
from tests.cluster.engine.run import running_engine
from tests.cluster.runtime_image import write_runtime
from tests.sandboxes import Never, shell
from workers.boundaries.cluster.driver import ClusterBoundary
from workers.kube import Cluster
from workers.pods.pod import is_running
from workers.pods.render import CONTAINER, LISTENER_PORT, render_namespace, render_pod

PAIRS = int(os.environ.get("BENCH_CLUSTERS", "3"))
WITHIN_S = 600.0
CONTROLS = '{"isolation": "dedicated-cluster"}'
_SIZE = re.compile(r"([\d.]+)([KMG]i)B")


def measure(runsc: Path) -> dict[str, Any]:
    with scratch() as place, _engine() as engine:
        archive = place / "run.tar"
        image = _image(archive)
        return _cold(engine, archive, image, place) | _standby(engine, archive, image, place)


@contextmanager
def _engine() -> Iterator[Engine]:
    with tempfile.TemporaryDirectory(prefix="bd-engine-") as folder, running_engine(Path(folder) / "e", _say) as engine:
        yield engine


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _image(archive: Path) -> str:
    busybox = Path(build(_say).program("busybox"))
    applets = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
    return write_runtime(archive, busybox, applets)


# --- POST to result, in a cluster that is made for it ----------------------------------------------------------------


def _cold(engine: Engine, archive: Path, image: str, place: Path) -> dict[str, Any]:
    settings = {
        "boundaries": '["cluster"]', "cluster_images": json.dumps({"default": image}),
        "cluster_archives": json.dumps([str(archive)]), "docker": engine.docker, "docker_host": engine.docker_host,
        "kind": engine.kind, "kind_node_image": engine.node_image, "canary_s": 3600,
    }  # fmt: skip
    ours, by_hand, bytes_ = [], [], []
    with running(**settings) as service:
        for number in range(PAIRS):
            progress(f"clusters {number + 1}/{PAIRS}")
            with service.client() as client:  # the API lets go of a connection on which nothing is asked for long
                ours.append(_one(client))
            took_s, held = _by_hand(engine, archive, image, place)
            by_hand.append(took_s)
            bytes_.append(held)
    run, bare, memory = statistics.median(ours), statistics.median(by_hand), statistics.median(bytes_)
    return {
        "kind_cold_ratio": run / bare,
        "kind_run_p50_s": run,
        "kind_bare_p50_s": bare,
        "kind_cluster_memory_mib": memory / 2**20,
        "kind_clusters_at_once": int(_free_bytes() // memory),
    }


def _one(client: Client) -> float:
    """POST to result -> seconds; returns when its cluster is gone."""
    started = time.monotonic()
    run = client.finished(client.ask("POST", "/v1/runs", form(scenario=SCENARIO, controls=CONTROLS), **FORM))
    took_s = time.monotonic() - started
    must_pass(run)
    while not client.ask("GET", f"/v1/runs/{run['id']}")["boundary_destroyed_at"]:
        time.sleep(0.2)
    return took_s


def _by_hand(engine: Engine, archive: Path, image: str, place: Path) -> tuple[float, float]:
    """-> seconds, and bytes of memory while the pod was there."""
    name, kubeconfig = f"bare-{time.time_ns():x}", place / "bare.kubeconfig"
    started = time.monotonic()
    engine.run(
        engine.kind, "create", "cluster", f"--name={name}", f"--image={engine.node_image}",
        f"--kubeconfig={kubeconfig}", "--wait=5m",
    )  # fmt: skip
    engine.run(engine.kind, "load", "image-archive", str(archive), f"--name={name}")
    cluster = Cluster.from_kubeconfig(kubeconfig)
    cluster.apply(
        {"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "gvisor"}, "handler": "runsc"}
    )
    _pod_by_hand(cluster, image, namespace="default")
    before_s, held, after = time.monotonic() - started, _held(engine, name), time.monotonic()
    engine.run(engine.kind, "delete", "cluster", f"--name={name}", f"--kubeconfig={kubeconfig}")
    cluster.close()
    return before_s + time.monotonic() - after, held


def _pod_by_hand(cluster: Cluster, image: str, *, namespace: str) -> None:
    """As ours is, in a namespace that is there: created, seen to run, one exec."""
    ref = _ref()
    words = ["first", "127.0.0.1", str(LISTENER_PORT)]  # nobody is there: no wait for network policy
    manifest = render_pod(ref, BoundarySpec(limits=Limits(), network=Network()), image=image, words=words, seconds=60)
    manifest["metadata"]["namespace"] = namespace
    if namespace == "default":  # nothing is installed there
        del manifest["spec"]["priorityClassName"]
        manifest["spec"]["serviceAccountName"] = "default"
    _until_taken(cluster, manifest)
    for _, pod in cluster.watch("Pod", namespace, name=ref.name, seconds=WITHIN_S):
        if is_running(pod):
            break
    ended = cluster.exec_(
        namespace, ref.name, CONTAINER, ["/bin/echo", "hello"], on_output=lambda *_: None,
        deadline=time.monotonic() + WITHIN_S,
    )  # fmt: skip
    if ended.exit_code != 0:
        raise SystemExit(f"the bare pod's program: {ended}")


def _until_taken(cluster: Cluster, manifest: dict[str, Any]) -> None:
    """A new cluster makes its service accounts when it gets to it."""
    while (
        cluster.get("ServiceAccount", manifest["spec"]["serviceAccountName"], manifest["metadata"]["namespace"]) is None
    ):
        time.sleep(0.1)
    cluster.create(manifest, ours=manifest["metadata"]["labels"])


def _held(engine: Engine, name: str) -> float:
    """Bytes, as the engine counts a node's container."""
    said = engine.run(engine.docker, "stats", "--no-stream", "--format={{.MemUsage}}", f"{name}-control-plane")
    match = _SIZE.match(said)
    if match is None:
        raise SystemExit(f"the engine says of memory: {said}")
    return float(match[1]) * {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}[match[2]]


def _free_bytes() -> float:
    rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return float(rows["MemAvailable"].split()[0]) * 1024


# --- a standby cluster: from its claim to the first step -------------------------------------------------------------


class _Here:
    """A host (`service.core.boundary.Host`) that keeps one."""

    installation, site = "0" * 32, "bench"
    runtime_dir = runsc = Path("/nonexistent")
    kubeconfig, namespace_variants = None, ()

    def __init__(self, engine: Engine, archive: Path, image: str, state: Path) -> None:
        self.kube_image, self.state_dir = image, state
        self.clusters = ClusterChoices(
            provisioners=("kind",), archives=(archive,), standby=1, kind=engine.kind, docker=engine.docker,
            docker_host=engine.docker_host, node_image=engine.node_image,
        )  # fmt: skip


def _standby(engine: Engine, archive: Path, image: str, place: Path) -> dict[str, Any]:
    boundary = ClusterBoundary.for_host(_Here(engine, archive, image, place / "standby"))
    claimed, by_hand = [], []
    for number in range(PAIRS):
        progress(f"standby {number + 1}/{PAIRS}")
        while boundary.standing()["ready"] < 1:
            boundary.keep(cancelled=Never())
        ref = _ref().model_copy(update={"kind": BoundaryKind.CLUSTER, "variant": "kind"})
        started = time.monotonic()
        with boundary.open(_spec(), ref, cancelled=Never()) as sandbox:
            sandbox.execute(shell("echo hello"))
            claimed.append(time.monotonic() - started)
            (kubeconfig,) = (place / "standby").glob("clusters/*/kind/clusters/*/kubeconfig")
            by_hand.append(_in_that_cluster(kubeconfig, image))
        boundary.destroy(ref)
    boundary.keep_none()
    ours, bare = statistics.median(claimed), statistics.median(by_hand)
    return {"kind_standby_claim_ratio": ours / bare, "kind_standby_claim_p50_s": ours, "kind_standby_bare_p50_s": bare}


def _in_that_cluster(kubeconfig: Path, image: str) -> float:
    """The same pod by hand, in a namespace of its own that is there before."""
    from workers.kube.install import ENGINE

    engine_user = Cluster.from_kubeconfig(kubeconfig, acting_as=ENGINE)
    ref = _ref()
    for manifest in render_namespace(ref, _spec()):
        engine_user.apply(manifest)
    words = ["first", "127.0.0.1", str(LISTENER_PORT)]
    manifest = render_pod(ref, _spec(), image=image, words=words, seconds=60)
    time.sleep(1)  # its quota is counted
    started = time.monotonic()
    engine_user.create(manifest, ours=manifest["metadata"]["labels"])
    for _, pod in engine_user.watch("Pod", ref.name, name=ref.name, seconds=WITHIN_S):
        if is_running(pod):
            break
    engine_user.exec_(
        ref.name, ref.name, CONTAINER, ["/bin/echo", "hello"], on_output=lambda *_: None,
        deadline=time.monotonic() + WITHIN_S,
    )  # fmt: skip
    took_s = time.monotonic() - started
    engine_user.close()
    return took_s


def _spec() -> BoundarySpec:
    return BoundarySpec(limits=Limits(), network=Network())


def _ref() -> BoundaryRef:
    return BoundaryRef(
        installation="0" * 32, kind=BoundaryKind.NAMESPACE, variant="gvisor", site="bench", tenant="bench",
        run_id=new_run_id(), fence=1, expires_at=datetime.now(UTC) + timedelta(hours=1),
    )  # fmt: skip
