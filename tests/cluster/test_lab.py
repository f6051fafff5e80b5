"""The lab is a real cluster: pods in two kinds of wall, PodSecurity and network policy in force, and no trace left."""

import os
import secrets
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.cluster.lab import cgroups, images, parts
from tests.cluster.lab.client import connect
from tests.cluster.lab.node import SHADOWED
from tests.cluster.lab.outside import Lab, NoLab, up
from tests.cluster.pods import Namespace, eventually, namespace, pod

GVISORS_OWN_WORDS = "Starting gVisor"
LOOK_EVERY_S = 0.3


@pytest.fixture(scope="module")
def client(lab: Lab) -> Iterator[httpx.Client]:
    with connect(lab.kubeconfig) as client:
        yield client


@pytest.fixture
def room(client: httpx.Client) -> Iterator[Namespace]:
    with namespace(client, f"room-{secrets.token_hex(4)}") as room:
        yield room


# --- A node ---------------------------------------------------------------------------------------------------------


def test_the_node_is_ready_and_says_what_it_is(client: httpx.Client) -> None:
    status = client.get("/api/v1/nodes/lab").raise_for_status().json()["status"]
    assert {one["type"]: one["status"] for one in status["conditions"]}["Ready"] == "True"
    assert status["nodeInfo"]["kubeletVersion"] == f"v{parts.KUBERNETES}"
    assert status["nodeInfo"]["containerRuntimeVersion"].startswith("containerd://")
    assert client.get("/version").json()["gitVersion"] == f"v{parts.KUBERNETES}"


def test_a_pod_under_runc_sees_this_machines_kernel(room: Namespace) -> None:
    assert room.ran(pod("plain", "uname -r")).strip() == os.uname().release


def test_a_pod_under_gvisor_sees_another_kernel_and_the_node_sees_the_sandbox(lab: Lab, room: Namespace) -> None:
    name = room.start(pod("walled", "uname -r; dmesg; sleep 600", runtime="gvisor"))
    uid = room.in_phase(name, "Running")["metadata"]["uid"]
    printed = eventually(lambda: log if GVISORS_OWN_WORDS in (log := room.log(name)) else "")
    assert printed.split()[0] != os.uname().release
    assert "runsc-sandbox" in programs(lab, uid)
    assert uid in sandboxes(lab)


def test_the_node_sees_no_sandbox_of_a_pod_under_runc(lab: Lab, room: Namespace) -> None:
    uid = room.in_phase(room.start(pod("plain", "sleep 600")), "Running")["metadata"]["uid"]
    found = eventually(lambda: programs(lab, uid))
    assert "sleep" in found
    assert "runsc-sandbox" not in found
    assert uid not in sandboxes(lab)


@pytest.mark.parametrize("runtime", [None, "gvisor"])
def test_a_pod_that_takes_more_memory_than_its_limit_is_killed_for_it(room: Namespace, runtime: str | None) -> None:
    greedy = pod("greedy", "tail /dev/zero", runtime=runtime, resources={"limits": {"memory": "64Mi"}})
    ended = room.in_phase(room.start(greedy), "Failed")["status"]["containerStatuses"][0]["state"]["terminated"]
    assert ended["reason"] == "OOMKilled"


def test_an_image_that_is_loaded_runs_and_nothing_is_pulled(
    lab: Lab, built: parts.Parts, room: Namespace, tmp_path: Path
) -> None:
    name = f"blastdoor.test/mine:{secrets.token_hex(4)}"
    room.start(pod("early", "true", image=name))
    eventually(lambda: "ErrImageNeverPull" in str(room.read("early")["status"]))
    tree = tmp_path / "tree"
    (tree / "bin").mkdir(parents=True)
    (tree / "bin" / "sh").write_bytes(built.program("busybox").read_bytes())
    (tree / "bin" / "sh").chmod(0o755)
    (tree / "said").write_text("hello\n")
    images.write_tree(tmp_path / "mine.tar", name, tree)
    lab.load(tmp_path / "mine.tar")
    assert room.ran(pod("mine", "read line < /said; echo $line", image=name)) == "hello\n"


def test_the_api_server_can_be_stopped_and_goes_on(lab: Lab, client: httpx.Client) -> None:
    server = lab.pid("kube-apiserver")
    os.kill(server, signal.SIGSTOP)
    try:
        with pytest.raises(httpx.TimeoutException):
            client.get("/version", timeout=1)
    finally:
        os.kill(server, signal.SIGCONT)
    eventually(lambda: answers(client, "/readyz"))


