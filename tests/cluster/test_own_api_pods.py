"""Every pod that a scenario can cause to exist is in gVisor and restricted, by whatever door it comes: the scenario's
own request, or one of the controllers that make pods for it. Each rule is broken by itself, where neither PodSecurity
nor our defaults could be what refuses or mends it."""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import pytest

from tests.cluster.mutants import ELSEWHERE
from tests.cluster.own_api_ground import (
    IMAGE,
    OPEN,
    SECURE,
    Own,
    core,
    customer_pod,
    make,
    own,
    own_api_policies,
    quietly,
    ready,
    refusal,
    template,
)  # fmt: skip
from tests.cluster.pods import eventually
from workers.kube import Manifest
from workers.pods.own_api import NAMESPACE

__all__ = ["own", "ready"]
Change = Callable[[Manifest, Manifest], object]
"""Of a pod's spec, and its one container."""
_HTTP = {"httpGet": {"path": "/", "port": 80, "host": "169.254.169.254"}}


def good(name: str = "mine", namespace: str = NAMESPACE) -> Manifest:
    """A pod that breaks no rule, and leaves nothing to be filled in."""
    limits = {"cpu": "100m", "memory": "64Mi", "ephemeral-storage": "16Mi"}
    pod = customer_pod(
        name, namespace, runtimeClassName="gvisor", priorityClassName="blastdoor-scenario",
        securityContext={"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
    )  # fmt: skip
    pod["spec"]["containers"][0] |= {"securityContext": SECURE, "resources": {"limits": limits}}
    return pod


def _spec(**values: Any) -> Change:
    return lambda spec, _: spec.update(values)


def _run(**values: Any) -> Change:
    return lambda _, container: container.update(values)


def _secure(**values: Any) -> Change:
    return lambda _, container: container.update(securityContext=container["securityContext"] | values)


def _pod_secure(**values: Any) -> Change:
    return lambda spec, _: spec.update(securityContext=spec["securityContext"] | values)


def _volume(**source: Any) -> Change:
    return _spec(volumes=[{"name": "more", **source}])


def _init(**values: Any) -> Change:
    return lambda spec, container: spec.update(initContainers=[container | {"name": "first"} | values])


def _less(key: str) -> Manifest:
    return {one: value for one, value in SECURE.items() if one != key}


def _mounted(within: Manifest) -> Change:
    def change(spec: Manifest, container: Manifest) -> None:
        spec["volumes"] = [{"name": "more", "emptyDir": {"medium": "Memory"}}]
        container["volumeMounts"] = [{"name": "more", "mountPath": "/more"} | within]

    return change


def _from_a_file(spec: Manifest, container: Manifest) -> None:
    spec["volumes"] = [{"name": "more", "emptyDir": {"medium": "Memory"}}]
    container["env"] = [{"name": "X", "valueFrom": {"fileKeyRef": {"volumeName": "more", "path": "x", "key": "X"}}}]


_TOKEN = {"serviceAccountToken": {"path": "token"}}
MUTANTS: Mapping[str, tuple[str, Change]] = {  # what it does -> the rule that it breaks
    "no runtime class": ("runtime-class", lambda spec, _: spec.pop("runtimeClassName")),
    "another runtime class": ("runtime-class", _spec(runtimeClassName="kata-qemu")),
    "root": ("user", _pod_secure(runAsUser=0)),
    "root in the container": ("user", _secure(runAsUser=0)),
    "root allowed": ("user", _pod_secure(runAsNonRoot=False)),
    "root allowed in the container": ("user", _secure(runAsNonRoot=False)),
    "root unsaid": ("user", lambda spec, _: spec["securityContext"].pop("runAsNonRoot")),
    "root in what runs first": ("user", _init(securityContext=SECURE | {"runAsUser": 0})),
    "privileged": ("privileges", _secure(privileged=True, allowPrivilegeEscalation=True)),
    "privileges to be gained": ("privileges", _secure(allowPrivilegeEscalation=True)),
    "privileges to be gained, unsaid": ("privileges", _run(securityContext=_less("allowPrivilegeEscalation"))),
    "a capability": ("privileges", _secure(capabilities={"drop": ["ALL"], "add": ["SYS_ADMIN"]})),
    "capabilities kept": ("privileges", _secure(capabilities={"drop": ["NET_RAW"]})),
    "capabilities unsaid": ("privileges", _run(securityContext=_less("capabilities"))),
    "privileged in what runs first": ("privileges", _init(securityContext={"privileged": True})),
    "no seccomp": ("confinement", _pod_secure(seccompProfile={"type": "Unconfined"})),
    "no seccomp in the container": ("confinement", _secure(seccompProfile={"type": "Unconfined"})),
    "seccomp unsaid": ("confinement", lambda spec, _: spec["securityContext"].pop("seccompProfile")),
    "no AppArmor": ("confinement", _secure(appArmorProfile={"type": "Unconfined"})),
    "an SELinux type": ("confinement", _secure(seLinuxOptions={"type": "spc_t"})),
    "options of Windows": ("confinement", _pod_secure(windowsOptions={"runAsUserName": "x"})),
    "a sysctl": ("confinement", _pod_secure(sysctls=[{"name": "net.ipv4.ip_unprivileged_port_start", "value": "0"}])),
    "a node of its choice": ("node", _spec(nodeName="lab")),
    "a scheduler of its choice": ("node", _spec(schedulerName="mine")),
    "every taint tolerated": ("node", _spec(tolerations=[{"operator": "Exists"}])),
    "the control plane's taint tolerated": ("node", _spec(
        tolerations=[{"key": "node-role.kubernetes.io/control-plane", "operator": "Exists"}])),
    "the system's priority": ("priority", _spec(priorityClassName="system-node-critical")),
    "the run's priority": ("priority", _spec(priorityClassName="blastdoor-low")),
    "the host's network": ("host", _spec(hostNetwork=True)),
    "the host's processes": ("host", _spec(hostPID=True)),
    "the host's IPC": ("host", _spec(hostIPC=True)),
    "processes shared": ("host", _spec(shareProcessNamespace=True)),
    "users of its own": ("host", _spec(hostUsers=False)),
    "a port of the host": ("host", _run(ports=[{"containerPort": 80, "hostPort": 80}])),
    "no limits": ("resources", lambda _, container: container.pop("resources")),
    "no limit on storage": ("resources", _run(resources={"limits": {"cpu": "100m", "memory": "64Mi"}})),
    "a device": ("resources", _run(resources={"limits": {
        "cpu": "100m", "memory": "64Mi", "ephemeral-storage": "16Mi", "example.com/gpu": "1"}})),
    "a claimed device": ("resources", _spec(resourceClaims=[{"name": "gpu", "resourceClaimName": "gpu"}])),
    "another's image": ("image", _run(image=ELSEWHERE)),
    "another image of the same name": ("image", _run(image=IMAGE[:-1] + ("1" if IMAGE.endswith("0") else "0"))),
    "an image by tag": ("image", _run(image=IMAGE.partition("@")[0] + ":1")),
    "another's image first": ("image", _init(image=ELSEWHERE)),
    "a secret to pull with": ("image", _spec(imagePullSecrets=[{"name": "x"}])),
    "a file's words in its environment": ("environment", _from_a_file),
    "a directory of the host": ("volumes", _volume(hostPath={"path": "/"})),
    "a volume that is kept": ("volumes", _volume(persistentVolumeClaim={"claimName": "x"})),
    "a volume made for it": ("volumes", _volume(ephemeral={"volumeClaimTemplate": {"spec": {
        "accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Mi"}}}}})),
    "a driver's volume": ("volumes", _volume(csi={"driver": "x"})),
    "a server's volume": ("volumes", _volume(nfs={"server": "10.0.0.1", "path": "/"})),
    "an image as a volume": ("volumes", _volume(image={"reference": ELSEWHERE})),
    "a root filesystem to write on": ("read-only-root", _secure(readOnlyRootFilesystem=False)),
    "a root filesystem to write on, unsaid": ("read-only-root", _run(securityContext=_less("readOnlyRootFilesystem"))),
    "scratch on the node's disk": ("volumes", _volume(emptyDir={})),
    "a path within what it can write": ("sub-paths", _mounted({"subPath": "x"})),
    "a path within what it can write, by a variable": ("sub-paths", _mounted({"subPathExpr": "x"})),
    "huge pages": ("volumes", _volume(emptyDir={"medium": "HugePages-2Mi"})),
    "the cluster's trust beside a token": ("volumes", _volume(projected={"sources": [
        _TOKEN, {"clusterTrustBundle": {"name": "x", "path": "x"}}]})),
    "a slow end": ("ends", _spec(terminationGracePeriodSeconds=3600)),
    "a probe of another address": ("hooks", _run(livenessProbe=_HTTP)),
    "a probe of another port": ("hooks", _run(readinessProbe={"tcpSocket": {"port": 1, "host": "10.0.0.1"}})),
    "a startup probe of another": ("hooks", _run(startupProbe=_HTTP)),
    "a hook of another": ("hooks", _run(lifecycle={"postStart": _HTTP})),
    "a last hook of another": ("hooks", _run(lifecycle={"preStop": _HTTP})),
}  # fmt: skip
_METADATA: Mapping[str, tuple[str, Manifest]] = {
    **{f"the annotation {key}": ("annotations", {"annotations": {key: "unconfined"}}) for key in (
        "kubernetes.io/config.mirror", "kubernetes.io/config.source", "io.katacontainers.config_path",
        "dev.gvisor.flag.network", "cni.projectcalico.org/ipAddrs", "k8s.v1.cni.cncf.io/networks",
        "container.apparmor.security.beta.kubernetes.io/main", "io.kubernetes.cri-o.Devices")},
    "a finalizer": ("ends", {"finalizers": ["example.com/stay"]}),
    "a label of ours": ("marks", {"labels": {"blastdoor.dev/managed": "true"}}),
}  # fmt: skip


