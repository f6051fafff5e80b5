"""A real stack whose worker makes pods in the lab: from POST to result, with both variants behind one API.

The untrusted tenant lands in `namespace/gvisor`, the trusted one in `namespace/runc`; nothing but who they are differs.
What is seen of a pod from outside is seen on the node (control groups, processes, mounts) and by the API server; files
in it are looked at and made by the engine's exec, which no guest can call.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster.lab.components import Place
from tests.cluster.lab.outside import Lab
from tests.cluster.namespaces import Site
from tests.cluster.python_image import load_python
from tests.escape.whole_way import Neighbour, new_token
from tests.stack import Document, NoStack, Stack, eventually, finished, run_stack, submit
from tests.summary import ran
from workers.conformance.programs import BEGUN
from workers.kube import ClusterError, Manifest
from workers.pods.render import listener_namespace

VARIANTS = ("runc", "gvisor")
WALLS = tuple(f"namespace/{variant}" for variant in VARIANTS)
WAIT = "touch plays; while [ ! -e go ]; do sleep 0.05; done"
"""A step that stands until the host has looked."""
_CALL_S = 30.0


@dataclass(frozen=True)
class Ground:
    """`image`: what its pods are made of, on the node."""

    stack: Stack
    site: Site
    lab: Lab
    image: str

    def tenant(self, variant: str) -> httpx.Client:
        """Whose runs get this wall."""
        return self.stack.tenant if variant == "gvisor" else self.trusted("soft")

    def trusted(self, name: str) -> httpx.Client:
        key = f"trusted {name}"
        if key not in self.stack._clients:
            answer = self.stack.admin.post("/v1/admin/tenants", json={"name": name, "trust": "trusted"})
            assert answer.status_code == 201, answer.text
            self.stack._clients[key] = self.stack.client(answer.json()["key"])
        return self.stack._clients[key]

    # --- a run's pod, from outside ---
    def pod(self, run_id: str) -> Manifest:
        found: list[Manifest] = eventually(
            lambda: self.site.ready.admin.list("Pod", labels={"blastdoor.dev/run": run_id})
        )
        assert len(found) == 1, found
        return found[0]

    def inside(self, run_id: str, command: str) -> bytes:
        """What a shell prints that the engine has executed beside the guest; empty when there is no pod to ask."""
        pod, said = self.pod(run_id)["metadata"], bytearray()
        try:
            self.site.ready.engine.exec_(
                pod["namespace"], pod["name"], "run", ["/bin/sh", "-c", f"cd /work; {command}"],
                on_output=lambda _, data: said.extend(data), deadline=time.monotonic() + _CALL_S,
            )  # fmt: skip
        except ClusterError:
            return b""
        return bytes(said)

    def wait_for_file(self, run_id: str, name: str) -> None:
        """Until the guest has made it in /work: only then does its step play for sure."""
        assert eventually(lambda: b"there" in self.inside(run_id, f"test -e {name} && echo there")), f"no {name}"

    def let_go(self, run_id: str) -> None:
        self.inside(run_id, "touch go")

    def scratch(self, pod: Manifest) -> Path:
        """Where the node has the pod's /work and /tmp, in the node's own mounts."""
        return Path(
            f"{Place(self.lab.state).disk}/kubelet/pods/{pod['metadata']['uid']}/volumes/kubernetes.io~empty-dir/scratch"
        )

    # --- the one defence opened ---
    @contextmanager
    def policy_inert(self) -> Iterator[None]:
        """The network policy controller is there, and enforces nothing: what a control opens."""
        controller = self.lab.pid("policy")
        os.kill(controller, signal.SIGUSR1)
        try:
            assert eventually(lambda: "blastdoor_lab" not in self.lab.run("nft", "list", "tables"))
            yield
        finally:
            os.kill(controller, signal.SIGUSR2)
            assert eventually(lambda: "blastdoor_lab" in self.lab.run("nft", "list", "tables"))

    @contextmanager
    def same_worker(self) -> Iterator[None]:
        """No attack may cost us the worker. (What it starts for a moment, to look at the cluster, is no loss.)"""
        worker = self.stack.children["worker"]
        yield
        assert self.stack.children["worker"] == worker, "the worker itself died"

    @contextmanager
    def as_it_is(self) -> Iterator[None]:
        """Nothing is opened."""
        yield

    def audited(self, *words: str) -> list[Document]:
        """What the API server noted of its requests, with all of these words in the line."""
        lines = Place(self.lab.state).audit.read_text().splitlines()
        return [json.loads(line) for line in lines if all(word in line for word in words)]


@pytest.fixture(scope="session")
def ground(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    """When the stack has ended, nothing of it is in the cluster."""
    if site.lab is None:
        pytest.skip("only a lab's node can be looked at, and broken on purpose")
    folder = tmp_path_factory.mktemp("ground")
    image = load_python(site.lab, folder / "python.tar")
    given = {
        "BLASTDOOR_BOUNDARIES": '["namespace"]',
        "BLASTDOOR_KUBECONFIG": str(site.ready.engine_kubeconfig),
        "BLASTDOOR_KUBE_IMAGE": image,
        "BLASTDOOR_WORKER_CONCURRENCY": "4",  # they wait for the cluster most of the time
    }
    try:
        with run_stack(folder, **given) as stack:
            ground = Ground(stack, site, site.lab, image)
            eventually(lambda: not unbuilt(stack), within_s=90)
            assert unbuilt(stack) == {}
            for wall in WALLS:
                ran("boundary", wall)
            yield ground
    except NoStack as missing:
        pytest.skip(str(missing))
    left = remains(site, stack.installation)
    assert not left, f"left in the cluster: {left}"


def unbuilt(stack: Stack) -> dict[str, list[str]]:
    """Walls that no worker can build, and why."""
    rows = {row["boundary"]: row for row in stack.tenant.get("/v1/capabilities").json()["boundaries"]}
    return {
        wall: rows.get(wall, {}).get("missing", ["no worker"])
        for wall in WALLS
        if not rows.get(wall, {}).get("available")
    }


def remains(site: Site, installation: str) -> list[str]:
    """What an installation has left but its listener and its tenants' namespaces, which then go too."""
    mine = {"blastdoor.dev/installation": installation}
    kept = listener_namespace(installation)

    def found() -> list[str]:
        pods = [one["metadata"] for one in site.ready.admin.list("Pod", labels=mine)]
        rooms = [one["metadata"] for one in site.ready.admin.list("Namespace", labels=mine)]
        return [f"pod {one['name']}" for one in pods if one["namespace"] != kept] + [
            f"namespace {one['name']}" for one in rooms if one["name"] != kept and not one["name"].startswith("bd-t-")
        ]

    eventually(lambda: not found(), within_s=30)
    left = found()
    for one in site.ready.admin.list("Namespace", labels=mine):
        site.ready.engine.delete("Namespace", one["metadata"]["name"])
    return left


