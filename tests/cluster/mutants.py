"""Pods that must be refused, each made from one that is not: ours, one for every way to break a rule, and those of
Kubernetes itself.

`podsecurity_restricted_v1.34.json` holds what the 74 "must fail" pods of the PodSecurity standard (k8s.io/
pod-security-admission v0.36.2, test/testdata/restricted/v1.34/fail, Apache-2.0) change in the pod that passes; here
the same is changed in a pod of ours, which breaks no rule of ours, so that nothing else can be what refuses it.
"""

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

Manifest = dict[str, Any]
Change = Callable[[Manifest, Manifest], object]
"""Changes a pod in place; is given its spec, and the one container."""

FIXTURES: Mapping[str, Manifest] = json.loads(
    Path(__file__).with_name("podsecurity_restricted_v1.34.json").read_text("utf-8")
)


def mutated(pod: Manifest, change: Change) -> Manifest:
    changed = deepcopy(pod)
    change(changed["spec"], changed["spec"]["containers"][0])
    return changed


def _of(key: str, **values: Any) -> Change:
    """Sets fields of one mapping of the container."""
    return lambda _, container: container.setdefault(key, {}).update(values)


def _secure(**values: Any) -> Change:
    return _of("securityContext", **values)


def _pod_secure(**values: Any) -> Change:
    return lambda spec, _: spec["securityContext"].update(values)


def _spec(**values: Any) -> Change:
    return lambda spec, _: spec.update(values)


def _without(key: str) -> Change:
    return lambda spec, _: spec.pop(key)


def _run(**values: Any) -> Change:
    return lambda _, container: container.update(values)


def _second(spec: Manifest, container: Manifest, *, where: str) -> None:
    spec.setdefault(where, []).append(container | {"name": "second"})


def _volume(**source: Any) -> Change:
    return lambda spec, _: spec["volumes"].append({"name": "more", **source})


def _limit(**values: Any) -> Change:
    def change(_: Manifest, container: Manifest) -> None:
        for amounts in container["resources"].values():
            amounts.update(values)

    return change


def _unlimited(resource: str) -> Change:
    def change(_: Manifest, container: Manifest) -> None:
        container["resources"] = {
            kind: {name: amount for name, amount in amounts.items() if name != resource}
            for kind, amounts in container["resources"].items()
        }

    return change


def _environment(**source: Any) -> Change:
    return _run(env=[{"name": "X", "valueFrom": source}])


