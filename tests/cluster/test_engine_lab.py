"""The engine is a real one: kind makes clusters in it, with two walls and network policy, and no trace stays."""

import ipaddress
import json
import os
import secrets
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster.engine.fixture import engine
from tests.cluster.engine.outside import Engine
from tests.cluster.engine.parts import missing
from tests.cluster.engine.rootfs import SHADOWED
from tests.cluster.engine.run import up
from tests.cluster.lab import cgroups, images, parts
from tests.cluster.lab.client import connect
from tests.cluster.pods import Namespace, eventually, namespace, pod
from tests.cluster.test_lab import (
    GVISORS_OWN_WORDS,
    LOOK_EVERY_S,
    NOTHING_IN,
    NOTHING_OUT,
    kinds,
    put_policy,
    traces,
)
from tests.summary import ran

__all__ = ["engine"]
pytestmark = pytest.mark.timeout(3600 if missing() else 1200)
"""The first test on a new machine pays for building what is not there (`python -m tests.cluster.engine build` does)."""
API_PORT, KUBELET_PORT, PORT = 6443, 10250, 8080
READY_WITHIN = "--wait=8m"
PATIENT = """
kind: InitConfiguration
timeouts:
  kubernetesAPICall: 8m0s
  controlPlaneComponentHealthCheck: 8m0s
  tlsBootstrap: 8m0s
"""
"""For kubeadm: on a machine that is very busy the API server takes longer than its minute to start."""
RUNTIME_CLASS = {"metadata": {"name": "gvisor"}, "handler": "runsc"}
SERVER = f"cd /work && echo hello > index.html && exec httpd -f -p {PORT}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@dataclass(frozen=True)
class KindCluster:
    name: str
    client: httpx.Client
    took_s: float


@pytest.fixture(scope="module")
def cluster(engine: Engine, folder: Path) -> Iterator[KindCluster]:
    """Of one node, as `kind create cluster` makes it."""
    with created(engine, folder) as cluster:
        yield cluster


@contextmanager
def created(engine: Engine, folder: Path, *, nodes: int = 1) -> Iterator[KindCluster]:
    name = f"t-{secrets.token_hex(3)}"
    path = folder / f"{name}.kubeconfig"
    began = time.monotonic()
    create(engine, name, path, nodes=nodes)
    took = time.monotonic() - began
    try:
        with connect(as_json(engine, path)) as client:
            client.post("/apis/node.k8s.io/v1/runtimeclasses", json=RUNTIME_CLASS).raise_for_status()
            yield KindCluster(name, client, took)
    finally:
        engine.run(engine.kind, "delete", "cluster", f"--name={name}", f"--kubeconfig={path}")


def create(engine: Engine, name: str, kubeconfig: Path, *, nodes: int = 1) -> None:
    config = {
        "kind": "Cluster",
        "apiVersion": "kind.x-k8s.io/v1alpha4",
        "nodes": [{"role": "control-plane"}, *({"role": "worker"} for _ in range(nodes - 1))],
        "kubeadmConfigPatches": [PATIENT, PATIENT.replace("Init", "Join")],
    }
    asked = ("create", "cluster", f"--name={name}", f"--image={engine.node_image}", f"--kubeconfig={kubeconfig}")
    engine.run(engine.kind, *asked, READY_WITHIN, "--config=-", input=json.dumps(config).encode())


def as_json(engine: Engine, kubeconfig: Path) -> Path:
    """kind writes YAML."""
    view = [str(engine.kubectl), "config", "view", f"--kubeconfig={kubeconfig}", "--raw", "--output=json"]
    said = subprocess.run(view, capture_output=True, check=True).stdout
    path = kubeconfig.with_suffix(".json")
    path.write_bytes(said)
    return path


@pytest.fixture
def room(cluster: KindCluster) -> Iterator[Namespace]:
    with namespace(cluster.client, f"room-{secrets.token_hex(4)}") as room:
        yield room


# --- A cluster ------------------------------------------------------------------------------------------------------


