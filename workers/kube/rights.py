"""What the engine must not be able to do in a cluster, and asking the cluster's own authorizer about it."""

from collections.abc import Sequence

from workers.kube.cluster import Cluster

Right = tuple[str, str, str]
"""Verb, API group ("" is the core's), and resource, with its subresource after a slash."""
_RBAC, _ADMISSION = "rbac.authorization.k8s.io", "admissionregistration.k8s.io"
_INTO_A_POD = ("attach", "portforward", "proxy", "ephemeralcontainers", "resize", "log")
_POLICIES = ("validatingadmissionpolicies", "validatingadmissionpolicybindings")

FORBIDDEN: Sequence[Right] = (
    *((verb, "", resource) for resource in ("secrets", "configmaps") for verb in ("get", "list", "watch", "create")),
    *((verb, "", "pods") for verb in ("patch", "update")),
    *((verb, "", f"pods/{inside}") for inside in _INTO_A_POD for verb in ("get", "create", "update", "patch")),
    ("create", "", "serviceaccounts/token"),
    *(("impersonate", "", who) for who in ("users", "groups", "serviceaccounts")),
    *((verb, "", "nodes") for verb in ("update", "patch", "delete")),
    *((verb, "", "nodes/proxy") for verb in ("get", "create")),
    *(("create", "", resource) for resource in ("services", "persistentvolumes", "persistentvolumeclaims")),
    ("create", "apps", "deployments"),
    ("create", "batch", "jobs"),
    ("delete", "networking.k8s.io", "networkpolicies"),
    ("delete", "", "resourcequotas"),
    *((verb, _RBAC, role) for role in ("roles", "clusterroles") for verb in ("create", "patch", "bind", "escalate")),
    *((verb, _RBAC, role) for role in ("rolebindings", "clusterrolebindings") for verb in ("create", "patch")),
    *((verb, _ADMISSION, policy) for policy in _POLICIES for verb in ("create", "patch", "delete")),
    ("create", "certificates.k8s.io", "certificatesigningrequests"),
    ("patch", "node.k8s.io", "runtimeclasses"),
    ("patch", "flowcontrol.apiserver.k8s.io", "flowschemas"),
)


def allowed(admin: Cluster, user: str, right: Right, namespace: str = "default") -> bool:
    """The authorizer's answer; a user named as a service account is has a service account's groups."""
    verb, group, what = right
    resource, _, inside = what.partition("/")
    groups = ["system:authenticated"]
    if user.startswith("system:serviceaccount:"):
        groups += ["system:serviceaccounts", f"system:serviceaccounts:{user.split(':')[2]}"]
    asked = {"namespace": namespace, "verb": verb, "group": group, "resource": resource, "subresource": inside}
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {"user": user, "groups": groups, "resourceAttributes": asked},
    }
    answer = admin.raw("POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews", body=review)
    return bool(answer.body["status"]["allowed"])


def shown(right: Right) -> str:
    verb, group, what = right
    return f"{verb} {what}" + (f" ({group})" if group else "")
