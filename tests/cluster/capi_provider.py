"""What stands behind the objects of Cluster API in these tests: its controllers, played well and badly.

For each Cluster of one namespace it makes what providers make: an object of the infrastructure, a Machine, secrets, all
with finalizers and owners as theirs have; says how far it is in the Cluster's conditions; and takes it away in order.
"""

import base64
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cluster.pods import eventually
from workers.kube import Cluster, ClusterError, Manifest

CAPI = "cluster.x-k8s.io"
VERSION = "v1beta2"
FINALIZER = f"cluster.{CAPI}"
MACHINE_FINALIZER = f"machine.{CAPI}"
_STAGES = ("InfrastructureReady", "ControlPlaneInitialized", "ControlPlaneAvailable", "WorkersAvailable", "Available")
_MERGE = "application/merge-patch+json"
_NOT_FOUND, _CONFLICT = 404, 409
_PLURALS = {"Cluster": "clusters", "Machine": "machines", "DevCluster": "devclusters"}


@dataclass
class Conduct:
    """How it behaves; may be changed while it runs. `stages`: how many of the five conditions it ever reaches;
    `ready_after_s`: for how long it holds back the last; `kubeconfig`: what the secret holds, None for no secret;
    `lets_go`: whether it lifts its finalizer; `vanishes`: after the first condition it deletes the Cluster; `orphans`:
    its Machine stays when the Cluster has gone; `failure`: what it says has failed for good."""

    stages: int = 5
    ready_after_s: float = 0.0
    kubeconfig: bytes | None = None
    lets_go: bool = True
    vanishes: bool = False
    orphans: bool = False
    failure: str = ""
    stale: bool = False
    """What it says it observed of an older generation."""


@dataclass
class Provider:
    """One namespace's. `cluster` is an administrator's."""

    cluster: Cluster
    namespace: str
    conduct: Conduct
    began: dict[str, float] = field(default_factory=dict)
    most: int = 0
    """The most clusters that were there at once with machines."""
    failures: list[str] = field(default_factory=list)

    def turn(self) -> None:
        """Once over all Clusters."""
        found = self.list("Cluster")
        living = [one for one in found if "deletionTimestamp" not in one["metadata"]]
        self.most = max(self.most, len(living))
        for one in found:
            try:
                if one in living:
                    self._make(one)
                else:
                    self._take_away(one)
            except ClusterError as error:
                if error.status not in (_NOT_FOUND, _CONFLICT):  # it went, or changed, meanwhile
                    raise

    # --- Making and taking away --------------------------------------------------------------------------------------

    def _make(self, cluster: Manifest) -> None:
        name, conduct = cluster["metadata"]["name"], self.conduct
        began = self.began.setdefault(cluster["metadata"]["uid"], time.monotonic())
        if FINALIZER not in cluster["metadata"].get("finalizers", ()):
            self._patch("Cluster", name, {"metadata": {"finalizers": [FINALIZER]}})
            owner = {"apiVersion": cluster["apiVersion"], "kind": "Cluster", "name": name,
                     "uid": cluster["metadata"]["uid"]}  # fmt: skip
            self._create(
                "DevCluster", f"infrastructure.{CAPI}", f"{name}-infra", name, owner, {"backend": {"docker": {}}}
            )
            self._create("Machine", CAPI, f"{name}-0", name, owner, _machine(name))
        reached = conduct.stages
        if reached == len(_STAGES) and time.monotonic() - began < conduct.ready_after_s:
            reached -= 1
        self._say(cluster, reached)
        if conduct.vanishes:
            conduct.vanishes = False
            self._delete("Cluster", name)
        if conduct.kubeconfig is not None and reached >= len(_STAGES):
            self._secret(cluster, conduct.kubeconfig)

    def _take_away(self, cluster: Manifest) -> None:
        name, uid = cluster["metadata"]["name"], cluster["metadata"]["uid"]
        if not self.conduct.lets_go:
            message = "* Machine: still attached to a volume"
            row = _condition("Deleting", True, "WaitingForWorkersDeletion", message, cluster)
            self._patch("Cluster", name, {"status": {"conditions": [row]}}, "/status")
            return
        self.began.pop(uid, None)
        if not self.conduct.orphans:
            for kind, called in (("Machine", f"{name}-0"), ("DevCluster", f"{name}-infra")):
                self._delete(kind, called)
                with suppress(ClusterError):
                    self._patch(kind, called, {"metadata": {"finalizers": None}})
        self._patch("Cluster", name, {"metadata": {"finalizers": None}})

    def _say(self, cluster: Manifest, reached: int) -> None:
        rows = []
        for at, kind in enumerate(_STAGES):
            reason, message = ("Done", "") if at < reached else ("Waiting", f"* {kind}: no")
            rows.append(_condition(kind, at < reached, reason, message, cluster, stale=self.conduct.stale))
        status: Manifest = {"conditions": rows, "phase": "Provisioned" if reached == len(_STAGES) else "Provisioning"}
        if self.conduct.failure:
            status["deprecated"] = {"v1beta1": {"failureReason": "CreateError", "failureMessage": self.conduct.failure}}
        if [(row["type"], row["status"]) for row in rows] == [
            (row["type"], row["status"]) for row in (cluster.get("status") or {}).get("conditions", ())
        ]:
            return
        self._patch("Cluster", cluster["metadata"]["name"], {"status": status}, "/status")

    def _secret(self, cluster: Manifest, holds: bytes) -> None:
        name = cluster["metadata"]["name"]
        metadata = {
            "name": f"{name}-kubeconfig", "labels": {f"{CAPI}/cluster-name": name},
            "ownerReferences": [{"apiVersion": cluster["apiVersion"], "kind": "Cluster", "name": name,
                                 "uid": cluster["metadata"]["uid"]}],
        }  # fmt: skip
        body = {"apiVersion": "v1", "kind": "Secret", "type": f"{CAPI}/secret", "metadata": metadata,
                "data": {"value": base64.b64encode(holds).decode()}}  # fmt: skip
        with suppress(ClusterError):
            self.cluster.raw("POST", f"/api/v1/namespaces/{self.namespace}/secrets", body=body)

    # --- Objects -----------------------------------------------------------------------------------------------------

    def list(self, kind: str) -> list[Manifest]:
        group = f"infrastructure.{CAPI}" if kind == "DevCluster" else CAPI
        listed = self.cluster.raw("GET", self._where(group, kind)).body["items"]
        return [{"apiVersion": f"{group}/{VERSION}", "kind": kind} | one for one in listed]

    def secrets(self) -> Sequence[str]:
        listed = self.cluster.raw("GET", f"/api/v1/namespaces/{self.namespace}/secrets").body["items"]
        return [one["metadata"]["name"] for one in listed if one["type"] == f"{CAPI}/secret"]

    def left(self) -> Sequence[str]:
        """All that a sweep must not find."""
        leases = self.cluster.raw("GET", f"/apis/coordination.k8s.io/v1/namespaces/{self.namespace}/leases").body
        found = [f"Lease {one['metadata']['name']}" for one in leases["items"]]
        found += [f"Secret {name}" for name in self.secrets()]
        return found + [f"{kind} {one['metadata']['name']}" for kind in _PLURALS for one in self.list(kind)]

    def _create(self, kind: str, group: str, name: str, of: str, owner: Manifest, spec: Any) -> None:
        metadata = {"name": name, "labels": {f"{CAPI}/cluster-name": of}, "ownerReferences": [owner],
                    "finalizers": [MACHINE_FINALIZER]}  # fmt: skip
        body = {"apiVersion": f"{group}/{VERSION}", "kind": kind, "metadata": metadata, "spec": spec}
        self.cluster.raw("POST", self._where(group, kind), body=body)

    def _patch(self, kind: str, name: str, change: Manifest, below: str = "") -> None:
        group = f"infrastructure.{CAPI}" if kind == "DevCluster" else CAPI
        self.cluster.raw("PATCH", f"{self._where(group, kind)}/{name}{below}", body=change, content=_MERGE)

    def _delete(self, kind: str, name: str) -> None:
        group = f"infrastructure.{CAPI}" if kind == "DevCluster" else CAPI
        with suppress(ClusterError):
            self.cluster.raw("DELETE", f"{self._where(group, kind)}/{name}")

    def let_all_go(self) -> None:
        """The end of a test, whatever it left."""
        for kind in _PLURALS:
            for one in self.list(kind):
                with suppress(ClusterError):
                    self._patch(kind, one["metadata"]["name"], {"metadata": {"finalizers": None}})
                self._delete(kind, one["metadata"]["name"])

    def _where(self, group: str, kind: str) -> str:
        return f"/apis/{group}/{VERSION}/namespaces/{self.namespace}/{_PLURALS[kind]}"