def mutant(name: str, namespace: str) -> tuple[str, Manifest]:
    pod = deepcopy(good(namespace=namespace))
    if name in _METADATA:
        rule, metadata = _METADATA[name]
        pod["metadata"] |= metadata
    else:
        rule, change = MUTANTS[name]
        change(pod["spec"], pod["spec"]["containers"][0])
    if name == "the annotation kubernetes.io/config.mirror":
        pod["spec"]["nodeName"] = "lab"  # the API server takes no other for the mirror of a kubelet's file
    return rule, pod


@pytest.fixture(scope="module")
def bare(own: Own) -> Iterator[str]:
    """A namespace with our rules for the scenario's pods, and nothing else: no PodSecurity, no defaults, no quota."""
    name = "bare"
    own.admin.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    (binding,) = own_api_policies(own, "ValidatingAdmissionPolicyBinding", "blastdoor-own-api-pods")
    chosen = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}
    binding = {**binding, "metadata": {"name": "bare-rules"}, "spec": {**binding["spec"], "matchResources": chosen}}
    own.admin.apply(binding)
    try:
        eventually(lambda: own.admin.get("ServiceAccount", "default", name) is not None)
        broken = mutant("another runtime class", name)[1]
        eventually(lambda: "runtime-class: " in refusal(lambda: own.admin.create(broken, dry_run=True)))
        yield name
    finally:
        own.admin.delete(binding["kind"], "bare-rules")
        own.admin.delete("Namespace", name)
        eventually(lambda: own.admin.get("Namespace", name) is None)


