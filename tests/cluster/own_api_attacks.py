"""What a scenario may not ask of the API server of its own cluster: one request for each, and what refuses it.

`{ns}` stands for the namespace: the scenario's in the attack, one without walls in its control, where the administrator
asks for the very same and gets it. `by` is what the refusal has to say: the name of a rule, or "cannot", which
is RBAC's word.
"""

import json
from dataclasses import dataclass, field
from typing import Any

from tests.cluster.own_api_ground import CLAIM, CRDS, TAKEN, definition, make, template
from workers.kube import Manifest

POD = "victim"
"""Of no node, so that nothing runs and nobody else writes its status."""
SERVICE = CONFIG = "victim"
RBAC = "rbac.authorization.k8s.io/v1"
_C, _N = "/api/v1", "/api/v1/namespaces/{ns}"
ADMISSION, TOKENS = "admissionregistration.k8s.io/v1", "authentication.k8s.io/v1"
RULES = [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["*"], "resources": ["*"]}]
HOOK = {"name": "hook.example.com", "clientConfig": {"url": "https://10.0.0.1/"}, "rules": RULES, "sideEffects": "None",
        "admissionReviewVersions": ["v1"]}  # fmt: skip
CONVERSION = {
    "strategy": "Webhook",
    "webhook": {"clientConfig": {"url": "https://10.0.0.1/"}, "conversionReviewVersions": ["v1"]},
}


@dataclass(frozen=True)
class Attack:
    """`taken`: whether the control must succeed; else it must only not be refused (there is nothing to connect to).
    `dry`: the control only tries."""

    by: str
    method: str
    path: str
    body: Manifest | None = field(default=None)
    taken: bool = True
    dry: bool = True

    def at(self, namespace: str, node: str) -> tuple[str, str, Manifest | None]:
        """-> method, path and body of the request."""

        def placed(text: str) -> str:
            return text.replace("{ns}", namespace).replace("{node}", node)

        return self.method, placed(self.path), None if self.body is None else json.loads(placed(json.dumps(self.body)))


def _named(kind: str, version: str, name: str = "mine", **more: Any) -> Manifest:
    return make(kind, version, name, None, **more)


def _in(kind: str, version: str, name: str = "mine", **more: Any) -> Manifest:
    return make(kind, version, name, "{ns}", **more)


def _role(kind: str, *, resources: list[str], verbs: list[str], group: str = "", **metadata: Any) -> Manifest:
    rules = [{"apiGroups": [group], "resources": resources, "verbs": verbs}]
    made = (_in if kind == "Role" else _named)(kind, RBAC, rules=rules)
    return made | {"metadata": made["metadata"] | metadata}


def _binding(kind: str, role: str, subject: Manifest, *, of: str = "Role") -> Manifest:
    ref = {"apiGroup": "rbac.authorization.k8s.io", "kind": of, "name": role}
    return (_in if kind == "RoleBinding" else _named)(kind, RBAC, roleRef=ref, subjects=[subject])


def _apis(group: str, version: str, what: str) -> str:
    return f"/apis/{group}/{version}/{what}"


_PEER = {"kind": "ServiceAccount", "name": "default", "namespace": "scenario"}
_SOMEBODY = {"kind": "User", "name": "somebody", "apiGroup": "rbac.authorization.k8s.io"}
_TOKEN: Manifest = {"apiVersion": TOKENS, "kind": "TokenRequest", "spec": {"audiences": []}}
_RBAC_ALL = "/apis/rbac.authorization.k8s.io/v1"
_RBAC_IN = f"{_RBAC_ALL}/namespaces/{{ns}}"
_ADMIT = "/apis/admissionregistration.k8s.io/v1"
_NET = "/apis/networking.k8s.io/v1/namespaces/{ns}"


def _aggregated() -> Manifest:
    labels = {"rbac.authorization.k8s.io/aggregate-to-edit": "true"}
    return _role("ClusterRole", resources=["nodes"], verbs=["*"], labels=labels)


def _approved(group: str) -> Manifest:
    """The API server wants that said of its own groups; anybody can."""
    made = definition(group)
    return made | {"metadata": made["metadata"] | {"annotations": {"api-approved.kubernetes.io": "unapproved, x"}}}