def test_kind_makes_a_cluster_that_is_ready(cluster: KindCluster) -> None:
    ran("kind create cluster", f"{cluster.took_s:.0f} s")
    (node,) = nodes_of(cluster)
    assert node["metadata"]["name"] == f"{cluster.name}-control-plane"
    assert {one["type"]: one["status"] for one in node["status"]["conditions"]}["Ready"] == "True"
    assert node["status"]["nodeInfo"]["kubeletVersion"] == f"v{parts.KUBERNETES}"


def test_its_own_pods_run_and_names_are_resolved(cluster: KindCluster, room: Namespace) -> None:
    pods = "/api/v1/namespaces/kube-system/pods"

    def phases() -> dict[str, str]:
        listed = cluster.client.get(pods).raise_for_status().json()["items"]
        return {one["metadata"]["name"]: one["status"]["phase"] for one in listed}

    eventually(lambda: set(phases().values()) == {"Running"}, lambda: str(phases()))
    asked = pod("asks", "until nslookup kubernetes.default.svc.cluster.local; do sleep 1; done")
    assert "10.96.0.1" in room.ran(asked)


def test_a_pod_under_runc_sees_this_machines_kernel_and_one_under_gvisor_does_not(room: Namespace) -> None:
    assert room.ran(pod("plain", "uname -r")).strip() == os.uname().release
    walled = room.ran(pod("walled", "uname -r; dmesg", runtime="gvisor"))
    assert GVISORS_OWN_WORDS in walled
    assert walled.split()[0] != os.uname().release


@pytest.mark.parametrize("runtime", [None, "gvisor"])
def test_a_pod_that_takes_more_memory_than_its_limit_is_killed_for_it(room: Namespace, runtime: str | None) -> None:
    greedy = pod("greedy", "tail /dev/zero", runtime=runtime, resources={"limits": {"memory": "64Mi"}})
    ended = room.in_phase(room.start(greedy), "Failed")["status"]["containerStatuses"][0]["state"]["terminated"]
    assert ended["reason"] == "OOMKilled"


def test_an_image_that_kind_loads_runs(engine: Engine, cluster: KindCluster, room: Namespace, folder: Path) -> None:
    name = f"blastdoor.test/mine:{secrets.token_hex(4)}"
    with shell(engine) as tree:
        images.write_tree(folder / "mine.tar", name, tree)
    engine.run(engine.kind, "load", "image-archive", str(folder / "mine.tar"), f"--name={cluster.name}")
    assert room.ran(pod("mine", "echo hello", image=name)) == "hello\n"


# --- Network policy -------------------------------------------------------------------------------------------------


@pytest.fixture
def server(room: Namespace) -> str:
    """The address of a pod that answers on port 8080."""
    room.start(pod("server", SERVER))
    address: str = room.in_phase("server", "Running")["status"]["podIP"]
    return address


@pytest.mark.parametrize("runtime", [None, "gvisor"])
@pytest.mark.parametrize("spec", [NOTHING_OUT, NOTHING_IN], ids=["out", "in"])
def test_a_policy_blocks_what_passes_without_it(
    room: Namespace, server: str, spec: dict[str, object], runtime: str | None
) -> None:
    newest = caller(room, "caller", server, PORT, runtime=runtime)
    eventually(lambda: newest() == "open")
    policy = put_policy(room, spec)
    eventually(lambda: newest() == "shut")
    room.client.delete(policy).raise_for_status()
    eventually(lambda: newest() == "open")


@pytest.mark.parametrize("runtime", [None, "gvisor"])
def test_a_pod_may_reach_the_api_server_and_nothing_else(
    cluster: KindCluster, room: Namespace, server: str, runtime: str | None
) -> None:
    (node,) = nodes_of(cluster)
    host = address_of(node)
    to_api = caller(room, "to-api", host, API_PORT, runtime=runtime)
    to_kubelet = caller(room, "to-kubelet", host, KUBELET_PORT, runtime=runtime)
    to_pod = caller(room, "to-pod", server, PORT, runtime=runtime)
    eventually(lambda: to_api() == to_kubelet() == to_pod() == "open")
    block = {"ipBlock": {"cidr": str(ipaddress.ip_network(host))}}
    put_policy(room, NOTHING_OUT | {"egress": [{"to": [block], "ports": [{"port": API_PORT, "protocol": "TCP"}]}]})
    eventually(lambda: to_kubelet() == to_pod() == "shut")
    assert to_api() == "open"


