"""The engine's rights: all that it needs, and a list of what it must not be able to do, each tried."""

from pathlib import Path

import pytest

from tests.cluster.engines import IMAGE_PREFIX, Ready, ready
from workers.kube import Cluster, ClusterError, Denied
from workers.kube.canary import any_image, canary_namespace, plain_pod, settled
from workers.kube.install import ENGINE
from workers.kube.rights import FORBIDDEN, Right, allowed, shown

__all__ = ["ready"]
NEEDED: list[Right] = [
    *((verb, "", "namespaces") for verb in ("create", "patch", "get", "list", "watch", "delete")),
    *((verb, "", "pods") for verb in ("create", "get", "list", "watch", "delete")),
    *((verb, "", "pods/exec") for verb in ("create", "get")),
    *(
        (verb, "", what)
        for what in ("serviceaccounts", "resourcequotas", "limitranges")
        for verb in ("create", "patch")
    ),
    *((verb, "networking.k8s.io", "networkpolicies") for verb in ("create", "patch")),
    ("list", "", "nodes"),
    ("list", "node.k8s.io", "runtimeclasses"),
    ("list", "admissionregistration.k8s.io", "validatingadmissionpolicies"),
]


@pytest.mark.parametrize("right", FORBIDDEN, ids=shown)
def test_what_the_engine_must_not_do_it_cannot(ready: Ready, right: Right) -> None:
    assert not allowed(ready.admin, ENGINE, right)


@pytest.mark.parametrize("right", NEEDED, ids=shown)
def test_what_the_engine_needs_it_can(ready: Ready, right: Right) -> None:
    assert allowed(ready.admin, ENGINE, right)


def test_every_forbidden_thing_is_one_that_somebody_can_do(ready: Ready) -> None:
    """A misspelt resource would be forbidden to everybody, and show nothing."""
    somebody = "system:serviceaccount:kube-system:engines-test"
    binding = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": "engines-test"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": somebody}],
    }
    ready.admin.apply(binding)
    try:
        known = _resources(ready.admin)
        for right in FORBIDDEN:
            assert allowed(ready.admin, somebody, right)
            assert right[1:] in known or right[0] == "impersonate", f"there is no {shown(right)}"
    finally:
        ready.admin.delete("ClusterRoleBinding", "engines-test")


def _resources(admin: Cluster) -> set[tuple[str, str]]:
    """All that the API server serves, as (group, resource)."""
    served = {("", one["name"]) for one in admin.raw("GET", "/api/v1").body["resources"]}
    for group in admin.raw("GET", "/apis").body["groups"]:
        listed = admin.raw("GET", f"/apis/{group['preferredVersion']['groupVersion']}").body["resources"]
        served |= {(group["name"], one["name"]) for one in listed}
    return served


@pytest.mark.parametrize(
    ("method", "where"),
    [
        ("GET", "/api/v1/namespaces/kube-system/secrets"),
        ("GET", "/api/v1/namespaces/blastdoor-system/configmaps"),
        ("GET", "/api/v1/nodes/lab/proxy/pods"),
        ("GET", "/apis/rbac.authorization.k8s.io/v1/clusterroles"),
        ("DELETE", "/apis/networking.k8s.io/v1/namespaces/default/networkpolicies/x"),
        ("POST", "/api/v1/namespaces/blastdoor-system/serviceaccounts/engine/token"),
    ],
)
def test_the_api_server_refuses_it_to_the_engine(ready: Ready, method: str, where: str) -> None:
    with pytest.raises(Denied, match="cannot"):
        ready.engine.raw(method, where, body={} if method == "POST" else None)


def test_the_engine_cannot_come_as_somebody_else(ready: Ready) -> None:
    posing = Cluster.from_kubeconfig(Path(ready.engine_kubeconfig), acting_as="system:admin")
    with pytest.raises(Denied, match="cannot impersonate"):
        posing.list("Namespace")


def test_the_engine_changes_no_pod_and_looks_into_none_but_by_exec(ready: Ready) -> None:
    with canary_namespace(ready.engine) as room:
        pod = plain_pod(room, any_image(IMAGE_PREFIX))
        name = room["metadata"]["name"]
        settled(lambda: ready.engine.create(pod))
        with pytest.raises(Denied, match="cannot patch resource"):
            ready.engine.apply(pod)
        for inside in ("attach", "portforward", "log"):
            with pytest.raises(Denied, match="cannot get resource"):
                ready.engine.raw("GET", f"/api/v1/namespaces/{name}/pods/canary/{inside}")
        with pytest.raises(ClusterError) as refused:  # the image is none, so there is no container to run it in
            ready.engine.raw("GET", f"/api/v1/namespaces/{name}/pods/canary/exec?command=id&stdout=true")
        assert not isinstance(refused.value, Denied)
