"""What the account of a run may ask of its own cluster's API server: a scenario's work, and nothing that leads out of
its namespace. Each request that must be refused is one that the administrator gets in a namespace without the walls."""

from collections.abc import Iterator

import pytest

from tests.cluster.own_api_attacks import ATTACKS, CONFIG, POD, SERVICE
from tests.cluster.own_api_ground import (
    CRDS,
    OPEN,
    Own,
    core,
    customer_pod,
    definition,
    make,
    own,
    ready,
    refusal,
    service,
    template,
)  # fmt: skip
from tests.cluster.pods import eventually
from workers.kube import Manifest
from workers.kube.rights import Right, allowed, shown
from workers.pods.own_api import NAMESPACE

__all__ = ["own", "ready"]
_RBAC = "rbac.authorization.k8s.io"


@pytest.fixture(scope="module")
def furnished(own: Own) -> Iterator[Own]:
    """The same objects in the scenario's namespace and in one without walls; and a definition that was there before."""
    admin = own.admin
    admin.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": OPEN}})
    for name in (NAMESPACE, OPEN):
        eventually(lambda name=name: admin.get("ServiceAccount", "default", name) is not None)
        pod = customer_pod(POD, name, nodeSelector={"no.such/node": "x"})
        (own.scenario if name == NAMESPACE else admin).create(pod)
        admin.apply(make("ConfigMap", "v1", CONFIG, name))
        named = service(name) | {"metadata": {"name": SERVICE, "namespace": name}}
        admin.raw("POST", f"{core(name)}/services", body=named)
    admin.apply(make("NetworkPolicy", "networking.k8s.io/v1", "default-deny", OPEN, spec={"podSelector": {}}))
    admin.apply(make("ResourceQuota", "v1", "blastdoor", OPEN, spec={"hard": {"pods": "50"}}))
    admin.apply(make("LimitRange", "v1", "blastdoor", OPEN, spec={"limits": []}))
    admin.apply(make("Role", f"{_RBAC}/v1", "blastdoor-own-api", OPEN, rules=[]))
    yield own
    admin.delete("Namespace", OPEN)
    eventually(lambda: admin.get("Namespace", OPEN) is None)


@pytest.fixture(scope="module")
def node(own: Own) -> str:
    return str(own.admin.list("Node")[0]["metadata"]["name"])


@pytest.mark.parametrize("name", ATTACKS)
def test_what_leads_out_is_refused_to_the_scenario(furnished: Own, node: str, name: str) -> None:
    attack = ATTACKS[name]
    method, path, body = attack.at(NAMESPACE, node)
    said = refusal(lambda: furnished.scenario.raw(method, path, body=body))
    assert attack.by in said, said


@pytest.mark.parametrize("name", ATTACKS)
def test_the_same_request_is_taken_where_the_walls_are_not(furnished: Own, node: str, name: str) -> None:
    """Or what refuses it could be a mistake in it."""
    attack = ATTACKS[name]
    method, path, body = attack.at(OPEN, node)
    if method != "GET" and attack.dry:
        path += ("&" if "?" in path else "?") + "dryRun=All"
    said = refusal(lambda: furnished.admin.raw(method, path, body=body))
    assert said == "" or (not attack.taken and said.startswith("not refused")), said


_VERBS: list[Right] = [
    *(("impersonate", "", who) for who in ("users", "groups", "serviceaccounts")),
    ("impersonate", "authentication.k8s.io", "userextras"),
    ("impersonate:user-info", "authentication.k8s.io", "users"),  # 1.35's narrower kinds of it
    ("impersonate:serviceaccount", "authentication.k8s.io", "serviceaccounts"),
    ("impersonate-on:user-info:list", "", "pods"),
    ("impersonate-on:serviceaccount:create", "", "pods"),
    *((verb, _RBAC, what) for verb in ("bind", "escalate") for what in ("roles", "clusterroles")),
    *((verb, "certificates.k8s.io", "signers") for verb in ("approve", "sign", "attest")),
    *((verb, "", "nodes") for verb in ("get", "list", "watch", "create", "update", "patch", "delete")),
    *((verb, "", "nodes/proxy") for verb in ("get", "create")),
    ("use", "policy", "podsecuritypolicies"),
]


@pytest.mark.parametrize("right", _VERBS, ids=shown)
def test_no_verb_that_makes_more_of_it_is_the_scenarios(furnished: Own, right: Right) -> None:
    """In its own namespace either. Somebody has each of them: the administrator's group is asked as well."""
    where = "" if right[2].startswith("nodes") else NAMESPACE  # what is in no namespace is asked for in none
    assert not allowed(furnished.admin, furnished.user, right, where)
    assert not allowed(furnished.admin, f"system:serviceaccount:{NAMESPACE}:default", right, where)
    asked = furnished.admin.raw("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", body=_review(right))
    assert asked.body["status"]["allowed"]