def landed(run: Document, variant: str) -> Document:
    """The run, which was played behind this very wall, as its evidence has it too."""
    assert run["placement"]["boundary"] == f"namespace/{variant}", run["placement"]
    assert run["evidence"]["runtime"] == {"gvisor": "runsc", "runc": "node default"}[variant]
    assert run["evidence"]["network"] == "none"
    return run


def attacked(ground: Ground, variant: str, *runs: Any, token: str | None = None, **more: Any) -> Document:
    """The finished run of these programs. `token`: into the environment of its steps, which only controls do."""
    env = {"env": {"TOKEN": token}} if token else {}
    client = ground.tenant(variant)
    run = finished(client, submit(client, *runs, **env, **more), within_s=120)
    assert BEGUN in run["steps"][0]["stdout"]["text"], f"the attack never began: {run}"
    return landed(run, variant)


_WAITING = """
import os, time
kept = os.environ["TOKEN"] * 1000
open("secret", "w").write(kept)
open("plays", "w").close()
while not os.path.exists("go"):
    time.sleep(0.05)
print("unharmed" if open("secret").read() == kept else "changed")
"""


@dataclass
class Beside(Neighbour):
    """With where the node keeps its files."""

    scratch: Path = Path()


@contextmanager
def neighbour(ground: Ground, variant: str) -> Iterator[Beside]:
    """Another tenant's run behind a wall of the same variant, which must pass afterwards: nobody has touched it."""
    token = new_token()
    client = ground.stack.new_tenant("neighbour") if variant == "gvisor" else ground.trusted("neighbour-soft")
    run_id = submit(
        client, ["/usr/bin/env", "python3", "-I", "-S", "-c", _WAITING], env={"TOKEN": token}, limits={"wall": "300s"}
    )
    ground.wait_for_file(run_id, "plays")
    beside = Beside(run_id, token, scratch=ground.scratch(ground.pod(run_id)))
    try:
        yield beside
    finally:
        ground.let_go(run_id)
        run = finished(client, run_id, within_s=120)
    assert (run["outcome"], run["steps"][0]["stdout"]["text"]) == ("passed", "unharmed\n"), run