_CSR = _named(
    "CertificateSigningRequest", "certificates.k8s.io/v1",
    spec={"request": "e30=", "signerName": "kubernetes.io/kube-apiserver-client", "usages": ["client auth"]},
)  # fmt: skip
_PV = _named(
    "PersistentVolume", "v1",
    spec={"capacity": {"storage": "1Mi"}, "accessModes": ["ReadWriteOnce"], "hostPath": {"path": "/"}},
)  # fmt: skip
_POLICY_SPEC = {
    "failurePolicy": "Ignore",
    "matchConstraints": {"resourceRules": [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"],
                                            "resources": ["pods"]}]},
    "validations": [{"expression": "true"}],
}  # fmt: skip

OF_THE_CLUSTER: dict[str, Attack] = {
    "a cluster role": Attack("cannot", "POST", f"{_RBAC_ALL}/clusterroles",
                             _role("ClusterRole", resources=["pods"], verbs=["get"])),
    "an aggregated cluster role": Attack("cannot", "POST", f"{_RBAC_ALL}/clusterroles", _aggregated()),
    "a cluster role binding": Attack("cannot", "POST", f"{_RBAC_ALL}/clusterrolebindings",
                                     _binding("ClusterRoleBinding", "cluster-admin", _PEER, of="ClusterRole")),
    "a certificate request": Attack("cannot", "POST", _apis("certificates.k8s.io", "v1", "certificatesigningrequests"),
                                    _CSR, taken=False),
    "a persistent volume of the host": Attack("cannot", "POST", f"{_C}/persistentvolumes", _PV),
    "the nodes": Attack("cannot", "GET", f"{_C}/nodes"),
    "a node changed": Attack("cannot", "POST", f"{_C}/nodes", _named("Node", "v1")),
    "the kubelet by way of the API server": Attack("cannot", "GET", f"{_C}/nodes/{{node}}/proxy/pods"),
    "a validating webhook": Attack("cannot", "POST", f"{_ADMIT}/validatingwebhookconfigurations",
                                   _named("ValidatingWebhookConfiguration", ADMISSION, webhooks=[HOOK])),
    "a mutating webhook": Attack("cannot", "POST", f"{_ADMIT}/mutatingwebhookconfigurations",
                                 _named("MutatingWebhookConfiguration", ADMISSION, webhooks=[HOOK])),
    "an admission policy": Attack("cannot", "POST", f"{_ADMIT}/validatingadmissionpolicies",
                                  _named("ValidatingAdmissionPolicy", ADMISSION, spec=_POLICY_SPEC)),
    "our policy for pods away": Attack("cannot", "DELETE",
                                       f"{_ADMIT}/validatingadmissionpolicies/blastdoor-own-api-pods"),
    "our binding away": Attack("cannot", "DELETE",
                               f"{_ADMIT}/validatingadmissionpolicybindings/blastdoor-own-api-writes"),
    "our defaults away": Attack("cannot", "DELETE", f"{_ADMIT}/mutatingadmissionpolicies/blastdoor-own-api-defaults"),
    "an API of its own": Attack(
        "cannot", "POST", _apis("apiregistration.k8s.io", "v1", "apiservices"),
        _named("APIService", "apiregistration.k8s.io/v1", "v1.mine.example.com", spec={
            "group": "mine.example.com", "version": "v1", "groupPriorityMinimum": 100, "versionPriority": 100,
            "insecureSkipTLSVerify": True, "service": {"name": "x", "namespace": "default"}})),
    "a runtime class": Attack("cannot", "POST", _apis("node.k8s.io", "v1", "runtimeclasses"),
                              _named("RuntimeClass", "node.k8s.io/v1", handler="runc")),
    "a priority class": Attack("cannot", "POST", _apis("scheduling.k8s.io", "v1", "priorityclasses"),
                               _named("PriorityClass", "scheduling.k8s.io/v1", value=1000)),
    "a storage class": Attack("cannot", "POST", _apis("storage.k8s.io", "v1", "storageclasses"),
                              _named("StorageClass", "storage.k8s.io/v1", provisioner="x")),
    "a flow schema": Attack(
        "cannot", "POST", _apis("flowcontrol.apiserver.k8s.io", "v1", "flowschemas"),
        _named("FlowSchema", "flowcontrol.apiserver.k8s.io/v1",
               spec={"priorityLevelConfiguration": {"name": "exempt"}, "matchingPrecedence": 500})),
    "another namespace": Attack("cannot", "POST", f"{_C}/namespaces", _named("Namespace", "v1")),
    "the secrets of the system": Attack("cannot", "GET", f"{_C}/namespaces/kube-system/secrets"),
    "a pod of the system": Attack("cannot", "POST", f"{_C}/namespaces/kube-system/pods",
                                  make("Pod", "v1", namespace="kube-system", spec=template()["spec"]), taken=False),
    "a ConfigMap of the system": Attack("cannot", "POST", f"{_C}/namespaces/kube-system/configmaps",
                                        make("ConfigMap", "v1", namespace="kube-system")),
    "a pod beside the listener": Attack("cannot", "POST", f"{_C}/namespaces/default/pods",
                                        make("Pod", "v1", namespace="default", spec=template()["spec"])),
    "our parameters": Attack("cannot", "GET", f"{_C}/namespaces/blastdoor-system/configmaps"),
    "a token of the system": Attack(
        "cannot", "POST", f"{_C}/namespaces/kube-system/serviceaccounts/default/token", _TOKEN, dry=False),
    "a token of the engine": Attack(
        "cannot", "POST", f"{_C}/namespaces/blastdoor-system/serviceaccounts/engine/token", _TOKEN, dry=False),
    "who somebody is": Attack("cannot", "POST", _apis("authentication.k8s.io", "v1", "tokenreviews"),
                              {"apiVersion": TOKENS, "kind": "TokenReview", "spec": {"token": "x"}}),
    "what somebody may": Attack(
        "cannot", "POST", _apis("authorization.k8s.io", "v1", "subjectaccessreviews"),
        {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview",
         "spec": {"user": "x", "resourceAttributes": {"verb": "get", "resource": "pods"}}}),
}  # fmt: skip
"""Beyond its namespace, where RBAC gives it nothing."""