def test_a_pod_may_reach_those_that_it_is_told_of_and_no_other(room: Namespace, server: str) -> None:
    room.start(pod("stranger", SERVER))
    stranger: str = room.in_phase("stranger", "Running")["status"]["podIP"]
    to_server, to_stranger = (
        caller(room, f"to-{name}", address, PORT) for name, address in (("server", server), ("stranger", stranger))
    )
    eventually(lambda: to_server() == to_stranger() == "open")
    named = {"podSelector": {"matchLabels": {"name": "server"}}}
    put_policy(room, NOTHING_OUT | {"egress": [{"to": [named], "ports": [{"port": PORT}]}]})
    eventually(lambda: to_stranger() == "shut")
    assert to_server() == "open"


def caller(
    place: Namespace, name: str, address: str, port: int, *, runtime: str | None = None, **spec: Any
) -> Callable[[], str]:
    """A pod that goes on calling -> a function that says how its newest calls went: "open" or "shut"."""
    call = f"nc -w 1 {address} {port} < /dev/null > /dev/null 2>&1"
    calling = pod(name, f"while true; do {call} && echo open || echo shut; sleep {LOOK_EVERY_S}; done", runtime=runtime)
    calling["spec"] |= spec
    place.in_phase(place.start(calling), "Running")

    def newest() -> str:
        calls = place.log(name).split()[-2:]
        return calls[0] if len(set(calls)) == 1 else "both"

    return newest


# --- More than one --------------------------------------------------------------------------------------------------


def test_pods_on_two_nodes_reach_each_other_and_a_policy_holds_between_them(engine: Engine, folder: Path) -> None:
    with created(engine, folder, nodes=2) as two, namespace(two.client, "wide") as room:
        ran("kind create cluster, two nodes", f"{two.took_s:.0f} s")
        first, second = (node["metadata"]["name"] for node in nodes_of(two))
        there = pod("server", SERVER)
        there["spec"]["nodeName"] = first
        address = room.in_phase(room.start(there), "Running")["status"]["podIP"]
        newest = caller(room, "caller", address, PORT, nodeName=second)
        eventually(lambda: newest() == "open")
        put_policy(room, NOTHING_IN)
        eventually(lambda: newest() == "shut")


def nodes_of(cluster: KindCluster) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = cluster.client.get("/api/v1/nodes").raise_for_status().json()["items"]
    return found


def address_of(node: dict[str, Any]) -> str:
    found: str = next(one["address"] for one in node["status"]["addresses"] if one["type"] == "InternalIP")
    return found


# --- Its door, and what it may not touch ----------------------------------------------------------------------------


def test_a_published_port_is_open_out_here_for_as_long_as_its_container_lives(engine: Engine, folder: Path) -> None:
    name = f"blastdoor.test/shell:{secrets.token_hex(4)}"
    with shell(engine) as tree:
        subprocess.run(["tar", "--create", f"--file={folder / 'shell.tar'}", f"--directory={tree}", "."], check=True)
    engine.run(engine.docker, "import", str(folder / "shell.tar"), name)
    port = free_port()
    assert not is_open(port)
    publish = f"--publish=127.0.0.1:{port}:{PORT}"
    engine.run(engine.docker, "run", "--detach", "--name=web", publish, name, "httpd", "-f", "-p", str(PORT))
    try:
        eventually(lambda: is_open(port))
        assert httpx.get(f"http://127.0.0.1:{port}/bin/", trust_env=False).status_code == httpx.codes.NOT_FOUND
    finally:
        engine.run(engine.docker, "rm", "--force", "web")
        engine.run(engine.docker, "rmi", name)
    eventually(lambda: not is_open(port))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as door:
        port: int = door.getsockname()[1]
        return port


