"""Two untrusted tenants with a whole cluster each, from POST to result: a real worker, real kind on a real engine,
gVisor in the nodes. The first has the API of its own and waits; the second attacks: D21 to D30 with the corpus'
programs.

One scene, since a cluster takes this machine half a minute at best. The attacker plays all of it twice in one pod: as
its walls are, and, as the control, after one thing is opened for each attack: network policy, a token of its own,
/work.

Where the expectation differs from that of the boundary `gvisor`: as in test_escape_isolation.py (D23: the guest can end
its own pod's first process, and with it its own sandbox) and test_escape_network.py (a packet is made, and dropped on
the node). Without policy the API server's port is reached and nothing else, by the rules in the node; without these as
well the node is, and the engine's host. Another cluster never: the engine keeps networks apart.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster.dedicated_ground import Ground, run_ground
from tests.cluster.ears import METADATA, Ears, listening
from tests.cluster.engine.fixture import engine
from tests.cluster.engine.outside import Engine
from tests.cluster.python_image import python_files
from tests.cluster.test_escape_network import ask
from tests.escape import test_whole_way_isolation as corpus
from tests.escape.whole_way import everything_of, fingerprint, new_token, program
from tests.sse import watching
from tests.stack import Document, finished, post, python, submit
from tests.summary import ran
from tests.sweep import sweep
from workers.boundaries.cluster.stranger import KNOWN_TOKEN, answer
from workers.conformance import programs
from workers.kube import Cluster
from workers.kube.install import ENGINE
from workers.pods.own_api import NAMESPACE

__all__ = ["engine"]
pytestmark = pytest.mark.timeout(1500)
WITHIN_S = 800.0
"""Beside other tests: idle it takes a tenth of this."""
LIMITS = {"wall": "840s", "memory": "384MiB"}
API_PORT, KUBELET_PORT, ETCD_PORT, EAR_PORT = 6443, 10250, 2379, 8700
SERVICE_OF_API = ("10.96.0.1", 443)
MOUNTS = ("/usr", "/etc", "/tmp", "/work")
SUBNETS = tuple(f"172.{n}.0" for n in range(18, 22))
"""Which the engine gives its networks, in this order: `.1` is its host, `.2` the node."""
KEEP = (
    'printf %s "$TOKEN" > secret; until kubectl get configmap go; do sleep 1; done; test "$(cat secret)" = "$TOKEN"'
    " && echo unharmed"
)
WRITE = "kubectl create configmap kept --from-literal=x=1 && kubectl get configmap kept -o name"
SECRET = "/var/lib/kubelet/pods/*/volumes/kubernetes.io~empty-dir/scratch/work/secret"
ENVIRONMENT = python("import json,os; print(json.dumps([dict(os.environ), os.getcwd(), os.getuid()]))")
OPENED = "opened "


@dataclass(frozen=True)
class Scene:
    """Both runs when they had ended. `told`: what a watcher was told while the first one's cluster was made. `foreign`:
    tokens that must not come out, by where they were; `own`: what the attacker's controls have in their environment.
    `audited`: guests' requests that the attacker's API server noted, before policy was opened and after. `host`: what
    it was like before and after."""

    one: Document
    other: Document
    seen: bytes
    told: list[str]
    first: str
    second: str
    gateway: str
    foreign: Mapping[str, str]
    own: str
    mark: str
    audited: tuple[int, int]
    host: tuple[Any, Any]
    known_token: int | None
    ears: Ears

    def text(self, step: str) -> str:
        for run in (self.other, self.one):
            for row in run["steps"]:
                if row["name"] == step:
                    return str(row["stdout"]["text"])
        raise AssertionError(f"no step {step}")

    def said(self, step: str, word: str) -> list[str]:
        return [line.removeprefix(word).strip() for line in self.text(step).splitlines() if line.startswith(f"{word} ")]


@pytest.fixture(scope="module")
def ground(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    with run_ground(engine, tmp_path_factory.mktemp("dedicated"), more=python_files()) as made:
        yield made


@pytest.fixture(scope="module")
def host_file() -> Iterator[Path]:
    """A file that anybody on this host may read: only the wall is in the way."""
    directory = Path("/var/tmp") / f"bd-canary-{new_token()}"
    directory.mkdir(mode=0o755)
    path = directory / "canary"
    path.write_text(new_token())
    path.chmod(0o644)
    yield path
    path.unlink()
    directory.rmdir()


@pytest.fixture(scope="module")
def scene(ground: Ground, host_file: Path) -> Scene:
    one, other = ground.stack.tenant, ground.stack.new_tenant("another")
    secret, own, mark = new_token(), new_token(), new_token()
    waiting = submit(one, *steps_of_one(), env={"TOKEN": secret}, limits=LIMITS, controls={"needs": ["kubernetes-api"]})
    told = told_until(one, waiting, "keep")
    gateway = ground.gateway_of(waiting)
    secrets_file = ground.in_node(waiting, f"until test -s {SECRET}; do sleep 1; done; ls {SECRET}").strip()
    assert ground.in_node(waiting, f"cat {secrets_file}") == secret, "control: it is there to be found"
    files = [str(host_file), secrets_file, str(ground.kubeconfig(waiting))]
    with listening(ground.engine.lab, new_token(), beside="dockerd", addresses=[METADATA[0], gateway]) as ears:
        before = as_it_is()
        rows = [*attacks(mark, files), *without_policy(), until_opened(gateway), *attacks(mark, [], own=own), last(own)]
        attacking = submit(other, *rows, limits=LIMITS, controls={"isolation": "dedicated-cluster"})
        told_until(other, attacking, "until policy is open")
        held_back = audited(ground, attacking)
        second = ground.address_of(attacking)
        reached_by_host(ground, ground.address_of(waiting))
        open_policy(ground, attacking)
        told_until(other, attacking, "until opened")
        known_token = by_known_token(ground, attacking)
        for chain in ("TO-NODE", "BEYOND"):
            ground.in_node(attacking, f"iptables -w -t mangle -F BLASTDOOR-{chain}")
        told_until(other, attacking, "last")
        let_through = audited(ground, attacking)
        attacked = finished(other, attacking, within_s=WITHIN_S)
        assert any(row["stdout"]["text"] for row in attacked["steps"] if row["name"] == "last"), attacked
        after = as_it_is()
    first = ground.address_of(waiting)
    say_go(ground, waiting)
    done = finished(one, waiting, within_s=WITHIN_S)
    foreign = {
        "the worker's environment": ground.stack.token,
        "the installation": ground.stack.installation,
        "another run": secret,
        "another run's id": waiting,
        "a file of the host": host_file.read_text(),
        "the tenant's key": ground.stack.ready["tenant_key"],
    }
    return Scene(
        one=done, other=attacked, seen=everything_of(other, attacked), told=told, first=first, second=second,
        gateway=gateway, foreign=foreign, own=own, mark=mark, audited=(held_back, let_through), host=(before, after),
        known_token=known_token, ears=ears,
    )  # fmt: skip


def steps_of_one() -> list[Document]:
    nodes = [(f"{net}.2", port) for net in SUBNETS[:2] for port in (API_PORT, KUBELET_PORT)]
    targets = [*nodes, (METADATA[0], 80), *((f"{net}.1", EAR_PORT) for net in SUBNETS[:2])]
    return [
        {"name": "keep", "run": KEEP, "timeout": "780s"},
        {"name": "one writes", "run": WRITE},
        {"name": "one connects", "run": program(programs.CONNECT, targets=targets)},
    ]


def attacks(mark: str, files: list[str], *, own: str | None = None) -> list[Document]:
    """`own`: of the control, in the environment of each step, and /work is among the places."""
    before = OPENED if own else ""
    mark += "-opened" if own else ""
    mounting = {"mark": mark, "places": MOUNTS}
    places = [*corpus.TestD22Writing.NEW, *(["/work"] if own else [])]
    rows: dict[str, Any] = {
        "proc": program(programs.SEARCH_PROC),
        "write": program(
            programs.WRITE_PLACES,
            new=[f"{place.rstrip('/')}/{mark}-new" for place in places], settings=corpus.TestD22Writing.SETTINGS,
        ),
        "mount": program(programs.MOUNT_OVER, **mounting, private=not own),
        "marks": program(programs.LOOK_FOR_MARK, **mounting | {"places": (*MOUNTS, "/usr/bin")}),
        "files": program(
            programs.SEARCH_FILES, sockets=corpus.TestD25Files.SOCKETS, devices=corpus.TestD25Files.DEVICES,
            nodes=((1, 1), (8, 0), (10, 232)), trees=corpus.TestD25Files.TREES,
            files=[*files, "/var/lib/kubelet/config.yaml", "/etc/kubernetes/admin.conf"],
        ),
        "environment": ENVIRONMENT,
        "connect": program(programs.CONNECT, targets=targets()),
        "resolve": program(
            programs.RESOLVE, name=f"{mark}.canary.test", targets=[(METADATA[0], 53), (f"{SUBNETS[0]}.1", 53)]
        ),
        "ask": python(ask(SERVICE_OF_API, *((f"{net}.2", API_PORT) for net in SUBNETS[:3]))),
    }  # fmt: skip
    env = {"env": {"TOKEN": own}} if own else {}
    return [{"name": before + name, "run": run, "always": True, "timeout": "120s"} | env for name, run in rows.items()]


def targets() -> list[tuple[str, int]]:
    nodes = [(f"{net}.2", port) for net in SUBNETS[:3] for port in (API_PORT, KUBELET_PORT)]
    return [*nodes, (f"{SUBNETS[1]}.2", ETCD_PORT), SERVICE_OF_API, (METADATA[0], 80), (f"{SUBNETS[0]}.1", EAR_PORT)]


def without_policy() -> list[Document]:
    """What is tried when policy is open, and the rules of the node stand."""
    command = f"until nc -w 1 {SUBNETS[1]}.2 {API_PORT} < /dev/null; do sleep 1; done"
    connect = program(programs.CONNECT, targets=targets())
    return [
        {"name": "until policy is open", "run": command, "always": True, "timeout": "300s"},
        {"name": "connect without policy", "run": connect, "always": True, "timeout": "120s"},
    ]


def until_opened(gateway: str) -> Document:
    """Nobody tells it: what it waits for is that it gets through."""
    command = f"until nc -w 1 {gateway} {EAR_PORT} < /dev/null > heard; do sleep 1; done"
    return {"name": "until opened", "run": command, "always": True, "timeout": "300s"}


def last(own: str) -> Document:
    return {"name": "last", "run": program(programs.REACH_PROCESSES), "always": True, "env": {"TOKEN": own}}


def told_until(client: httpx.Client, run_id: str, step: str) -> list[str]:
    """What a watcher is told of the making, until this step plays."""
    told = []
    with watching(client, run_id, timeout_s=WITHIN_S) as events:
        for event in events:
            if event.event == "progress" and event.json["stage"] == "boundary" and event.json["text"]:
                told.append(str(event.json["text"]))
            if event.event == "progress" and event.json["stage"] == "step" and event.json["name"] == step:
                return told
    raise AssertionError(f"{step} was never played; told: {told}")


def audited(ground: Ground, run_id: str) -> int:
    """How many requests of a guest its API server noted."""
    return int(ground.in_node(run_id, "grep -c from=guest /var/log/kubernetes/audit.log || true"))


def by_known_token(ground: Ground, run_id: str) -> int | None:
    """What its bearer is told, where the administrator is let in and a secret with that token stands."""
    path = ground.kubeconfig(run_id)
    cluster = Cluster.from_kubeconfig(path)
    cluster.raw("GET", "/api")
    identity, _, _ = KNOWN_TOKEN.partition(".")
    cluster.raw("GET", f"/api/v1/namespaces/kube-system/secrets/bootstrap-token-{identity}")  # or it is refused
    cluster.close()
    return answer(path, "/api", token=KNOWN_TOKEN, within_s=10)


def reached_by_host(ground: Ground, address: str) -> None:
    """The control of all that does not reach the first one's node: it answers to who is let through."""
    reach = f"import socket; socket.create_connection(({address!r}, {API_PORT}), 5)"
    ground.engine.lab.beside("dockerd", "python3", "-c", reach)