OF_RIGHTS: dict[str, Attack] = {
    "a role that may escalate": Attack(
        "not currently held", "POST", f"{_RBAC_IN}/roles",
        _role("Role", resources=["roles"], verbs=["escalate"], group="rbac.authorization.k8s.io")),
    "a role that may bind": Attack(
        "not currently held", "POST", f"{_RBAC_IN}/roles",
        _role("Role", resources=["roles"], verbs=["bind"], group="rbac.authorization.k8s.io")),
    "a role that may impersonate": Attack(
        "not currently held", "POST", f"{_RBAC_IN}/roles",
        _role("Role", resources=["serviceaccounts"], verbs=["impersonate"])),
    "a role of every verb": Attack(
        "not currently held", "POST", f"{_RBAC_IN}/roles", _role("Role", resources=["pods"], verbs=["*"])),
    "the administrator's role, bound here": Attack(
        "not currently held", "POST", f"{_RBAC_IN}/rolebindings",
        _binding("RoleBinding", "cluster-admin", _PEER, of="ClusterRole")),
    "a cluster's role, bound here": Attack(
        "rolebindings: ", "POST", f"{_RBAC_IN}/rolebindings", _binding("RoleBinding", "view", _PEER, of="ClusterRole")),
    "a role for somebody else": Attack(
        "rolebindings: ", "POST", f"{_RBAC_IN}/rolebindings", _binding("RoleBinding", "blastdoor-own-api", _SOMEBODY)),
    "a role for an account of the system": Attack(
        "rolebindings: ", "POST", f"{_RBAC_IN}/rolebindings",
        _binding("RoleBinding", "blastdoor-own-api", _PEER | {"namespace": "kube-system"})),
}  # fmt: skip

