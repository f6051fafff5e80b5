"""Real clusters by kind: how they are made, what they are like, how they are found, and ended from another process."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.core.boundary import BoundaryRef, tenant_hash
from tests.cluster.engine.outside import Engine
from tests.cluster.kind_ground import (
    INSTALLATION,
    NODE,
    Flag,
    api_of,
    elsewhere,
    engine,
    left,
    provisioner_of,
    ref_of,
    wait_until,
)
from workers.boundaries.cluster.kind import KindProvisioner
from workers.boundaries.cluster.kind_host import INOTIFY_INSTANCES, INOTIFY_WATCHES
from workers.boundaries.cluster.kind_render import network_name
from workers.boundaries.cluster.provisioners import NoRoom

__all__ = ["engine"]
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


class Made:
    """A cluster, and what was told while it was made."""

    def __init__(self, kinds: KindProvisioner) -> None:
        self.kinds, self.ref, self.steps = kinds, ref_of(), list[str]()
        started = time.monotonic()
        self.kubeconfig = kinds.create(self.ref, cancelled=Flag(), tell=self.steps.append)
        print(f"made in {time.monotonic() - started:.1f} s")
        self.api = api_of(self.kubeconfig)


@pytest.fixture(scope="module")
def made(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """One cluster, which the tests that only look at one share."""
    kinds = provisioner_of(engine, tmp_path_factory.mktemp("made") / "state")
    assert kinds.lacks() == ()
    made = Made(kinds)
    yield made
    made.api.close()
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
    network = network_name(made.ref.name, INSTALLATION)
    assert list(container["NetworkSettings"]["Networks"]) == [network]
    (bridge,) = json.loads(engine.run(engine.docker, "network", "inspect", network))
    assert bridge["Options"]["com.docker.network.bridge.enable_ip_masquerade"] == "false"
    assert bridge["EnableIPv6"] is False


def test_its_node_has_limits_of_the_hosts_kernel(container: dict[str, Any], engine: Engine) -> None:
    limits = container["HostConfig"]
    assert limits["RestartPolicy"]["Name"] == "no", "what came back would have lost the rules of its node"
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
    allocatable = quantity(node["status"]["allocatable"]["memory"])
    assert 0 < allocatable < NODE.memory_bytes, "pods are placed within what the node has of its host"
    assert quantity(node["status"]["capacity"]["memory"]) > NODE.memory_bytes, "the control: it sees all of it"


def quantity(said: str) -> int:
    """Of memory: 2816Mi, 24684288Ki, or bytes."""
    units = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
    return int(said[:-2]) * units[said[-2:]] if said[-2:] in units else int(said)


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
    hashed = made.ref.model_copy(update={"tenant": tenant_hash(INSTALLATION, "acme"), "expires_at": ref.expires_at})
    assert ref == hashed
    assert timedelta(0) <= ref.expires_at - made.ref.expires_at < timedelta(seconds=1)


def test_no_more_clusters_than_are_allowed_whoever_asks(made: Made, engine: Engine, tmp_path: Path) -> None:
    for installation in (INSTALLATION, "inst1"):
        full = provisioner_of(engine, tmp_path / installation, max_clusters=1, installation=installation)
        with pytest.raises(NoRoom, match="there are 1 clusters on this host"):
            full.create(ref_of(installation=installation), cancelled=Flag(), tell=print)
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