def open_policy(ground: Ground, run_id: str) -> None:
    """As the engine, in the pod's namespace: the only thing that the control of the network's attacks opens."""
    cluster = Cluster.from_kubeconfig(ground.kubeconfig(run_id), acting_as=ENGINE)
    (pod,) = cluster.list("Pod", labels={"blastdoor.dev/run": run_id})
    cluster.apply(
        {
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"name": "control", "namespace": pod["metadata"]["namespace"]},
            "spec": {"podSelector": {}, "policyTypes": ["Egress"], "egress": [{}]},
        }
    )  # fmt: skip
    cluster.close()


def say_go(ground: Ground, run_id: str) -> None:
    cluster = Cluster.from_kubeconfig(ground.kubeconfig(run_id))
    cluster.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "go", "namespace": NAMESPACE}})
    cluster.close()


def as_it_is() -> Any:
    """Of this host: a digest of its files, and the kernel's settings."""
    return fingerprint(*corpus.HOST), corpus.settings()


# --- Two clusters, side by side ---------------------------------------------------------------------------------------


def test_both_landed_in_a_cluster_by_kind_behind_gvisor_and_say_so(scene: Scene) -> None:
    """As the walls were when each ended: those of the second stood open by then, for the controls."""
    for run, network in ((scene.one, "own-api"), (scene.other, "open")):
        evidence, placement = run["evidence"], run["placement"]
        assert placement["boundary"] == evidence["cluster"] == "cluster/kind"
        assert placement["guarantees"] == {"kernel": "sandboxed", "nodes": "shared", "control_plane": "dedicated"}
        assert (evidence["runtime_class"], evidence["runtime"]) == ("gvisor", "runsc")
        assert evidence["network"] == network
        ran("boundary", "cluster/kind")
    assert scene.one["outcome"] == "passed", scene.one


