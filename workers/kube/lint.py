"""The rules that a pod of ours keeps, judged here before anything is sent. Pure.

`cluster_templates/admission/pods.yaml` has the same rules, by the same names, for the API server to judge by, so that
a mistake of ours and a lie of somebody else are both refused. The two are written apart from each other, in two
languages, and a test breaks each rule in front of both.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workers.kube.manifests import PREFIX

VARIANTS = ("runc", "gvisor", "kata-qemu", "kata-fc")
CONTAINER, ACCOUNT, PRIORITY = "run", "sandbox", "blastdoor-low"
OWN_API_VOLUME, AUTHORITY = "kubernetes-api", "kube-root-ca.crt"
BOUNDED = ("cpu", "memory", "ephemeral-storage")
TIED = ("installation", "tenant-hash", "variant")
"""Labels that a pod has from its namespace."""
TOLERATED = ("node.kubernetes.io/memory-pressure", "node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
"""What Kubernetes itself makes every pod tolerate."""
LONGEST_GRACE_S = 5
_DIGEST = re.compile(r"@sha256:[a-f0-9]{64}$")
_HOOKS = ("lifecycle", "livenessProbe", "readinessProbe", "startupProbe")


@dataclass(frozen=True)
class Admission:
    """What the rules are told of this cluster. `image_prefix` ends in `/` or `@`; `max_s`: the longest that any pod
    lives, in seconds; `own_api`: the cluster belongs to one run, whose pod may have the way to its API."""

    image_prefix: str
    max_s: int
    own_api: bool = False


@dataclass(frozen=True)
class _Pod:
    """A pod, the labels of its namespace, and what the rules are told."""

    metadata: Mapping[str, Any]
    spec: Mapping[str, Any]
    namespace: Mapping[str, str]
    admission: Admission

    @property
    def container(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = (self.spec.get("containers") or [{}])[0]
        return found

    @property
    def securities(self) -> Sequence[Mapping[str, Any]]:
        """Of the pod, then of the container."""
        return [self.spec.get("securityContext") or {}, self.container.get("securityContext") or {}]

    @property
    def variant(self) -> str:
        return self.namespace.get(f"{PREFIX}variant", "")


def pod_faults(pod: Mapping[str, Any], namespace: Mapping[str, str], admission: Admission) -> list[str]:
    """-> the names of the rules that a pod breaks, none when it may be made. `namespace`: its namespace's labels."""
    judged = _Pod(pod["metadata"], pod["spec"], namespace, admission)
    return [name for name, holds in RULES.items() if not holds(judged)]


def _one_container(pod: _Pod) -> bool:
    lists = [len(pod.spec.get(key) or ()) for key in ("containers", "initContainers", "ephemeralContainers")]
    return lists == [1, 0, 0] and pod.container.get("name") == CONTAINER


def _runtime(pod: _Pod) -> bool:
    return pod.variant in VARIANTS and pod.spec.get("runtimeClassName", "runc") == pod.variant


def _labels(pod: _Pod) -> bool:
    own = pod.metadata.get("labels") or {}
    return all(own.get(PREFIX + key) and own[PREFIX + key] == pod.namespace.get(PREFIX + key) for key in TIED)


def _annotations(pod: _Pod) -> bool:
    return all(key.startswith(PREFIX) for key in pod.metadata.get("annotations") or {})


def _account(pod: _Pod) -> bool:
    return pod.spec.get("serviceAccountName") == ACCOUNT and pod.spec.get("automountServiceAccountToken") is False


def _user(pod: _Pod) -> bool:
    outer, inner = pod.securities
    ids = [outer.get("runAsUser", 0), outer.get("runAsGroup", 0), outer.get("fsGroup", 1)]
    ids += [inner.get("runAsUser", 1), inner.get("runAsGroup", 1)]
    nobody = outer.get("runAsNonRoot") is True and inner.get("runAsNonRoot", True) is True
    return nobody and min(ids) > 0 and not outer.get("supplementalGroups")


def _privileges(pod: _Pod) -> bool:
    inner = pod.securities[1]
    capabilities = inner.get("capabilities") or {}
    plain = not inner.get("privileged") and inner.get("allowPrivilegeEscalation") is False
    return plain and capabilities.get("drop") == ["ALL"] and not capabilities.get("add")