def is_open(port: int) -> bool:
    with socket.socket() as asked:
        return asked.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def shell(engine: Engine) -> Iterator[Path]:
    """The tree of an image with little in it."""
    with tempfile.TemporaryDirectory() as tree:
        programs = Path(tree, "bin")
        programs.mkdir()
        for program in ("sh", "httpd"):
            (programs / program).write_bytes(engine.parts.program("busybox").read_bytes())
            (programs / program).chmod(0o755)
        yield Path(tree)


def test_a_cluster_changes_nothing_of_the_whole_machine(engine: Engine, cluster: KindCluster) -> None:
    """The kubelet would: it sets these, and in a node sees files of its own in their place."""
    kubelet = process(engine, "kubelet")
    there = {name: Path(f"/proc/{kubelet}/root/proc/sys", name).read_text().strip() for name in SHADOWED}
    assert there == SHADOWED
    assert {name: Path("/proc/sys", name).read_text().strip() for name in SHADOWED} != SHADOWED
    assert not links() & {"docker0", "kind"}


def process(engine: Engine, program: str) -> int:
    for pid in cgroups.processes(engine.lab.cgroup):
        if Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].rpartition(b"/")[2] == program.encode():
            return pid
    raise AssertionError(f"no {program} runs in the engine")


def links() -> set[str]:
    return {name for _, name in socket.if_nameindex()}


# --- Its end --------------------------------------------------------------------------------------------------------


def test_a_deleted_cluster_leaves_nothing_in_the_engine(engine: Engine, folder: Path, cluster: KindCluster) -> None:
    before = belongings(engine)
    groups = groups_of(engine)
    with created(engine, folder) as mine:
        port = mine.client.base_url.port
        assert port
        assert is_open(port)
        assert belongings(engine) > before
        assert groups_of(engine) > groups
    assert belongings(engine) == before
    eventually(lambda: not is_open(port))
    eventually(lambda: groups_of(engine) == groups)
    assert cluster.client.get("/readyz").is_success


def belongings(engine: Engine) -> set[str]:
    """Containers, volumes and networks; kind's network of that name stays, as everywhere, for the clusters to come."""
    asked = (("ps", "--all", "--quiet"), ("volume", "ls", "--quiet"), ("network", "ls", "--quiet"))
    return {one for ask in asked for one in engine.run(engine.docker, *ask).split()}


def groups_of(engine: Engine) -> set[Path]:
    """The containers' control groups."""
    name = engine.lab.cgroup.lstrip("/")
    return {path for root in cgroups.hierarchies() for path in (root / name).iterdir() if path.is_dir()}


def test_a_killed_engine_leaves_no_process_mount_or_link_and_its_end_leaves_nothing(engine: Engine) -> None:
    outer = links()
    with tempfile.TemporaryDirectory(prefix="bd-engine-") as short, tempfile.TemporaryDirectory() as kubeconfigs:
        mine = up(Path(short, "state"), print)
        held: list[int] = []
        try:
            assert mine.lab.cgroup != engine.lab.cgroup  # two at once, and the end of one is not the other's
            dockerd = process(mine, "dockerd")
            # Held, so that the number of none of them is given to somebody else's, who would then look like ours.
            held = [os.open(f"/proc/{dockerd}/ns/{kind}", os.O_RDONLY) for kind in ("mnt", "net", "pid")]
            worlds = {os.readlink(f"/proc/self/fd/{world}") for world in held}
            kubeconfig = Path(kubeconfigs, "kubeconfig")
            create(mine, f"k-{secrets.token_hex(3)}", kubeconfig)
            with connect(as_json(mine, kubeconfig)) as client:
                port = client.base_url.port
                assert port
                assert client.get("/readyz").is_success
            assert kinds(traces(mine.lab, worlds)) == {"process", "mount", "cgroup", "folder"}
            assert mine.pid
            os.kill(mine.pid, signal.SIGKILL)
            eventually(lambda: kinds(traces(mine.lab, worlds)) == {"cgroup", "folder"})
            eventually(lambda: not is_open(port))
        finally:
            mine.end()
        assert traces(mine.lab, worlds) == []
        assert not mine.state.exists()
    assert not {link for link in links() - outer if link.startswith(("br-", "docker"))}
    assert engine.run(engine.docker, "version")
    for world in held:
        os.close(world)
