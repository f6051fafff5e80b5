"""Real clusters by kind: made, found, ended from other processes, and whatever breaks on the way leaves nothing."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.core.boundary import BoundaryKind, BoundaryRef, tenant_hash
from service.core.errors import NotYetDestroyed, ProvisionFailed
from service.core.ids import new_run_id
from tests.cluster.engine.outside import Engine
from tests.cluster.engine.run import running_engine
from tests.cluster.lab.client import connect
from tests.cluster.lab.outside import NoLab
from tests.cluster.lab.parts import KUBERNETES
from tests.cluster.lab.toolchain import NoParts
from tests.summary import ran
from workers.boundaries.cluster.engine import EngineFailed
from workers.boundaries.cluster.kind import KindHost, KindProvisioner
from workers.boundaries.cluster.kind_host import INOTIFY_INSTANCES, INOTIFY_WATCHES
from workers.boundaries.cluster.kind_places import MARK
from workers.boundaries.cluster.kind_render import STANDBY, Node, network_name
from workers.boundaries.cluster.standby import Standby

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
NODE = Node(memory_bytes=3 * 2**30)
ALWAYS_THERE = {"bridge", "host", "none"}
WITHIN_S = 60.0


class Flag:
    def __init__(self) -> None:
        self.up = False

    def is_set(self) -> bool:
        return self.up


def ref_of(*, tenant: str = "acme", installation: str = "inst0") -> BoundaryRef:
    return BoundaryRef(
        installation=installation, kind=BoundaryKind.CLUSTER, variant="kind", site="here", tenant=tenant,
        run_id=new_run_id(), fence=1, expires_at=datetime.now(UTC) + timedelta(minutes=30),
    )  # fmt: skip


def provisioner_of(engine: Engine, state: Path, **changed: Any) -> KindProvisioner:
    known = {
        "installation": "inst0", "site": "here", "state": state, "node_image": engine.node_image, "node": NODE,
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
    """Processes with a mark of ours."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"\0{MARK}=bd-".encode() in b"\0" + path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
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


class Made:
    """A cluster, and what was told while it was made."""

    def __init__(self, kinds: KindProvisioner) -> None:
        self.kinds, self.ref, self.steps = kinds, ref_of(), list[str]()
        started = time.monotonic()
        self.kubeconfig = kinds.create(self.ref, cancelled=Flag(), tell=self.steps.append)
        print(f"made in {time.monotonic() - started:.1f} s")
        self.api = connect(self.kubeconfig)