def _confinement(pod: _Pod) -> bool:
    outer, inner = pod.securities
    seccomp = [(one.get("seccompProfile") or {}).get("type") for one in (outer, inner)]
    apparmor = [(one.get("appArmorProfile") or {}).get("type", "RuntimeDefault") for one in (outer, inner)]
    if seccomp[0] != "RuntimeDefault" or seccomp[1] not in {None, "RuntimeDefault"}:
        return False
    masked = inner.get("procMount", "Default") == "Default"
    unset = not any(one.get(key) for one in (outer, inner) for key in ("seLinuxOptions", "windowsOptions"))
    return set(apparmor) == {"RuntimeDefault"} and masked and unset and not outer.get("sysctls")


def _node(pod: _Pod) -> bool:
    keys = [one.get("key", "") for one in pod.spec.get("tolerations") or ()]
    known = all(key.startswith(PREFIX) or key in TOLERATED for key in keys)
    by_rule = not pod.spec.get("nodeName") and pod.spec.get("schedulerName", "default-scheduler") == "default-scheduler"
    return known and by_rule and (pod.spec.get("os") or {}).get("name", "linux") == "linux"


def _host(pod: _Pod) -> bool:
    return not any(pod.spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"))


def _resources(pod: _Pod) -> bool:
    resources = pod.container.get("resources") or {}
    exactly = set(resources.get("limits") or {}) == set(BOUNDED) and set(resources.get("requests") or {}) <= set(
        BOUNDED
    )
    return exactly and not pod.spec.get("resourceClaims") and not resources.get("claims")


def _image(pod: _Pod) -> bool:
    name, prefix = pod.container.get("image", ""), pod.admission.image_prefix
    return bool(prefix and name.startswith(prefix) and _DIGEST.search(name)) and not pod.spec.get("imagePullSecrets")


def _volumes(pod: _Pod) -> bool:
    volumes = [one for one in pod.spec.get("volumes") or () if not (pod.admission.own_api and _is_way_to_api(one))]
    sizes = [(one.get("emptyDir") or {}).get("sizeLimit") for one in volumes]
    media = [(one.get("emptyDir") or {}).get("medium", "") for one in volumes]
    return all(sizes) and set(media) <= {"", "Memory"} and not pod.container.get("volumeDevices")


def _is_way_to_api(volume: Mapping[str, Any]) -> bool:
    """A token of the pod's own account, the cluster's authority, and what the pod's own annotations say."""
    sources = (volume.get("projected") or {}).get("sources") or ()
    known = [
        "serviceAccountToken" in one or (one.get("configMap") or {}).get("name") == AUTHORITY or "downwardAPI" in one
        for one in sources
    ]
    return volume.get("name") == OWN_API_VOLUME and bool(known) and all(known)


def _ends(pod: _Pod) -> bool:
    lives, grace = pod.spec.get("activeDeadlineSeconds", 0), pod.spec.get("terminationGracePeriodSeconds", 30)
    return 0 < lives <= pod.admission.max_s and grace <= LONGEST_GRACE_S and not pod.metadata.get("finalizers")


def _once(pod: _Pod) -> bool:
    return pod.spec.get("restartPolicy") == "Never" and pod.spec.get("priorityClassName") == PRIORITY


def _environment(pod: _Pod) -> bool:
    sources = [one for one in pod.container.get("env") or () if one.get("valueFrom")]
    return not sources and not pod.container.get("envFrom") and pod.spec.get("enableServiceLinks") is False


def _network(pod: _Pod) -> bool:
    return pod.spec.get("dnsPolicy") == "None" and not pod.spec.get("hostAliases") and not pod.container.get("ports")


RULES: Mapping[str, Callable[[_Pod], bool]] = {
    "one-container": _one_container,
    "runtime-class": _runtime,
    "labels": _labels,
    "annotations": _annotations,
    "account": _account,
    "user": _user,
    "privileges": _privileges,
    "confinement": _confinement,
    "read-only-root": lambda pod: pod.securities[1].get("readOnlyRootFilesystem") is True,
    "node": _node,
    "host": _host,
    "resources": _resources,
    "image": _image,
    "volumes": _volumes,
    "ends": _ends,
    "once": _once,
    "environment": _environment,
    "network": _network,
    "hooks": lambda pod: not any(pod.container.get(key) for key in _HOOKS),
}