def test_the_pod_that_the_mutants_are_made_of_is_taken(own: Own, bare: str) -> None:
    assert refusal(lambda: own.admin.create(good(namespace=bare), dry_run=True)) == ""
    assert refusal(lambda: own.scenario.create(good(), dry_run=True)) == ""


def test_what_a_customers_workload_has_is_taken(own: Own, bare: str) -> None:
    """Several containers, one that runs first and one beside, probes of the pod itself, its own ports, configuration,
    a token; annotations as tools write them."""
    pod = good(namespace=bare)
    main = pod["spec"]["containers"][0]
    main |= {"ports": [{"containerPort": 8080}], "livenessProbe": {"httpGet": {"path": "/", "port": 8080}},
             "readinessProbe": {"exec": {"command": ["true"]}}, "lifecycle": {"preStop": {"exec": {"command": ["x"]}}},
             "env": [{"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "status.hostIP"}}}]}  # fmt: skip
    pod["spec"]["containers"].append(main | {"name": "second", "ports": []})
    beside = {key: value for key, value in main.items() if key not in ("ports", "lifecycle", "readinessProbe")}
    pod["spec"]["initContainers"] = [beside | {"name": "beside", "restartPolicy": "Always"}]
    main["volumeMounts"] = [{"name": "b", "mountPath": "/b", "subPath": "x"}, {"name": "a", "mountPath": "/a"}]
    pod["spec"]["volumes"] = [
        {"name": "a", "emptyDir": {"medium": "Memory"}}, {"name": "b", "configMap": {"name": "x"}},
        {"name": "c", "secret": {"secretName": "x"}},
        {"name": "d", "projected": {"sources": [_TOKEN, {"configMap": {"name": "x"}}]}},
    ]  # fmt: skip
    pod["metadata"]["annotations"] = {
        "kubectl.kubernetes.io/default-container": "main", "checksum/config": "x", "prometheus.io/scrape": "true",
    }  # fmt: skip
    assert refusal(lambda: own.admin.create(pod, dry_run=True)) == ""


@pytest.mark.parametrize("name", [*MUTANTS, *_METADATA])
def test_a_pod_that_breaks_a_rule_is_refused_by_that_rule(own: Own, bare: str, name: str) -> None:
    rule, pod = mutant(name, bare)
    said = refusal(lambda: own.admin.create(pod, dry_run=True))
    assert f"{rule}: " in said, said


@pytest.mark.parametrize("name", [*MUTANTS, *_METADATA])
def test_the_same_pod_is_taken_where_no_rule_is(own: Own, open_namespace: str, name: str) -> None:
    _, pod = mutant(name, open_namespace)
    assert refusal(lambda: own.admin.create(pod, dry_run=True)) == ""


@pytest.fixture(scope="module")
def open_namespace(own: Own) -> Iterator[str]:
    own.admin.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": OPEN}})
    eventually(lambda: own.admin.get("ServiceAccount", "default", OPEN) is not None)
    yield OPEN
    own.admin.delete("Namespace", OPEN)
    eventually(lambda: own.admin.get("Namespace", OPEN) is None)


def test_an_ephemeral_container_that_breaks_a_rule_is_refused_even_to_the_administrator(own: Own, bare: str) -> None:
    """The scenario may add none at all; who may is judged by the same rules."""
    pod = good("host-of-one", bare)
    pod["spec"]["nodeSelector"] = {"no.such/node": "x"}
    made = own.admin.create(pod)
    del made["metadata"]["resourceVersion"]  # its status is written meanwhile
    where = f"{core(bare)}/pods/host-of-one/ephemeralcontainers"
    fine = {"name": "debug", "image": IMAGE, "securityContext": SECURE}
    for change, rule in (
        ({"securityContext": {"privileged": True}}, "privileges: "), ({"image": ELSEWHERE}, "image: "),
        ({"securityContext": SECURE | {"runAsUser": 0}}, "user: "),
    ):  # fmt: skip
        body = {**made, "spec": {**made["spec"], "ephemeralContainers": [fine | change]}}
        said = refusal(lambda body=body: own.admin.raw("PUT", f"{where}?dryRun=All", body=body))
        assert rule in said
    body = {**made, "spec": {**made["spec"], "ephemeralContainers": [fine]}}
    assert refusal(lambda: own.admin.raw("PUT", f"{where}?dryRun=All", body=body)) == ""


def test_a_pod_that_was_made_cannot_become_one_that_must_not_be(own: Own, bare: str) -> None:
    pod = good("grows", bare)
    pod["spec"]["nodeSelector"] = {"no.such/node": "x"}
    made = own.admin.create(pod)
    del made["metadata"]["resourceVersion"]  # its status is written meanwhile
    changed = deepcopy(made)
    changed["spec"]["containers"][0]["image"] = ELSEWHERE
    where = f"{core(bare)}/pods/grows?dryRun=All"
    assert "image: " in refusal(lambda: own.admin.raw("PUT", where, body=changed))
    assert refusal(lambda: own.admin.raw("PUT", where, body=made)) == ""


# --- Doors ------------------------------------------------------------------------------------------------------------


def _controller(kind: str, pod: Manifest) -> Manifest:
    labels = {"selector": {"matchLabels": {"app": "mine"}}}
    never = {**pod, "spec": {**pod["spec"], "restartPolicy": "Never"}}
    match kind:
        case "Deployment" | "ReplicaSet" | "DaemonSet":
            return labels | {"template": pod}
        case "StatefulSet":
            return labels | {"template": pod, "serviceName": "x"}
        case "Job":
            return {"template": never, "backoffLimit": 0}
    return {"schedule": "* * * * *", "jobTemplate": {"spec": {"template": never, "backoffLimit": 0}}}


DOORS = dict.fromkeys(("Deployment", "ReplicaSet", "DaemonSet", "StatefulSet"), "apps/v1") | dict.fromkeys(
    ("Job", "CronJob"), "batch/v1"
)
EVIL: Mapping[str, tuple[str, Manifest]] = {
    "other-runtime": ("runtime-class: ", {"runtimeClassName": "kata-qemu"}),
    "the-hosts-network": ('violates PodSecurity "restricted', {"hostNetwork": True}),
    "of-another-scheduler": ("node: ", {"schedulerName": "mine"}),
}


@pytest.fixture(scope="module")
def doors(own: Own, open_namespace: str) -> Own:
    """Of every controller that makes pods, one for a good pod and some for bad ones; the same without walls."""
    for kind, version in DOORS.items():
        plural = f"{kind.lower()}s"
        for name, extra in [("good", {}), *((name, extra) for name, (_, extra) in EVIL.items())]:
            for namespace, who in ((NAMESPACE, own.scenario), (open_namespace, own.admin)):
                pod = template(**({"terminationGracePeriodSeconds": 0} | extra))
                pod["metadata"]["labels"] |= {"door": kind, "kind": name}
                body = make(kind, version, f"{name}-{kind.lower()}", namespace, spec=_controller(kind, pod))
                who.raw("POST", f"/apis/{version}/namespaces/{namespace}/{plural}", body=body)
    return own


@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", DOORS)
def test_a_pod_that_a_controller_makes_is_in_gvisor_and_restricted(doors: Own, kind: str) -> None:
    """Of a manifest that says nothing of either."""
    labels = {"door": kind, "kind": "good"}
    (pod, *_) = eventually(lambda: doors.admin.list("Pod", NAMESPACE, labels=labels), seconds=150)
    spec, container = pod["spec"], pod["spec"]["containers"][0]
    assert spec["runtimeClassName"] == "gvisor"
    assert spec["overhead"], "the runtime class's own admission saw it as well"
    assert spec["securityContext"] == {
        "runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}
    }  # fmt: skip
    assert container["securityContext"] == SECURE
    assert set(container["resources"]["limits"]) == {"cpu", "memory", "ephemeral-storage"}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", EVIL)
@pytest.mark.parametrize("kind", DOORS)
def test_a_pod_that_must_not_be_is_refused_to_the_controller_that_would_make_it(
    doors: Own, kind: str, name: str
) -> None:
    rule, labels = EVIL[name][0], {"door": kind, "kind": name}
    seen: list[str] = []

    def refused() -> bool:
        seen[:] = [
            one["message"] for one in doors.admin.list("Event", NAMESPACE)
            if one["involvedObject"]["name"].startswith(f"{name}-{kind.lower()}")
        ]  # fmt: skip
        return any(rule in one for one in seen)

    eventually(refused, lambda: "\n".join(seen), seconds=150)
    assert not doors.admin.list("Pod", NAMESPACE, labels=labels)
    eventually(lambda: doors.admin.list("Pod", OPEN, labels=labels), seconds=150)


def test_a_claim_that_a_stateful_set_would_make_is_refused_by_the_quota(doors: Own) -> None:
    claim = {"metadata": {"name": "data"}, "spec": {
        "accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Mi"}}}}  # fmt: skip
    spec = _controller("StatefulSet", template()) | {"volumeClaimTemplates": [claim]}
    body = make("StatefulSet", "apps/v1", "with-a-claim", spec=spec)
    doors.scenario.raw("POST", f"/apis/apps/v1/namespaces/{NAMESPACE}/statefulsets", body=body)

    def refused() -> bool:
        events = doors.admin.list("Event", NAMESPACE)
        return any("exceeded quota" in one["message"] and "persistentvolumeclaims" in one["message"] for one in events)

    eventually(refused)
    listed = doors.admin.raw("GET", f"{core()}/persistentvolumeclaims")
    assert listed.body["items"] == []
    quietly(lambda: doors.scenario.raw("DELETE", f"/apis/apps/v1/namespaces/{NAMESPACE}/statefulsets/with-a-claim"))