def test_a_watcher_is_told_what_takes_the_seconds(scene: Scene) -> None:
    assert {
        "preparing nodes", "writing configuration", "starting control-plane", "getting the cluster ready",
        "making the pod", "checking its walls",
    } <= set(scene.told)  # fmt: skip


def test_the_attacked_neighbour_is_unharmed_and_writes_in_its_own_cluster(scene: Scene) -> None:
    assert scene.text("keep").endswith("unharmed\n")
    assert scene.text("one writes").endswith("configmap/kept\n")


def test_one_reaches_its_own_api_server_and_neither_kubelet_metadata_host_nor_the_other(scene: Scene) -> None:
    assert scene.said("one connects", "REACHED") == [f"{scene.first} {API_PORT}"]


def test_their_clusters_cannot_reach_each_other_even_without_policy(scene: Scene) -> None:
    """While this host reached it, or there would be no scene."""
    assert (scene.first, scene.second) == tuple(f"{net}.2" for net in SUBNETS[:2]), "those that were tried"
    assert not any(scene.first in line for line in scene.said("opened connect", "REACHED"))


def test_no_token_of_ours_of_the_host_or_of_the_other_comes_out(scene: Scene) -> None:
    assert [where for where, token in scene.foreign.items() if token.encode() in scene.seen] == []
    assert scene.own.encode() in scene.seen, "control"


