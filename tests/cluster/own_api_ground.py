"""A cluster of the tests locked down as one that belongs to a single run, and those who act in it: its administrator,
the engine, and the run's account."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import pytest

from service.core.boundary import BoundaryKind, BoundaryRef, BoundarySpec
from tests.cluster.engines import CHOICES, IMAGE_PREFIX, Ready, ready
from tests.cluster.pods import eventually
from tests.sandboxes import make_ref, make_spec
from workers.kube import Cluster, ClusterError, Denied, Manifest
from workers.kube.canary import any_image
from workers.kube.install import wanted
from workers.pods.own_api import (
    NAMESPACE,
    Endpoint,
    own_api_cluster,
    render_own_api,
    render_way_to_api,
)
from workers.pods.render import namespace_name, render_namespace

__all__ = ["own", "ready"]
IMAGE = any_image(IMAGE_PREFIX)
TAKEN = "plugin.example.net"
"""A group that the cluster had before the scenario came, as a network plugin's would be."""
OPEN = "unwalled"
"""A namespace like the scenario's with none of the walls, in which controls are tried."""
MIB = 2**20


@dataclass(frozen=True)
class Own:
    """`scenario` acts as the account of the run's pod."""

    ready: Ready
    ref: BoundaryRef
    spec: BoundarySpec
    endpoints: list[Endpoint]
    scenario: Cluster
    user: str

    @property
    def admin(self) -> Cluster:
        return self.ready.admin

    @property
    def run_namespace(self) -> str:
        return namespace_name(self.ref)

    def acting_as(self, user: str) -> Cluster:
        return Cluster.from_kubeconfig(self.ready.kubeconfig, acting_as=user, patience_s=2)


def api_endpoints(admin: Cluster) -> list[Endpoint]:
    """As the driver reads them."""
    found = admin.raw("GET", "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices/kubernetes").body
    (port,) = (one["port"] for one in found["ports"] if one["name"] == "https")
    return [(address, port) for one in found["endpoints"] for address in one["addresses"]]


def api_groups(admin: Cluster) -> list[str]:
    return [one["name"] for one in admin.raw("GET", "/apis").body["groups"]]


@pytest.fixture(scope="module")
def own(ready: Ready) -> Iterator[Own]:
    """Import it, and `ready`, where it is used. At its end the cluster is one for many again."""
    admin = ready.admin
    _define_before(admin)
    ref = make_ref(installation="0123456789abcdef0123456789abcdef", seconds=3600)
    ref = ref.model_copy(update={"kind": BoundaryKind.NAMESPACE, "variant": "gvisor"})
    spec = make_spec(cpu=1, memory=512 * MIB, disk=64 * MIB)
    endpoints = api_endpoints(admin)
    for_all = [*wanted(replace(CHOICES, own_api=True)), *_cluster_wide(admin, endpoints)]
    for_one = render_own_api(ref, spec, api_endpoints=endpoints)
    user = f"system:serviceaccount:{namespace_name(ref)}:sandbox"
    scenario = Cluster.from_kubeconfig(ready.kubeconfig, acting_as=user, patience_s=2)
    try:
        for manifest in for_all:
            admin.apply(manifest)
        for manifest in [*render_namespace(ref, spec), *render_way_to_api(ref, api_endpoints=endpoints)]:
            ready.engine.apply(manifest)
        for manifest in for_one:
            admin.apply(manifest)
        found = Own(ready, ref, spec, endpoints, scenario, user)
        _await_in_force(found)
        yield found
    finally:
        ready.engine.delete("Namespace", namespace_name(ref))
        for manifest in reversed([*for_one, *_cluster_wide(admin, endpoints)]):
            admin.delete(manifest["kind"], manifest["metadata"]["name"], manifest["metadata"].get("namespace"))
        for manifest in wanted(CHOICES):
            admin.apply(manifest)
        for name in (NAMESPACE, namespace_name(ref)):
            eventually(lambda name=name: admin.get("Namespace", name) is None)
        for one in admin.raw("GET", CRDS).body["items"]:
            if one["spec"]["group"] in (TAKEN, "example.com"):
                admin.raw("DELETE", f"{CRDS}/{one['metadata']['name']}")
        scenario.close()