OF_THE_NAMESPACE: dict[str, Attack] = {
    # Its walls.
    "the namespace's labels": Attack("kinds: ", "PUT", _N, _named("Namespace", "v1", "{ns}")),
    "the namespace's end": Attack("kinds: ", "DELETE", _N),
    "the namespace finalized": Attack("kinds: ", "PUT", f"{_N}/finalize",
                                      _named("Namespace", "v1", "{ns}", spec={"finalizers": []})),
    "a network policy": Attack("kinds: ", "POST", f"{_NET}/networkpolicies", _in(
        "NetworkPolicy", "networking.k8s.io/v1", spec={"podSelector": {}, "egress": [{}], "policyTypes": ["Egress"]})),
    "the network policy away": Attack("kinds: ", "DELETE", f"{_NET}/networkpolicies/default-deny"),
    "all network policies away": Attack("kinds: ", "DELETE", f"{_NET}/networkpolicies"),
    "the network policy changed": Attack("kinds: ", "PUT", f"{_NET}/networkpolicies/default-deny", _in(
        "NetworkPolicy", "networking.k8s.io/v1", "default-deny", spec={"podSelector": {"matchLabels": {"a": "b"}}})),
    "the quota away": Attack("kinds: ", "DELETE", f"{_N}/resourcequotas/blastdoor"),
    "the quota raised": Attack("kinds: ", "PUT", f"{_N}/resourcequotas/blastdoor", _in(
        "ResourceQuota", "v1", "blastdoor", spec={"hard": {"pods": "1000"}})),
    "the quota's count": Attack("kinds: ", "PUT", f"{_N}/resourcequotas/blastdoor/status", _in(
        "ResourceQuota", "v1", "blastdoor", status={"hard": {"pods": "1000"}, "used": {"pods": "0"}})),
    "the limits away": Attack("kinds: ", "DELETE", f"{_N}/limitranges/blastdoor"),
    "a quota": Attack("kinds: ", "POST", f"{_N}/resourcequotas", _in("ResourceQuota", "v1", spec={"hard": {}})),
    # What the API server or a controller would do for it.
    "a pod's address": Attack("kinds: ", "PUT", f"{_N}/pods/{POD}/status", _in(
        "Pod", "v1", POD, spec=template()["spec"], status={"podIP": "169.254.169.254"})),
    "a pod by way of the API server": Attack("kinds: ", "GET", f"{_N}/pods/{POD}/proxy/", taken=False),
    "a service by way of the API server": Attack("kinds: ", "GET", f"{_N}/services/{SERVICE}/proxy/", taken=False),
    "a port of a pod": Attack("kinds: ", "POST", f"{_N}/pods/{POD}/portforward?ports=80", taken=False),
    "a pod's terminal": Attack("kinds: ", "POST", f"{_N}/pods/{POD}/attach?stdin=true", taken=False),
    "a pod put on a node": Attack("kinds: ", "POST", f"{_N}/pods/{POD}/binding", _in(
        "Binding", "v1", POD, target={"kind": "Node", "name": "{node}"})),
    "a pod put on a node, the old way": Attack("kinds: ", "POST", f"{_N}/bindings", _in(
        "Binding", "v1", POD, target={"kind": "Node", "name": "{node}"})),
    "an ephemeral container": Attack("kinds: ", "PUT", f"{_N}/pods/{POD}/ephemeralcontainers", _in(
        "Pod", "v1", POD, spec=template()["spec"] | {"ephemeralContainers": [
            {"name": "debug", "image": "blastdoor.test/any@sha256:" + "0" * 64, "securityContext": {
                "runAsNonRoot": True, "runAsUser": 1, "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]}, "seccompProfile": {"type": "RuntimeDefault"}}}]})),
    "a pod grown": Attack("kinds: ", "PUT", f"{_N}/pods/{POD}/resize", _in(
        "Pod", "v1", POD, spec=template()["spec"]), taken=False),
    "a pod evicted": Attack("kinds: ", "POST", f"{_N}/pods/{POD}/eviction", _in("Eviction", "policy/v1", POD)),
    "endpoints": Attack("kinds: ", "POST", f"{_N}/endpoints", _in("Endpoints", "v1", subsets=[
        {"addresses": [{"ip": "10.0.0.1"}], "ports": [{"port": 10250}]}])),
    "an endpoint slice": Attack(
        "kinds: ", "POST", "/apis/discovery.k8s.io/v1/namespaces/{ns}/endpointslices",
        _in("EndpointSlice", "discovery.k8s.io/v1", addressType="IPv4", ports=[{"name": "x", "port": 10250}],
            endpoints=[{"addresses": ["10.0.0.1"]}])),
    "an ingress": Attack("kinds: ", "POST", f"{_NET}/ingresses", _in(
        "Ingress", "networking.k8s.io/v1", spec={"defaultBackend": {"service": {"name": "x", "port": {"number": 1}}}})),
    "a volume claim": Attack("kinds: ", "POST", f"{_N}/persistentvolumeclaims",
                             _in("PersistentVolumeClaim", "v1", spec=CLAIM)),
    "a token without the kubelet": Attack("kinds: ", "POST", f"{_N}/serviceaccounts/default/token", _TOKEN, dry=False),
    "a budget that holds a node's drain": Attack(
        "kinds: ", "POST", "/apis/policy/v1/namespaces/{ns}/poddisruptionbudgets",
        _in("PodDisruptionBudget", "policy/v1", spec={"minAvailable": 1, "selector": {}})),
    "a scaler": Attack(
        "kinds: ", "POST", "/apis/autoscaling/v2/namespaces/{ns}/horizontalpodautoscalers",
        _in("HorizontalPodAutoscaler", "autoscaling/v2", spec={
            "maxReplicas": 9, "scaleTargetRef": {"kind": "Deployment", "name": "x", "apiVersion": "apps/v1"}})),
    "a controller's own record": Attack(
        "kinds: ", "POST", "/apis/apps/v1/namespaces/{ns}/controllerrevisions",
        _in("ControllerRevision", "apps/v1", revision=1, data={})),
    "a kind of the network plugin's": Attack(
        "kinds: ", "POST", f"/apis/{TAKEN}/v1/namespaces/{{ns}}/rules", _in("Rule", f"{TAKEN}/v1", spec={})),
    # What may stand in the kinds that it may write.
    "a port of every node": Attack("services: ", "POST", f"{_N}/services", _in(
        "Service", "v1", spec={"type": "NodePort", "ports": [{"port": 80}]})),
    "a load balancer": Attack("services: ", "POST", f"{_N}/services", _in(
        "Service", "v1", spec={"type": "LoadBalancer", "ports": [{"port": 80}]})),
    "a service for a name": Attack("services: ", "POST", f"{_N}/services", _in(
        "Service", "v1", spec={"type": "ExternalName", "externalName": "metadata.example"})),
    "a service at somebody's address": Attack("services: ", "POST", f"{_N}/services", _in(
        "Service", "v1", spec={"externalIPs": ["10.0.0.1"], "ports": [{"port": 80}]})),
    "a token without an end": Attack("secrets: ", "POST", f"{_N}/secrets", _in(
        "Secret", "v1", type="kubernetes.io/service-account-token",
        metadata={"annotations": {"kubernetes.io/service-account.name": "default"}})),
    "an object that stays": Attack("finalizers: ", "POST", f"{_N}/configmaps", _in(
        "ConfigMap", "v1", metadata={"finalizers": ["example.com/stay"]})),
    "an object that says it is ours": Attack("marks: ", "POST", f"{_N}/configmaps", _in(
        "ConfigMap", "v1", metadata={"labels": {"blastdoor.dev/managed": "true"}})),
}  # fmt: skip
"""In its namespace, where RBAC gives it everything."""

OF_DEFINITIONS: dict[str, Attack] = {
    "a conversion by webhook": Attack("conversion: ", "POST", CRDS, definition(conversion=CONVERSION)),
    "objects in no namespace": Attack("scope: ", "POST", CRDS, definition(scope="Cluster")),
    "a group of the network plugin's": Attack("group: ", "POST", CRDS, definition(TAKEN, plural="others")),
    "a group of the cluster's": Attack("group: ", "POST", CRDS, _approved("apps.k8s.io")),
    "a group below one of the cluster's": Attack("group: ", "POST", CRDS, _approved("x.metrics.k8s.io")),
    "a group without a dot": Attack("group: ", "POST", CRDS, definition("mine"), taken=False),
    "many versions": Attack("versions: ", "POST", CRDS, definition(versions=[
        {"name": f"v{n}", "served": True, "storage": n == 1, "schema": {"openAPIV3Schema": {"type": "object"}}}
        for n in range(1, 5)])),
    "the network plugin's definition away": Attack("group: ", "DELETE", f"{CRDS}/rules.{TAKEN}"),
    "every definition away": Attack("cannot", "DELETE", CRDS),
}  # fmt: skip

ATTACKS = OF_THE_CLUSTER | OF_RIGHTS | OF_THE_NAMESPACE | OF_DEFINITIONS
