"""`make demo-cluster`: three tenants submit the same scenario to a platform that makes pods: three walls. Then one
run in a cluster of its own (`demo_own_cluster.py`).

The cluster is the one that KUBECONFIG names, else the lab of the tests. Everything is done with the `blastdoor`
command, as a platform engineer would; what is left is looked for on this machine and in the cluster, as it was all the
time before, so that finding nothing means something. Exit code 0 only if all is as it should be.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from examples.demo import BLASTDOOR, Demo, Disappointed, eventually, say, say_left, title
from examples.demo_own_cluster import show_own_cluster
from service.cli.printing import visible
from workers.boundaries.cluster.engine import EngineFailed
from workers.kube import PREFIX, Cluster, ClusterError
from workers.pods.nodes import GROUP_KEY, TAINT_KEY, groups

TENANTS = Path(__file__).parent / "tenants"
WALLS = {"house": "namespace/runc", "acme": "namespace/runc+affinity", "stranger": "namespace/gvisor"}
WITHIN_S = 120.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo-cluster ARGS=", description="Three tenants, three walls.")
    parser.add_argument("--group", default="acme", help="the node group of the tenant with affinity (%(default)s)")
    parser.add_argument("--pool", help="label of the nodes for gVisor, KEY=VALUE, or empty for any; as cluster install")
    parser.add_argument("--only", choices=("tenants", "own-cluster"), help="one half of it; default: both")
    asked = parser.parse_args()
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="blastdoor-demo-"))
    failures: list[str] = []
    try:
        if asked.only != "own-cluster":
            with ground(folder, pool=asked.pool) as there:
                demo = ClusterDemo(folder / "state", failures, there=there, group=asked.group)
                demo.show()
        if asked.only != "tenants":
            show_own_cluster(folder, failures, only=asked.only is not None)
    except (Disappointed, ClusterError, EngineFailed) as problem:
        failures.append(str(problem))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{time.monotonic() - started:.0f} seconds in all.")
    for failure in failures:
        print(f"NOT AS EXPECTED: {failure}")
    if not failures:
        print("Everything was as expected.")
    return 1 if failures else 0


@dataclass(frozen=True)
class Ground:
    """A cluster, as its administrator. `ours`: made for this demo, so that its one node may be given away."""

    kubeconfig: Path
    image: str
    pool: str | None
    ours: bool


@contextmanager
def ground(folder: Path, *, pool: str | None) -> Iterator[Ground]:
    if given := os.environ.get("KUBECONFIG"):
        image = os.environ.get("BLASTDOOR_KUBE_IMAGE", "")
        if "@sha256:" not in image:
            raise Disappointed(
                "BLASTDOOR_KUBE_IMAGE names no image by digest that the nodes of this cluster can have; "
                "`blastdoor cluster image --help` says how to make one"
            )
        title(f"The cluster that KUBECONFIG names: {given}")
        yield Ground(Path(given), image, pool, ours=False)
        return
    from tests.cluster.lab.outside import NoLab, running_lab
    from tests.cluster.lab.parts import NoParts
    from tests.cluster.namespaces import load_runtime

    title(
        "A cluster of one node on this machine: Kubernetes with gVisor and enforced network policy (tests/cluster/lab)"
    )
    try:
        with running_lab(folder / "lab", say) as lab:
            image = load_runtime(lab, folder / "run.tar")
            say(f"its node has the image {image}")
            yield Ground(lab.kubeconfig, image, "" if pool is None else pool, ours=True)
            title("Ending the cluster")
    except (NoLab, NoParts) as why:
        raise Disappointed(f"no lab: {why}") from why
    say("its processes, mounts and control groups are gone with it")


@dataclass
class ClusterDemo(Demo):
    there: Ground = field(kw_only=True)
    group: str = field(kw_only=True)
    keys: dict[str, str] = field(default_factory=dict, kw_only=True)
    refused: dict[str, str] = field(default_factory=dict, kw_only=True)

    def show(self) -> None:
        self.make_ready()
        admin = Cluster.from_kubeconfig(self.there.kubeconfig)
        up = self.start()
        looker = Looker(self.there.kubeconfig, self.sweeper.installation)
        looker.start()
        try:
            self.add_tenants()
            self.submit("house")
            self.submit("stranger")
            with self.kept_node(admin):
                if "acme" not in self.refused:
                    self.submit("acme")
            self.compare()
        finally:
            self.stop(up)
            looker.stop()
        looker.clear(self.failures)
        self.show_what_is_left_here()
        admin.close()

    def make_ready(self) -> None:
        pool = [] if self.there.pool is None else ["--pool", self.there.pool]
        title("blastdoor cluster install")
        applied = self.admin_command("install", *pool)
        objects = ", ".join(applied.stdout.splitlines())
        print(textwrap.fill(objects, 100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False))
        title("blastdoor cluster check")
        checked = self.admin_command("check", *pool, may_fail=True, shown=True)
        if checked.returncode != 0:
            self.failures.append("the cluster does not enforce all that it should")
        self.state.mkdir(mode=0o700)
        kubeconfig = self.state.parent / "engine.kubeconfig"
        kubeconfig.touch(mode=0o600)
        kubeconfig.write_text(self.admin_command("kubeconfig").stdout)
        os.environ |= {
            "BLASTDOOR_BOUNDARIES": '["namespace"]', "BLASTDOOR_KUBECONFIG": str(kubeconfig),
            "BLASTDOOR_KUBE_IMAGE": self.there.image, "BLASTDOOR_PROBE_S": "2",
            "BLASTDOOR_CANARY_S": "600",
        }  # fmt: skip

    def admin_command(
        self, *words: str, may_fail: bool = False, shown: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """`blastdoor cluster ...` as the cluster's administrator."""
        environment = dict(os.environ) | {"KUBECONFIG": str(self.there.kubeconfig)}
        if words[0] != "kubeconfig":
            environment["BLASTDOOR_KUBE_IMAGE"] = self.there.image
        done = subprocess.run(
            [*BLASTDOOR, "cluster", *words], stdout=None if shown else subprocess.PIPE, text=True, check=False,
            env=environment,
        )  # fmt: skip
        if done.returncode != 0 and not may_fail:
            raise Disappointed(f"`blastdoor cluster {words[0]}` ended with {done.returncode}")
        return done

    def add_tenants(self) -> None:
        title("Three tenants:  examples/tenants/tenants.json")
        for body in json.loads((TENANTS / "tenants.json").read_text()):
            words = ["--trusted"] * (body["trust"] == "trusted")
            if body.get("affinity"):
                words += ["--affinity", self.group]
            print(f"  blastdoor tenants add {' '.join([body['name'], *words])}")
            made = self.command("tenants", "add", body["name"], *words, "--json")
            if made.returncode != 0:
                raise Disappointed(f"tenant {body['name']} was not added: {made.stderr}")
            self.keys[body["name"]] = json.loads(made.stdout)["key"]

    def command(self, *words: str, tenant: str | None = None) -> subprocess.CompletedProcess[str]:
        """The tenant's key where one is named, else that of the state directory."""
        environment = {name: value for name, value in os.environ.items() if name != "BLASTDOOR_KEY"}
        if tenant is not None:
            environment |= {"BLASTDOOR_KEY": self.keys[tenant], "BLASTDOOR_URL": self.ready["url"]}
        argv = [*BLASTDOOR, *words, "--state", str(self.state)]
        return subprocess.run(argv, capture_output=True, text=True, check=False, env=environment)

    def submit(self, tenant: str) -> None:
        title(f"{tenant}:  blastdoor run examples/tenants/scenario")
        played = self.command("run", str(TENANTS / "scenario"), tenant=tenant)
        print(played.stdout, end="")
        if played.returncode != 0:
            print(visible(played.stderr), end="")
            self.failures.append(f"{tenant}'s run ended with exit code {played.returncode}")
            return
        newest = json.loads(self.command("runs", "--limit", "1", "--json", tenant=tenant).stdout)["items"][0]
        shown = self.command("runs", "show", newest["id"], "--json", tenant=tenant)
        self.runs[tenant] = json.loads(shown.stdout)

    @contextmanager
    def kept_node(self, admin: Cluster) -> Iterator[None]:
        """A node that is kept for the tenant with affinity. In a cluster of ours the one node is given to it, after the
        platform has refused to do without."""
        if self.group in groups(admin.list("Node"), selector={}):
            yield
            return
        self.show_refusal()
        if not self.there.ours:
            print(f"\nNo node of this cluster is kept for {self.group}, and so the run is refused, as it must be.")
            print("To see the third wall, give the tenant a node (examples/tenants/README.md says what that means):")
            print(f"  kubectl label node NODE {GROUP_KEY}={self.group}")
            print(f"  kubectl taint node NODE {TAINT_KEY}={self.group}:NoSchedule")
            yield
            return
        del self.refused["acme"]
        name = admin.list("Node")[0]["metadata"]["name"]
        title(f"The node is given to {self.group}: its pods come there, and no others do")
        print(f"  kubectl label node {name} {GROUP_KEY}={self.group}")
        print(f"  kubectl taint node {name} {TAINT_KEY}={self.group}:NoSchedule")
        taint = {"key": TAINT_KEY, "value": self.group, "effect": "NoSchedule"}
        node = {
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {GROUP_KEY: self.group}},
            "spec": {"taints": [taint]},
        }  # fmt: skip
        admin.apply(node, owner="demo")
        if eventually(lambda: None if self._is_refused() else True, seconds=WITHIN_S) is None:
            self.failures.append("the worker did not notice the node")
        print("  The worker has noticed.")
        yield

    def _is_refused(self) -> str | None:
        """Asks for a place with a scenario that does nothing. -> why there is none."""
        asked = self.command("run", str(TENANTS / "scenario"), "--detach", "--json", tenant="acme")
        if asked.returncode == 0:
            self.command("runs", "cancel", json.loads(asked.stdout)["id"], tenant="acme")
            return None
        return asked.stderr or asked.stdout

    def show_refusal(self) -> None:
        title("acme:  blastdoor run examples/tenants/scenario  - while no node is kept for it")
        why = self._is_refused()
        if why is None:
            self.failures.append("acme's run was accepted with no node that is kept for it")
            return
        print(visible(why), end="")
        self.refused["acme"] = why

    def compare(self) -> None:
        title("The same scenario behind three walls")
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), show_header=True, header_style="bold")
        table.add_column("")
        runs = {tenant: self.runs[tenant] for tenant in WALLS if tenant in self.runs}
        for tenant in runs:
            table.add_column(tenant, overflow="fold")
        rows = [facts(run) for run in runs.values()]
        for name in rows[0] if rows else ():
            table.add_row(name, *(row[name] for row in rows))
        Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False).print(table)
        for tenant, wall in WALLS.items():
            found = self.runs.get(tenant, {}).get("placement", {}).get("boundary")
            if found != wall and tenant not in self.refused:
                self.failures.append(f"{tenant} landed in {found or 'nothing'}, and not in {wall}")

    def show_what_is_left_here(self) -> None:
        title(f"What is left on this machine of installation {self.sweeper.installation}")
        left = self.sweeper.look()
        for kind in ("processes", "ports"):
            most, now = self.sweeper.most.get(kind, 0), left[kind]
            say_left(kind, most, len(now))
            if now or not most:
                self.failures.append(f"{kind} of this machine: {most} seen while it ran, and now {sorted(now)[:5]}")