def answers(client: httpx.Client, path: str) -> bool:
    """Whether it does now; a busy machine may take longer than the client waits."""
    try:
        return client.get(path).is_success
    except httpx.TransportError:
        return False


def programs(lab: Lab, uid: str) -> set[str]:
    """What runs in the control groups of a pod, as this machine sees it."""
    found = set()
    for pid in cgroups.processes(lab.cgroup):
        try:
            if uid in Path(f"/proc/{pid}/cgroup").read_text():
                found.add(Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0].rpartition("/")[2])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def sandboxes(lab: Lab) -> str:
    return lab.run("runsc", "--root=/run/containerd/runsc/k8s.io", "list", "--format=json")


# --- Admission ------------------------------------------------------------------------------------------------------


def test_podsecurity_refuses_a_privileged_pod_where_it_is_asked_to(client: httpx.Client, room: Namespace) -> None:
    privileged = pod("privileged", "true", securityContext={"privileged": True})
    dry = {"dryRun": "All"}
    assert client.post(f"{room.path}/pods", json=privileged, params=dry).status_code == httpx.codes.CREATED
    restricted = {"pod-security.kubernetes.io/enforce": "restricted"}
    with namespace(client, f"strict-{secrets.token_hex(4)}", **restricted) as strict:
        refused = client.post(f"{strict.path}/pods", json=privileged, params=dry)
        assert refused.status_code == httpx.codes.FORBIDDEN
        assert 'violates PodSecurity "restricted' in refused.json()["message"]
        assert strict.ran(pod("modest", "id -u")).strip() == "65534"


# --- Network policy -------------------------------------------------------------------------------------------------

NOTHING_OUT = {"podSelector": {}, "policyTypes": ["Egress"]}
NOTHING_IN = {"podSelector": {}, "policyTypes": ["Ingress"]}


@pytest.fixture
def server(room: Namespace) -> str:
    """The address of a pod that answers on port 8080."""
    room.start(pod("server", "cd /work && echo hello > index.html && exec httpd -f -p 8080"))
    address: str = room.in_phase("server", "Running")["status"]["podIP"]
    return address


def caller(place: Namespace, address: str, *, runtime: str | None = None) -> Callable[[], str]:
    """A pod that goes on calling -> a function that says how its newest calls went: "open" or "shut"."""
    call = f"nc -w 1 {address} 8080 < /dev/null > /dev/null 2>&1"
    name = place.start(
        pod("caller", f"while true; do {call} && echo open || echo shut; sleep {LOOK_EVERY_S}; done", runtime=runtime)
    )
    place.in_phase(name, "Running")

    def newest() -> str:
        calls = place.log(name).split()[-2:]
        return calls[0] if len(set(calls)) == 1 else "both"

    return newest


def put_policy(place: Namespace, spec: object) -> str:
    """-> the path of the policy."""
    path = f"/apis/networking.k8s.io/v1/namespaces/{place.name}/networkpolicies"
    place.client.post(path, json={"metadata": {"name": "deny"}, "spec": spec}).raise_for_status()
    return f"{path}/deny"


@pytest.mark.parametrize("runtime", [None, "gvisor"])
def test_a_policy_blocks_what_passes_without_it(
    client: httpx.Client, room: Namespace, server: str, runtime: str | None
) -> None:
    with namespace(client, f"calls-{secrets.token_hex(4)}") as calls:
        newest = caller(calls, server, runtime=runtime)
        eventually(lambda: newest() == "open")
        policy = put_policy(calls, NOTHING_OUT)
        eventually(lambda: newest() == "shut")
        client.delete(policy).raise_for_status()
        eventually(lambda: newest() == "open")


def test_a_policy_at_the_other_end_lets_in_whom_it_names(client: httpx.Client, room: Namespace, server: str) -> None:
    with (
        namespace(client, f"friend-{secrets.token_hex(4)}", kind="friend") as friend,
        namespace(client, f"other-{secrets.token_hex(4)}", kind="other") as other,
    ):
        from_friend, from_other = caller(friend, server), caller(other, server)
        eventually(lambda: from_friend() == from_other() == "open")
        friends = {"namespaceSelector": {"matchLabels": {"kind": "friend"}}}
        put_policy(room, NOTHING_IN | {"ingress": [{"from": [friends], "ports": [{"port": 8080}]}]})
        eventually(lambda: from_other() == "shut")
        assert from_friend() == "open"