ELSEWHERE = f"elsewhere.example/run@sha256:{'0' * 64}"
_HTTP = {"httpGet": {"path": "/", "port": 80}}
MUTANTS: Mapping[str, tuple[str, Change]] = {  # what it does -> the rule that it breaks, and no other
    "two containers": ("one-container", lambda spec, container: _second(spec, container, where="containers")),
    "an init container": ("one-container", lambda spec, container: _second(spec, container, where="initContainers")),
    "a container of another name": ("one-container", _run(name="other")),
    "the runtime of another variant": ("runtime-class", _spec(runtimeClassName="kata-qemu")),
    "no runtime class": ("runtime-class", _without("runtimeClassName")),
    "a service account of its own": ("account", _spec(serviceAccountName="default")),
    "its token mounted": ("account", _spec(automountServiceAccountToken=True)),
    "its token mounted, unsaid": ("account", _without("automountServiceAccountToken")),
    "root in the pod": ("user", _pod_secure(runAsUser=0)),
    "root in the container": ("user", _secure(runAsUser=0)),
    "no user by number": ("user", lambda spec, _: spec["securityContext"].pop("runAsUser")),
    "root allowed": ("user", _pod_secure(runAsNonRoot=False)),
    "root allowed in the container": ("user", _secure(runAsNonRoot=False)),
    "root's group": ("user", _pod_secure(runAsGroup=0)),
    "root's group in the container": ("user", _secure(runAsGroup=0)),
    "root's group for volumes": ("user", _pod_secure(fsGroup=0)),
    "a further group": ("user", _pod_secure(supplementalGroups=[10])),
    "root by a user namespace": ("user", _spec(hostUsers=False, securityContext={
        "runAsUser": 0, "runAsNonRoot": False, "runAsGroup": 65532, "seccompProfile": {"type": "RuntimeDefault"}})),
    "privileged": ("privileges", _secure(privileged=True, allowPrivilegeEscalation=None)),
    "privileges to be gained": ("privileges", _secure(allowPrivilegeEscalation=True)),
    "privileges to be gained, unsaid": ("privileges", _secure(allowPrivilegeEscalation=None)),
    "a capability": ("privileges", _secure(capabilities={"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]})),
    "capabilities kept": ("privileges", _secure(capabilities={"drop": ["NET_RAW"]})),
    "no seccomp": ("confinement", _pod_secure(seccompProfile={"type": "Unconfined"})),
    "no seccomp in the container": ("confinement", _secure(seccompProfile={"type": "Unconfined"})),
    "seccomp unsaid": ("confinement", lambda spec, _: spec["securityContext"].pop("seccompProfile")),
    "a seccomp profile of the node's": ("confinement", _secure(
        seccompProfile={"type": "Localhost", "localhostProfile": "x"})),
    "no AppArmor": ("confinement", _pod_secure(appArmorProfile={"type": "Unconfined"})),
    "no AppArmor in the container": ("confinement", _secure(appArmorProfile={"type": "Unconfined"})),
    "an SELinux type": ("confinement", _secure(seLinuxOptions={"type": "container_t"})),
    "an SELinux type in the pod": ("confinement", _pod_secure(seLinuxOptions={"type": "container_t"})),
    "options of Windows": ("confinement", _secure(windowsOptions={"runAsUserName": "x"})),
    "options of Windows in the pod": ("confinement", _pod_secure(windowsOptions={"runAsUserName": "x"})),
    "a sysctl": ("confinement", _pod_secure(sysctls=[{"name": "net.ipv4.ip_unprivileged_port_start", "value": "0"}])),
    "all of /proc": ("confinement", lambda spec, container: (
        spec.update(hostUsers=False), container["securityContext"].update(procMount="Unmasked"))),
    "a root filesystem to write on": ("read-only-root", _secure(readOnlyRootFilesystem=False)),
    "a root filesystem to write on, unsaid": ("read-only-root", _secure(readOnlyRootFilesystem=None)),
    "a node of its choice": ("node", _spec(nodeName="lab")),
    "a scheduler of its choice": ("node", _spec(schedulerName="mine")),
    "every taint tolerated": ("node", _spec(tolerations=[{"operator": "Exists"}])),
    "the control plane's taint tolerated": ("node", _spec(
        tolerations=[{"key": "node-role.kubernetes.io/control-plane", "operator": "Exists"}])),
    "the host's network": ("host", _spec(hostNetwork=True)),
    "the host's processes": ("host", _spec(hostPID=True)),
    "the host's IPC": ("host", _spec(hostIPC=True)),
    "processes shared": ("host", _spec(shareProcessNamespace=True)),
    "no limit on cpu": ("resources", _unlimited("cpu")),
    "no limit on memory": ("resources", _unlimited("memory")),
    "no limit on storage": ("resources", _unlimited("ephemeral-storage")),
    "a device": ("resources", _limit(**{"example.com/gpu": "1"})),
    "a claimed device": ("resources", _spec(resourceClaims=[{"name": "gpu", "resourceClaimName": "gpu"}])),
    "another's image": ("image", _run(image=ELSEWHERE)),
    "the latest image": ("image", _run(image="blastdoor.test/canary:latest")),
    "an image by tag": ("image", _run(image="blastdoor.test/canary:1.0")),
    "a secret to pull with": ("image", _spec(imagePullSecrets=[{"name": "x"}])),
    "a directory of the host": ("volumes", _volume(hostPath={"path": "/tmp"})),
    "a projected token": ("volumes", _volume(projected={"sources": [{"serviceAccountToken": {"path": "token"}}]})),
    "a secret as a volume": ("volumes", _volume(secret={"secretName": "x"})),
    "a ConfigMap as a volume": ("volumes", _volume(configMap={"name": "kube-root-ca.crt"})),
    "its own labels as a volume": ("volumes", _volume(
        downwardAPI={"items": [{"path": "x", "fieldRef": {"fieldPath": "metadata.labels"}}]})),
    "a volume without a size": ("volumes", _volume(emptyDir={"medium": "Memory"})),
    "huge pages": ("volumes", _volume(emptyDir={"medium": "HugePages-2Mi", "sizeLimit": "2Mi"})),
    "no end": ("ends", _without("activeDeadlineSeconds")),
    "a late end": ("ends", _spec(activeDeadlineSeconds=100_000)),
    "a slow end": ("ends", _spec(terminationGracePeriodSeconds=60)),
    "restarts": ("once", _spec(restartPolicy="Always")),
    "restarts, unsaid": ("once", _without("restartPolicy")),
    "another priority": ("once", _without("priorityClassName")),
    "a secret in the environment": ("environment", _environment(secretKeyRef={"name": "x", "key": "y"})),
    "its address in the environment": ("environment", _environment(fieldRef={"fieldPath": "status.hostIP"})),
    "a whole ConfigMap in the environment": ("environment", _run(envFrom=[{"configMapRef": {"name": "x"}}])),
    "services in the environment": ("environment", _spec(enableServiceLinks=True)),
    "services in the environment, unsaid": ("environment", _without("enableServiceLinks")),
    "the cluster's resolver": ("network", _spec(dnsPolicy="ClusterFirst", dnsConfig=None)),
    "names of its own": ("network", _spec(hostAliases=[{"ip": "10.0.0.1", "hostnames": ["x"]}])),
    "a port": ("network", _run(ports=[{"containerPort": 80}])),
    "a port of the host": ("network", _run(ports=[{"containerPort": 80, "hostPort": 80}])),
    "a liveness probe": ("hooks", _run(livenessProbe=_HTTP)),
    "a readiness probe": ("hooks", _run(readinessProbe=_HTTP)),
    "a startup probe": ("hooks", _run(startupProbe=_HTTP)),
    "a hook at its start": ("hooks", _run(lifecycle={"postStart": _HTTP})),
}  # fmt: skip
_RUNTIME_SETTINGS = ("io.katacontainers.config_path", "io.katacontainers.config.hypervisor.virtio_fs_extra_args",
                     "dev.gvisor.flag.network", "cni.projectcalico.org/ipAddrs")  # fmt: skip


def with_metadata(pod: Manifest, **values: Any) -> Manifest:
    changed = deepcopy(pod)
    for key, value in values.items():
        changed["metadata"][key] = {**changed["metadata"].get(key, {}), **value} if isinstance(value, dict) else value
    return changed


def mutants(pod: Manifest) -> dict[str, tuple[str, Manifest]]:
    """-> what is wrong with it: the rule that it breaks, and the pod. `pod` is one of the variant gvisor."""
    made = {name: (rule, mutated(pod, change)) for name, (rule, change) in MUTANTS.items()}
    for key in _RUNTIME_SETTINGS:
        made[f"annotation {key}"] = ("annotations", with_metadata(pod, annotations={key: "x"}))
    for key in ("installation", "tenant-hash", "variant"):
        made[f"another {key}"] = ("labels", with_metadata(pod, labels={f"blastdoor.dev/{key}": "other"}))
    made["a finalizer"] = ("ends", with_metadata(pod, finalizers=["example.com/stay"]))
    return made


def of_the_standard(pod: Manifest, name: str) -> Manifest:
    """A pod of ours with what is wrong in one of Kubernetes' own."""
    change = json.loads(json.dumps(FIXTURES[name]).replace("initcontainer1", "init").replace("/container1", "/run"))
    changed = deepcopy(pod)
    spec = changed["spec"]
    if (inner := change.pop("initContainers", None)) is not None:
        spec["initContainers"] = [merged(deepcopy(spec["containers"][0]) | {"name": "init"}, inner)]
    elif "init" in str(change.get("metadata", "")):
        spec["initContainers"] = [deepcopy(spec["containers"][0]) | {"name": "init"}]
    spec["containers"] = [merged(spec["containers"][0], change.pop("containers", {}))]
    spec["volumes"] += change.pop("volumes", [])
    changed["metadata"] = merged(changed["metadata"], change.pop("metadata", {}))
    changed["spec"] = merged(spec, change)
    return changed


def merged(target: Manifest, patch: Manifest) -> Manifest:
    """RFC 7386: null removes, a mapping is merged, all else replaces."""
    result = dict(target)
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict):
            old = result.get(key)
            result[key] = merged(old if isinstance(old, dict) else {}, value)
        else:
            result[key] = value
    return result