def facts(run: dict[str, Any]) -> dict[str, str]:
    """What is compared, for people."""
    placement, evidence = run["placement"], run["evidence"]
    rejected = {row["boundary"]: row["missing"] for row in placement["rejected"]}
    guarantees, node, policy = placement["guarantees"], evidence["node"], evidence["policy"]
    seen = dict(line.split(" ", 1) for line in run["steps"][0]["stdout"]["text"].splitlines() if " " in line)
    not_that = next((name for name in WALLS.values() if name in rejected), "")
    return {
        "wall": placement["boundary"],
        "why": "\n".join(placement["why"]),
        "and not": f"{not_that}: {rejected[not_that].removeprefix('nothing; ')}" if not_that else "",
        "gives": ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in guarantees.items()),
        "runtime": f"{evidence['runtime']} (RuntimeClass {evidence['runtime_class'] or 'none'})",
        "node": f"{node['name']}, kernel {node['kernel']}, "
        + (f"kept for {node['group']}" if node["group"] else "shared"),
        "kernel the guest sees": seen.get("kernel", "?"),
        "namespace": evidence["namespace"]["name"],
        "PodSecurity": evidence["namespace"]["pod_security"],
        "network": f"{evidence['network']}; shut for this pod after {policy['shut_after_s']:.2f} s",
        "user": str(evidence["uid"]),
        "memory, cpu": f"{evidence['limits']['memory_bytes'] // 2**20} MiB, {evidence['limits']['cpu']:g}",
        "outcome": f"{run['outcome']} in {run['usage']['wall_s']:.2f} s",
    }