def _review(right: Right) -> Manifest:
    verb, group, what = right
    resource, _, inside = what.partition("/")
    asked = {"verb": verb, "group": group, "resource": resource, "subresource": inside, "namespace": NAMESPACE}
    spec = {"resourceAttributes": asked}
    return {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview", "spec": spec}


_POD = template()
WORK: dict[str, tuple[str, Manifest]] = {
    "a pod": (f"{core()}/pods", make("Pod", "v1", **_POD)),
    "a ConfigMap": (f"{core()}/configmaps", make("ConfigMap", "v1", data={"a": "b"})),
    "a secret": (f"{core()}/secrets", make("Secret", "v1", stringData={"a": "b"})),
    "a service": (f"{core()}/services", service()),
    "an account": (f"{core()}/serviceaccounts", make("ServiceAccount", "v1")),
    "a role for what was defined": (
        f"/apis/{_RBAC}/v1/namespaces/{NAMESPACE}/roles",
        make("Role", f"{_RBAC}/v1", rules=[
            {"apiGroups": ["example.com"], "resources": ["widgets", "widgets/status"], "verbs": ["get", "update"]},
            {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["create", "patch"]}]),
    ),
    "its binding": (
        f"/apis/{_RBAC}/v1/namespaces/{NAMESPACE}/rolebindings",
        make("RoleBinding", f"{_RBAC}/v1", roleRef={"apiGroup": _RBAC, "kind": "Role", "name": "blastdoor-own-api"},
             subjects=[{"kind": "ServiceAccount", "name": "default", "namespace": NAMESPACE}]),
    ),
    "a lease": (f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases", make("Lease", "coordination.k8s.io/v1")),
    "a deployment": (
        f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments",
        make("Deployment", "apps/v1", spec={"selector": {"matchLabels": {"app": "mine"}}, "template": _POD}),
    ),
    "a definition": (CRDS, definition()),
    "a question about itself": (
        "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", _review(("get", "", "pods")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WORK)
def test_what_a_customers_operator_is_made_of_is_taken(furnished: Own, name: str) -> None:
    path, body = WORK[name]
    assert refusal(lambda: furnished.scenario.raw("POST", f"{path}?dryRun=All", body=body)) == ""


def test_an_account_that_the_scenario_gave_everything_may_no_more_than_the_scenario(furnished: Own, node: str) -> None:
    path, body = WORK["its binding"]
    furnished.scenario.raw("POST", path, body=body)
    theirs = furnished.acting_as(f"system:serviceaccount:{NAMESPACE}:default")
    assert refusal(lambda: theirs.raw("POST", f"{core()}/configmaps?dryRun=All", body=WORK["a ConfigMap"][1])) == ""
    for name in ("a pod's address", "the quota away", "a network policy", "a token without an end", "the nodes",
                 "a role that may escalate", "a port of every node", "an ephemeral container"):  # fmt: skip
        method, where, asked = ATTACKS[name].at(NAMESPACE, node)
        assert ATTACKS[name].by in refusal(lambda where=where, method=method, asked=asked: theirs.raw(
            method, where, body=asked)), name  # fmt: skip
    assert "cannot" in refusal(lambda: theirs.raw("POST", f"{CRDS}?dryRun=All", body=definition()))


def test_the_run_has_no_right_in_its_own_namespace(furnished: Own) -> None:
    """Its pod stands there, with what it has for a wall."""
    for what in ("pods", "configmaps", "secrets", "serviceaccounts", "networkpolicies", "resourcequotas"):
        group = "networking.k8s.io" if what == "networkpolicies" else ""
        for verb in ("get", "list", "create", "update", "patch", "delete"):
            assert not allowed(furnished.admin, furnished.user, (verb, group, what), furnished.run_namespace)
    assert allowed(furnished.admin, furnished.user, ("get", "", "pods"), NAMESPACE)


def test_a_token_for_the_runs_account_is_the_kubelets_to_ask_for(furnished: Own, node: str) -> None:
    """Of a pod on its node, which is NodeRestriction's to see: here no pod is named, and that is what is said."""
    where = f"{core(furnished.run_namespace)}/serviceaccounts/sandbox/token"
    body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"audiences": []}}
    assert "contents: " in refusal(lambda: furnished.admin.raw("POST", where, body=body))
    assert "cannot create" in refusal(lambda: furnished.scenario.raw("POST", where, body=body))


def test_a_scenario_that_fills_its_cluster_with_pods_is_stopped_by_the_quota(furnished: Own) -> None:
    """None of them runs: they count all the same. Where there is no such quota every one is taken."""
    nowhere = {"nodeSelector": {"no.such/node": "x"}}
    for namespace, who in ((NAMESPACE, furnished.scenario), (OPEN, furnished.admin)):
        asks = [customer_pod(f"one-of-many-{n}", namespace, **nowhere) for n in range(12)]
        said = [refusal(lambda who=who, pod=pod: who.create(pod)) for pod in asks]
        assert ("exceeded quota: blastdoor" in said[-1]) == (namespace == NAMESPACE), said[-1]
        assert said[0] == ""
        for n in range(12):
            furnished.admin.delete("Pod", f"one-of-many-{n}", namespace, grace_s=0)


def test_no_container_is_larger_than_the_run(furnished: Own) -> None:
    large = customer_pod("large")
    large["spec"]["containers"][0]["resources"] = {"limits": {"memory": "8Gi"}}
    assert "maximum memory usage per Container" in refusal(lambda: furnished.scenario.create(large, dry_run=True))
    large["spec"]["containers"][0]["resources"] = {"limits": {"memory": "512Mi"}}
    assert refusal(lambda: furnished.scenario.create(large, dry_run=True)) == ""