def test_a_controller_made_inert_enforces_nothing(lab: Lab, client: httpx.Client, room: Namespace, server: str) -> None:
    with namespace(client, f"calls-{secrets.token_hex(4)}") as calls:
        newest = caller(calls, server)
        put_policy(calls, NOTHING_OUT)
        eventually(lambda: newest() == "shut")
        os.kill(lab.pid("policy"), signal.SIGUSR1)
        try:
            eventually(lambda: newest() == "open")
        finally:
            os.kill(lab.pid("policy"), signal.SIGUSR2)
        eventually(lambda: newest() == "shut")


# --- Its end --------------------------------------------------------------------------------------------------------


@pytest.fixture
def short_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="bd-lab-") as folder:
        yield Path(folder)


def test_a_killed_lab_leaves_no_process_and_no_mount_and_its_end_leaves_nothing(lab: Lab, short_path: Path) -> None:
    left = f"/{cgroups.PREFIX}{secrets.token_hex(4)}"
    cgroups.make(left)
    mine = up(short_path / "state", print)
    held: list[int] = []
    try:
        assert not any((root / left.lstrip("/")).exists() for root in cgroups.hierarchies())  # another's, swept
        assert mine.cgroup != lab.cgroup  # two at once, and the end of one is not the other's
        etcd = mine.pid("etcd")
        # Held, so that the number of none of them is given to somebody else's, who would then look like ours.
        held = [os.open(f"/proc/{etcd}/ns/{kind}", os.O_RDONLY) for kind in ("mnt", "net", "pid")]
        worlds = {os.readlink(f"/proc/self/fd/{world}") for world in held}
        with connect(mine.kubeconfig) as client, namespace(client, "last") as last:
            last.in_phase(last.start(pod("walled", "sleep 600", runtime="gvisor")), "Running")
        assert kinds(traces(mine, worlds)) == {"process", "mount", "cgroup", "folder"}
        holder = mine.holder()
        assert holder
        os.kill(holder, signal.SIGKILL)
        eventually(lambda: kinds(traces(mine, worlds)) == {"cgroup", "folder"})
    finally:
        mine.end()
    assert traces(mine, worlds) == []
    assert lab.holder()
    for world in held:
        os.close(world)


def test_a_lab_can_write_nowhere_but_in_its_folder(lab: Lab, tmp_path: Path) -> None:
    lab.run("busybox", "touch", str(lab.state / "mine"))
    with pytest.raises(NoLab, match="Read-only file system"):
        lab.run("busybox", "touch", str(tmp_path / "not-mine"))


def test_a_lab_changes_nothing_of_the_whole_machine(lab: Lab) -> None:
    """The kubelet would: it sets these, and here sees files of its own in their place."""
    there = {name: lab_sees(lab, name) for name in SHADOWED}
    assert there == SHADOWED
    here = {name: Path("/proc/sys", name).read_text().strip() for name in SHADOWED}
    assert here != SHADOWED


def lab_sees(lab: Lab, sysctl: str) -> str:
    return Path(f"/proc/{lab.pid('kubelet')}/root/proc/sys", sysctl).read_text().strip()


def kinds(found: list[str]) -> set[str]:
    return {one.split()[0] for one in found}


def traces(lab: Lab, worlds: set[str]) -> list[str]:
    """Everything of a lab that exists on this machine; a namespace is gone when no process and no mount holds it."""
    name = lab.cgroup.lstrip("/")
    found = [f"cgroup {root / name}" for root in cgroups.hierarchies() if (root / name).exists()]
    if lab.state.exists():
        found.append(f"folder {lab.state}")
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            inside = {os.readlink(entry / "ns" / kind) for kind in ("mnt", "net", "pid")} & worlds
            mounts = (entry / "mountinfo").read_text()
            member = name in (entry / "cgroup").read_text()
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # gone, or none that anybody could end
            continue
        if inside or member:
            found.append(f"process {entry.name}")
        if str(lab.state) in mounts or any(world in mounts for world in worlds):
            found.append(f"mount seen by {entry.name}")
    return found