class Looker:
    """Looks in the cluster for what carries the installation's label."""

    def __init__(self, kubeconfig: Path, installation: str) -> None:
        self._cluster = Cluster.from_kubeconfig(kubeconfig)
        self._mine = {f"{PREFIX}installation": installation}
        self.most = {"Pod": 0, "Namespace": 0}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep_looking, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _keep_looking(self) -> None:
        while not self._stopping.wait(0.5):
            with suppress(ClusterError):
                for kind, found in self.look().items():
                    self.most[kind] = max(self.most[kind], len(found))

    def look(self) -> dict[str, list[str]]:
        return {
            kind: [one["metadata"]["name"] for one in self._cluster.list(kind, labels=self._mine)] for kind in self.most
        }

    def clear(self, failures: list[str]) -> None:
        """Runs have left nothing; what an installation keeps between runs goes with it."""
        title("What is left in the cluster")
        kept = self.look()
        of_runs = [name for name in kept["Namespace"] if not name.startswith(("bd-t-", "bd-listener-"))]
        if of_runs:
            failures.append(f"namespaces of runs were left: {of_runs}")
        print("  Kept for the next runs, and removed now: " + ", ".join(kept["Namespace"]))
        for name in kept["Namespace"]:
            self._cluster.delete("Namespace", name)
        eventually(lambda: None if any(self.look().values()) else True, seconds=WITHIN_S)
        for kind, now in self.look().items():
            say_left(f"{kind.lower()}s", self.most[kind], len(now))
            if now or not self.most[kind]:
                failures.append(f"{kind}s in the cluster: {self.most[kind]} seen while it ran, and now {now}")
        self._cluster.close()


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.exit(main())