def _machine(cluster: str) -> Manifest:
    infrastructure = {"apiGroup": f"infrastructure.{CAPI}", "kind": "DevMachine", "name": f"{cluster}-0"}
    bootstrap = {"dataSecretName": f"{cluster}-0"}
    return {"clusterName": cluster, "bootstrap": bootstrap, "infrastructureRef": infrastructure}


def _condition(kind: str, true: bool, reason: str, message: str, of: Manifest, *, stale: bool = False) -> Manifest:
    return {
        "type": kind,
        "status": "True" if true else "False",
        "reason": reason,
        "message": message,
        "lastTransitionTime": "2026-01-02T03:04:05Z",
        "observedGeneration": of["metadata"]["generation"] - (1 if stale else 0),
    }


@contextmanager
def provider(kubeconfig: Path, conduct: Conduct) -> Iterator[Provider]:
    """A namespace of its own with a provider at work in it; both end with the block."""
    admin = Cluster.from_kubeconfig(kubeconfig)
    name = f"capi-{secrets.token_hex(4)}"
    admin.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    one, stop = Provider(admin, name, conduct), threading.Event()

    def work() -> None:
        while not stop.wait(0.1):
            try:
                one.turn()
            except ClusterError as error:
                one.failures.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield one
        assert not one.failures, one.failures[:3]
    finally:
        stop.set()
        thread.join()
        one.let_all_go()
        admin.delete("Namespace", name)
        admin.close()


def install(admin: Cluster, definitions: Sequence[Manifest]) -> None:
    """Resource definitions, served when it returns; any number of times."""
    where = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    for one in definitions:
        with suppress(ClusterError):  # it is there
            admin.raw("POST", where, body=one)
    for one in definitions:
        eventually(lambda one=one: _established(admin.raw("GET", f"{where}/{one['metadata']['name']}").body))


def _established(found: Manifest) -> bool:
    rows = (found.get("status") or {}).get("conditions", ())
    return any(row["type"] == "Established" and row["status"] == "True" for row in rows)