# --- D21 to D30 -------------------------------------------------------------------------------------------------------


def test_d21_nothing_is_found_in_proc(scene: Scene) -> None:
    assert programs.ENDED in scene.text("proc")
    assert scene.said("proc", "FOUND") == []
    assert scene.own in " ".join(scene.said("opened proc", "FOUND")), "control"


def test_d22_nothing_can_be_written_and_the_host_is_as_it_was(scene: Scene) -> None:
    assert programs.ENDED in scene.text("write")
    assert scene.said("write", "WROTE") == []
    assert scene.host[0] == scene.host[1]
    assert [place for place in corpus.TestD22Writing.NEW if Path(place, f"{scene.mark}-new").exists()] == []
    assert scene.said("opened write", "WROTE") == [f"/work/{scene.mark}-opened-new"], "control"


def test_d23_no_other_process_can_be_traced_read_or_killed(scene: Scene) -> None:
    """Its neighbour's has passed, and the run does not: it has ended its own step, and gains nothing by it."""
    assert programs.BEGUN in scene.text("last")
    assert scene.said("last", "ATTACHED") == []
    assert {line.split()[-1] for line in scene.said("last", "FOUND")} == {scene.own}, "control: its own, and no other"
    assert scene.other["outcome"] != "passed"


def test_d24_namespaces_and_mounts_of_its_own_reach_neither_the_next_step_nor_the_host(scene: Scene) -> None:
    assert programs.ENDED in scene.text("marks")
    assert scene.said("marks", "STANDS") == []
    assert sweep(scene.mark) == []
    assert "/work" in scene.said("opened marks", "STANDS"), "control"