@pytest.fixture(scope="module")
def made(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """One cluster, which the tests that only look at one share."""
    kinds = provisioner_of(engine, tmp_path_factory.mktemp("made") / "state")
    assert kinds.lacks() == ()
    made = Made(kinds)
    yield made
    kinds.destroy(made.ref)


@pytest.fixture(scope="module")
def container(engine: Engine, made: Made) -> dict[str, Any]:
    (found,) = json.loads(engine.run(engine.docker, "inspect", f"{made.ref.name}-control-plane"))
    return dict(found)


def test_its_making_is_told_step_by_step(made: Made) -> None:
    assert made.steps[0] == "ensuring node image"
    assert {"preparing nodes", "writing configuration", "starting control-plane"} <= set(made.steps)


def test_its_kubeconfig_is_private_and_nothing_is_written_at_any_home(made: Made) -> None:
    assert made.kubeconfig.stat().st_mode & 0o777 == 0o600
    assert made.kubeconfig.parent.stat().st_mode & 0o777 == 0o700
    assert os.listdir(made.kinds.places.home) == []
    assert sorted(os.listdir(made.kubeconfig.parent)) == ["kind.yaml", "kubeconfig", "ref.json"]


def test_its_node_has_nothing_of_the_host_and_is_open_on_loopback_alone(
    made: Made, container: dict[str, Any], engine: Engine
) -> None:
    mounts = {(one["Type"], one["Destination"], one["RW"]) for one in container["Mounts"]}
    assert mounts == {("bind", "/lib/modules", False), ("volume", "/var", True)}, "both are kind's own"
    published = [one for found in container["HostConfig"]["PortBindings"].values() for one in found]
    assert [one["HostIp"] for one in published] == ["127.0.0.1"]
    network = network_name(made.ref.name, "inst0")
    assert list(container["NetworkSettings"]["Networks"]) == [network]
    (bridge,) = json.loads(engine.run(engine.docker, "network", "inspect", network))
    assert bridge["Options"]["com.docker.network.bridge.enable_ip_masquerade"] == "false"
    assert bridge["EnableIPv6"] is False


def test_its_node_has_limits_of_the_hosts_kernel(container: dict[str, Any], engine: Engine) -> None:
    limits = container["HostConfig"]
    assert (limits["Memory"], limits["MemorySwap"], limits["PidsLimit"]) == (NODE.memory_bytes, NODE.memory_bytes, 4096)


def test_nobody_without_a_name_is_answered_but_the_health_checks(made: Made) -> None:
    with httpx.Client(base_url=made.api.base_url, verify=False) as nobody:
        assert nobody.get("/readyz").status_code == 200
        for path in ("/api", "/version", "/readyz/etcd", "/api/v1/namespaces/kube-public/configmaps/cluster-info"):
            assert nobody.get(path).status_code == 401, path
    assert made.kinds.answers(made.kubeconfig)
    assert made.api.get("/api").status_code == 200, "the control"


def test_its_api_server_writes_down_who_asks_and_never_what(made: Made, engine: Engine) -> None:
    secret = {"metadata": {"name": "hush"}, "stringData": {"word": "canary-in-the-audit-log"}}
    made.api.post("/api/v1/namespaces/default/secrets", json=secret).raise_for_status()

    def logged() -> str:
        node = f"{made.ref.name}-control-plane"
        return engine.run(engine.docker, "exec", node, "cat", "/var/log/kubernetes/audit.log")

    wait_until(lambda: '"name":"hush"' in logged())
    assert "canary-in-the-audit-log" not in logged()


def test_its_node_keeps_the_rules_of_a_node_for_sandboxes(made: Made) -> None:
    name = f"{made.ref.name}-control-plane"
    kubelet = made.api.get(f"/api/v1/nodes/{name}/proxy/configz").json()["kubeletconfig"]
    assert (kubelet["podPidsLimit"], kubelet["seccompDefault"], kubelet.get("readOnlyPort", 0)) == (1024, True, 0)
    assert kubelet["authentication"]["anonymous"]["enabled"] is False
    wait_until(lambda: "runtimeHandlers" in made.api.get(f"/api/v1/nodes/{name}").json()["status"])
    node = made.api.get(f"/api/v1/nodes/{name}").json()
    assert "runsc" in [one["name"] for one in node["status"]["runtimeHandlers"]]
    assert "taints" not in node["spec"] or all("control-plane" not in one["key"] for one in node["spec"]["taints"])
    allocatable = int(node["status"]["allocatable"]["memory"].removesuffix("Ki")) * 1024
    assert 0 < allocatable < NODE.memory_bytes, "pods are placed within what the node has of its host"


def test_a_namespace_that_says_nothing_of_it_takes_no_pod_but_a_restricted_one(made: Made) -> None:
    def ask(security: dict[str, Any]) -> httpx.Response:
        container = {"name": "x", "image": "busybox", "securityContext": security}
        pod = {"metadata": {"name": "x"}, "spec": {"containers": [container]}}
        return made.api.post("/api/v1/namespaces/default/pods", params={"dryRun": "All"}, json=pod)

    wait_until(lambda: made.api.get("/api/v1/namespaces/default/serviceaccounts/default").status_code == 200)
    refused = ask({"privileged": True})
    assert refused.status_code == 403
    assert 'violates PodSecurity "restricted:v1.34"' in refused.json()["message"]
    restricted = {
        "allowPrivilegeEscalation": False, "runAsNonRoot": True, "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }  # fmt: skip
    assert ask(restricted).status_code == 201, "the control"


def test_another_process_finds_it_by_its_labels(made: Made) -> None:
    found = elsewhere(
        made.kinds, "print(json.dumps([one.model_dump(mode='json') for one in there.discover()]))", made.ref
    )
    (ref,) = [BoundaryRef.model_validate(one) for one in found]
    hashed = made.ref.model_copy(update={"tenant": tenant_hash("inst0", "acme"), "expires_at": ref.expires_at})
    assert ref == hashed
    assert timedelta(0) <= ref.expires_at - made.ref.expires_at < timedelta(seconds=1)


def test_no_more_clusters_than_are_allowed_whoever_asks(made: Made, engine: Engine, tmp_path: Path) -> None:
    for installation in ("inst0", "inst1"):
        full = provisioner_of(engine, tmp_path / installation, max_clusters=1, installation=installation)
        told: list[str] = []
        with pytest.raises(ProvisionFailed, match="there are 1 clusters on this host"):
            full.create(ref_of(installation=installation), cancelled=Flag(), tell=told.append, patience_s=0.3)
        assert told == ["waiting for another cluster to go"]
        assert not full.has_room()
        assert full.places.all() == []
    assert len(list(made.kinds.discover())) == 1, "nothing was made beside it"


def test_another_installations_is_neither_found_nor_ended(made: Made, engine: Engine, tmp_path: Path) -> None:
    other = provisioner_of(engine, tmp_path / "other", installation="inst1")
    assert list(other.discover()) == []
    theirs = made.ref.model_copy(update={"installation": "inst1"})
    for provisioner in (other, made.kinds):
        provisioner.destroy(theirs)
    another_site = provisioner_of(engine, tmp_path / "site", site="elsewhere")
    assert list(another_site.discover()) == []
    assert made.kinds.answers(made.kubeconfig)


def test_another_process_ends_it_and_again_and_nothing_is_left(made: Made, engine: Engine) -> None:
    assert left(engine, made.kinds), "the control: what would be left is seen"
    instances, watches = inotify_of(engine, made.ref)
    print(f"inotify: {instances} instances, {watches} watches")
    assert 0 < instances < INOTIFY_INSTANCES, "what `lacks` asks for is enough"
    assert 0 < watches < INOTIFY_WATCHES
    elsewhere(made.kinds, "there.destroy(ref)", made.ref)
    assert left(engine, made.kinds) == []
    elsewhere(made.kinds, "there.destroy(ref)", made.ref)
    made.kinds.destroy(ref_of())  # one that never was
    assert list(made.kinds.discover()) == []


def inotify_of(engine: Engine, ref: BoundaryRef) -> tuple[int, int]:
    """Of all processes in its node."""
    wanted = engine.run(engine.docker, "inspect", "--format={{.Id}}", f"{ref.name}-control-plane").strip()
    instances = watches = 0
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if wanted in (process / "cgroup").read_text():
                open_ = [one for one in (process / "fd").iterdir() if os.readlink(one) == "anon_inode:inotify"]
                instances += len(open_)
                watches += sum((process / "fdinfo" / one.name).read_text().count("inotify wd:") for one in open_)
    return instances, watches


# --- What breaks on the way -------------------------------------------------------------------------------------------


def test_cancelled_while_it_is_made_it_leaves_nothing(kinds: KindProvisioner, engine: Engine) -> None:
    cancelled, seen = Flag(), list[int]()

    def tell(step: str) -> None:
        if step == "starting control-plane":
            seen.append(len(left(engine, kinds)))
            cancelled.up = True

    with pytest.raises(ProvisionFailed, match="cancelled while"):
        kinds.create(ref_of(), cancelled=cancelled, tell=tell)
    assert seen[0] >= 5, "the control: container, volume, network, directory and processes were there"
    assert left(engine, kinds) == []


def test_kind_killed_half_way_leaves_nothing(kinds: KindProvisioner, engine: Engine) -> None:
    ref = ref_of()

    def tell(step: str) -> None:
        if step == "preparing nodes":
            threading.Timer(1.0, kill_kind).start()

    def kill_kind() -> None:
        wanted = [pid for pid in makers() if Path(f"/proc/{pid}/comm").read_text().strip() == "kind"]
        for pid in wanted:
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(ProvisionFailed, match="kind did not make the cluster"):
        kinds.create(ref, cancelled=Flag(), tell=tell)
    assert left(engine, kinds) == []
    time.sleep(3)  # what the engine was still about to do for a dead client
    assert left(engine, kinds) == []


def test_a_worker_killed_while_it_makes_one_leaves_what_another_process_ends(
    kinds: KindProvisioner, engine: Engine, tmp_path: Path
) -> None:
    ref, told = ref_of(), tmp_path / "told"
    program = (
        "class Never:\n    def is_set(self): return False\n"
        f"def tell(step): Path({str(told)!r}).open('a').write(step + '\\n')\n"
        "there.create(ref, cancelled=Never(), tell=tell)"
    )
    worker = threading.Thread(target=lambda: _ignore(lambda: elsewhere(kinds, program, ref)))
    worker.start()
    wait_until(lambda: told.exists() and "writing configuration" in told.read_text(), within_s=120)
    (pid,) = (int(one.parent.name) for one in Path("/proc").glob("[0-9]*/cmdline") if _is(one, ref.run_id, "-c"))
    os.kill(pid, signal.SIGKILL)
    worker.join()
    assert makers(), "the control: kind goes on without its worker"
    assert [one.name for one in kinds.discover()] == [ref.name]
    kinds.destroy(ref)
    assert left(engine, kinds) == []
    time.sleep(3)
    assert left(engine, kinds) == []


def _is(cmdline: Path, *words: str) -> bool:
    try:
        said = cmdline.read_text()
    except OSError:
        return False
    return all(word in said for word in words)


def _ignore(act: Callable[[], object]) -> None:
    with suppress(AssertionError):  # it was killed
        act()


def test_an_engine_that_is_away_is_not_one_that_has_nothing(kinds: KindProvisioner, engine: Engine) -> None:
    away = provisioner_of(engine, kinds.host.state, docker_host=f"{engine.docker_host}.away")
    (said,) = away.lacks()
    assert "a container engine that answers" in said
    with pytest.raises(EngineFailed):
        list(away.discover())
    with pytest.raises(ProvisionFailed, match="start it"):
        away.create(ref_of(), cancelled=Flag(), tell=print)
    away._resisted.add((ref := ref_of()).name)  # it does not try for long then
    with pytest.raises(NotYetDestroyed, match="the engine at"):
        away.destroy(ref)


def test_an_image_that_the_engine_does_not_have_is_not_fetched(kinds: KindProvisioner, engine: Engine) -> None:
    without = provisioner_of(engine, kinds.host.state, node_image="kindest/node:v1.36.2")
    assert "build or load it there first" in without.lacks()[0]
    with pytest.raises(ProvisionFailed, match="build or load it there first"):
        without.create(ref_of(), cancelled=Flag(), tell=print)
    assert left(engine, kinds) == []


# --- Standby ----------------------------------------------------------------------------------------------------------


def test_a_standby_cluster_is_made_claimed_by_one_process_and_ended_with_its_run(
    kinds: KindProvisioner, engine: Engine
) -> None:
    prepared: list[Path] = []
    standby = Standby(kinds, wanted=1, prepare=prepared.append)
    standby.keep(cancelled=Flag())
    standing = standby.standing()
    assert (standing.ready, standing.failed) == (1, 0)
    (unclaimed,) = kinds.discover()
    assert (unclaimed.tenant, unclaimed.fence) == (STANDBY, 0)
    program = (
        "from workers.boundaries.cluster.standby import Standby\n"
        "found = Standby(there, wanted=1, prepare=print).claim(ref)\n"
        "print(json.dumps(found and str(found)))"
    )
    runs, got = [ref_of(), ref_of()], dict[str, Any]()
    racing = [
        threading.Thread(target=lambda run=run: got.__setitem__(run.name, elsewhere(kinds, program, run)))  # type: ignore[misc]
        for run in runs
    ]
    for thread in racing:
        thread.start()
    for thread in racing:
        thread.join()
    (winner,) = (run for run in runs if got[run.name])
    assert got[winner.name] == str(prepared[0])
    assert kinds.answers(prepared[0])
    assert list(kinds.discover()) == [winner], "it is the run's, by its whole reference"
    kinds.destroy(unclaimed)
    assert kinds.answers(prepared[0]), "under its old name it is nobody's to end"
    assert [standby.standing().claimed, standby.standing().ready] == [1, 0]
    _lose_network_and_directory(kinds, engine, unclaimed.name)
    (lost,) = kinds.discover()
    assert (lost.name, lost.tenant) == (unclaimed.name, ""), "a container still says whose it was"
    kinds.destroy(lost)
    assert left(engine, kinds) == []


def _lose_network_and_directory(kinds: KindProvisioner, engine: Engine, name: str) -> None:
    network = network_name(name, "inst0")
    engine.run(engine.docker, "network", "disconnect", "--force", network, f"{name}-control-plane")
    engine.run(engine.docker, "network", "rm", network)
    kinds.places.place(name).remove()