def _define_before(admin: Cluster) -> None:
    quietly(lambda: admin.raw("POST", CRDS, body=definition(TAKEN, plural="rules")))
    eventually(lambda: refusal(lambda: admin.raw("GET", f"/apis/{TAKEN}/v1/rules")) == "")


def _cluster_wide(admin: Cluster, endpoints: list[Endpoint]) -> list[Manifest]:
    made = own_api_cluster(api_groups(admin), images=[IMAGE], runtime_class="gvisor", api_endpoints=endpoints)
    return list(made)


def _await_in_force(own: Own) -> None:
    """Policies come into force within moments, each by itself; so do quotas, and the account of the namespace."""
    runc = customer_pod("canary", runtimeClassName="kata-qemu")
    asks: list[tuple[str, Callable[[], object]]] = [
        ("runtime-class: ", lambda: own.scenario.create(runc, dry_run=True)),
        (
            "kinds: ",
            lambda: own.scenario.raw("POST", f"{core()}/limitranges?dryRun=All", body=make("LimitRange", "v1")),
        ),
        (
            "services: ",
            lambda: own.scenario.raw("POST", f"{core()}/services?dryRun=All", body=service(type="NodePort")),
        ),
        ("scope: ", lambda: own.scenario.raw("POST", f"{CRDS}?dryRun=All", body=definition(scope="Cluster"))),
    ]
    for rule, ask in asks:
        eventually(lambda ask=ask, rule=rule: rule in refusal(ask), lambda ask=ask: refusal(ask), 30)

    def good() -> str:
        return refusal(lambda: own.scenario.create(customer_pod("canary"), dry_run=True))

    eventually(lambda: good() == "", good, 30)


def refusal(ask: Callable[[], object]) -> str:
    """-> with which words the API server refuses it; "" when it does not."""
    try:
        ask()
    except Denied as error:
        return f"{error} {error.detail}"
    except ClusterError as error:
        return f"not refused, failed: {error}"
    return ""


# --- What a customer would write --------------------------------------------------------------------------------------

CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
CLAIM = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Mi"}}}
SECURE = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": True}


def core(namespace: str = NAMESPACE) -> str:
    return f"/api/v1/namespaces/{namespace}"


def make(kind: str, version: str, name: str = "mine", namespace: str | None = NAMESPACE, **more: Any) -> Manifest:
    metadata: Manifest = {"name": name} | ({"namespace": namespace} if namespace else {}) | more.pop("metadata", {})
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **more}


def template(*, image: str = IMAGE, **spec: Any) -> Manifest:
    """Of a pod, as ordinary as can be: neither a runtime class nor a security context is in it."""
    container = {"name": "main", "image": image, "command": ["/bin/sleep", "600"]}
    return {"metadata": {"labels": {"app": "mine"}}, "spec": {"containers": [container], **spec}}


def customer_pod(name: str = "mine", namespace: str = NAMESPACE, **spec: Any) -> Manifest:
    return make("Pod", "v1", name, namespace, spec=template(**spec)["spec"])


def service(namespace: str = NAMESPACE, **spec: Any) -> Manifest:
    ports = {} if spec.get("type") == "ExternalName" else {"ports": [{"port": 80}]}
    return make("Service", "v1", namespace=namespace, spec={"selector": {"app": "mine"}, **ports, **spec})


def definition(group: str = "example.com", *, plural: str = "widgets", **spec: Any) -> Manifest:
    kind = plural[:-1].title()
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
    names = {"plural": plural, "singular": plural[:-1], "kind": kind}
    values = {"group": group, "scope": "Namespaced", "names": names, "versions": [version], **spec}
    return make("CustomResourceDefinition", "apiextensions.k8s.io/v1", f"{plural}.{group}", None, spec=values)


def quietly(ask: Callable[[], object]) -> None:
    with suppress(ClusterError):
        ask()


def own_api_policies(own: Own, kind: str, name: str) -> list[Manifest]:
    made = _cluster_wide(own.admin, own.endpoints)
    return [one for one in made if (one["kind"], one["metadata"]["name"]) == (kind, name)]