def test_d25_no_socket_device_file_of_the_host_or_work_of_another_run_is_there(scene: Scene) -> None:
    assert programs.ENDED in scene.text("files")
    assert scene.said("files", "REACHED") + scene.said("files", "OPENED") + scene.said("files", "FOUND") == []
    assert scene.own in " ".join(scene.said("opened files", "FOUND")), "control"


def test_d26_d27_neither_metadata_node_api_server_kubelet_nor_the_engines_host_is_reached(scene: Scene) -> None:
    assert programs.ENDED in scene.text("connect")
    assert scene.said("connect", "REACHED") == []
    reached = set(scene.said("opened connect", "REACHED"))
    api = {f"{scene.second} {API_PORT}", f"{SERVICE_OF_API[0]} {SERVICE_OF_API[1]}"}
    node = {f"{scene.second} {port}" for port in (KUBELET_PORT, ETCD_PORT)}
    assert reached == {*api, *node, f"{METADATA[0]} 80", f"{scene.gateway} {EAR_PORT}"}, "control"
    assert set(scene.said("connect without policy", "REACHED")) == api, "with or without who judges policy"
    assert scene.ears.heard("tcp", METADATA[0]), "control"


def test_d28_no_name_is_resolved_no_raw_socket_opens_and_no_query_arrives(scene: Scene) -> None:
    assert programs.ENDED in scene.text("resolve")
    assert scene.said("resolve", "RESOLVED") + scene.said("resolve", "OPENED") == []
    assert scene.ears.heard("udp", f"{scene.mark}.canary") == []
    heard = {line.split()[1] for line in scene.ears.heard("udp", f"{scene.mark}-opened.canary")}
    assert heard == {METADATA[0], scene.gateway}, "control"


def test_d29_a_step_sees_exactly_the_documented_names_as_a_user_of_its_own(scene: Scene) -> None:
    environment, cwd, uid = json.loads(scene.text("environment"))
    assert set(environment) == {"PATH", "HOME", "LANG", "TMPDIR"}, "nothing says where an API server is"
    assert set(json.loads(scene.text("opened environment"))[0]) == {*environment, "TOKEN"}, "control: one more is seen"
    assert (environment["HOME"], environment["TMPDIR"], cwd) == ("/work", "/tmp", "/work")
    assert uid == scene.other["evidence"]["uid"] >= 100_000


def test_d30_there_is_no_token_and_the_api_server_is_asked_nothing(scene: Scene) -> None:
    assert programs.ENDED in scene.text("ask")
    assert scene.said("ask", "TOKEN") + scene.said("ask", "SERVED") == []
    assert scene.audited[0] == 0
    served = {f"{host} 401" for host in (SERVICE_OF_API[0], scene.second)}
    assert set(scene.said("opened ask", "SERVED")) == served, "control: and without a token it is nobody"
    assert scene.audited[1] >= len(served), "control"


def test_the_token_that_every_kind_cluster_is_made_with_is_nobody(scene: Scene) -> None:
    assert scene.known_token == 401


# --- Placement, and the end -------------------------------------------------------------------------------------------


def test_privileges_never_land_on_kind(ground: Ground) -> None:
    answer = post(ground.stack.tenant, "true", controls={"needs": ["privileged"]})
    assert (answer.status_code, answer.json()["code"]) == (422, "placement_refused")
    rows = {row["boundary"]: row["missing"] for row in answer.json()["candidates"]}
    assert rows["cluster/kind"] == "kernel >= dedicated"
