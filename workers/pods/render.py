"""PURE: what is asked of the API server. Reviewers read the isolation policy here, in `cluster_templates/`, and in the
golden files of the tests.

Nothing of the run's bundle or steps is in it, and of its tenant only a hash: what is rendered does not depend on who
runs what.
"""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from service.core.boundary import BoundaryKind, BoundaryRef, BoundarySpec, tenant_hash
from service.core.controls import Limits, Network
from service.core.errors import ProvisionFailed
from workers.kube import PREFIX, Manifest, filled, placeholders, templates
from workers.pods.nodes import GROUP_KEY, toleration
from workers.pods.protocol import INIT, READABLE_INIT

VARIANTS = ("runc", "gvisor", "kata-qemu", "kata-fc")
SOFT = "runc"
"""Its runs share their tenant's namespace."""
CONTAINER = "run"
LISTENER_PORT = 4711
MAX_SECONDS = 1200
"""The longest a pod may live; admission says the same."""
_LABEL_VALUE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_RUN_ID = re.compile(r"run_[0-9a-f]{32}")
_LOG_BYTES = 16 * 2**20
"""Local disk of a container: what the kubelet counts there is its log, which has nothing in it."""
_OVERHEAD_CPU_M, _OVERHEAD_BYTES = 500, 256 * 2**20
"""A quota also counts the RuntimeClass's overhead, of which the largest known (kata) is half of this."""
NOBODY = "0" * 40
"""In place of a tenant's hash: of what is no tenant's, and shares a node with any."""
_CPU_SHARED_BY = 4
"""Time, unlike memory, can be promised more than once: a node takes so many times its processors in limits."""
_FIRST_UID, _UIDS = 100_000, 2**31 - 200_000


def hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def as_label(text: str) -> str:
    """As it is where it may stand in a label, else its hash."""
    return text if _LABEL_VALUE.fullmatch(text) else hashed(text)


def namespace_name(ref: BoundaryRef) -> str:
    return f"bd-t-{tenant_hash(ref.installation, ref.tenant)}" if ref.variant == SOFT else ref.name


def labels(ref: BoundaryRef) -> dict[str, str]:
    """All that `destroy` needs, on every object of the run."""
    return {
        PREFIX + "managed": "true",
        PREFIX + "installation": ref.installation,
        PREFIX + "kind": ref.kind.value,
        PREFIX + "variant": ref.variant,
        PREFIX + "site": as_label(ref.site),
        PREFIX + "tenant-hash": tenant_hash(ref.installation, ref.tenant),
        PREFIX + "run": ref.run_id,
        PREFIX + "fence": str(ref.fence),
        PREFIX + "expires-at": str(math.ceil(ref.expires_at.timestamp())),
    }


def read_labels(found: Mapping[str, str], *, site: str) -> BoundaryRef | None:
    """The reference that stands on an object; None when there is none, or it is not one of ours. Its tenant is the
    hash: the name is nowhere in the cluster. `site`: what this site is called, whose label may be a hash."""
    said = {key.removeprefix(PREFIX): value for key, value in found.items() if key.startswith(PREFIX)}
    if not _RUN_ID.fullmatch(said.get("run", "")) or said.get("variant") not in VARIANTS:
        return None
    try:
        return BoundaryRef(
            installation=said["installation"],
            kind=BoundaryKind(said["kind"]),
            variant=said["variant"],
            site=site if said["site"] == as_label(site) else said["site"],
            tenant=said["tenant-hash"],
            run_id=said["run"],
            fence=int(said["fence"]),
            expires_at=datetime.fromtimestamp(int(said["expires-at"]), UTC),
        )
    except (KeyError, ValueError):
        return None


def init_at(variant: str) -> str:
    return READABLE_INIT if variant == "gvisor" else INIT


def render_namespace(ref: BoundaryRef, spec: BoundarySpec) -> Sequence[Manifest]:
    """What has to be there before the pod, in the order to apply: the namespace, and its walls. A tenant's shared one
    does not depend on the run: it has what all of the tenant's may have together."""
    stood = _stood(labels(ref))
    shared = ref.variant == SOFT
    if shared:
        stood |= {"run": "", "fence": "", "expires_at": ""}
    sizes = _sizes(spec.share.limits, spec.share.runs, overhead=False) if shared else _sizes(spec.limits, 1)
    return _filled({"namespace": namespace_name(ref)} | stood | sizes)


def render_pod(ref: BoundaryRef, spec: BoundarySpec, *, image: str, words: Sequence[str], seconds: int) -> Manifest:
    """A bare pod: trying again is ours, under a new fence. `words`: what our first process is told; `seconds`: after so
    long the node ends it, whoever is there to see it. Raises ProvisionFailed for what no pod may be."""
    if ref.variant not in VARIANTS or not 0 < seconds <= MAX_SECONDS:
        raise ProvisionFailed(f"no pod of variant {ref.variant!r} may live for {seconds} s")
    limits = spec.limits
    uid = _FIRST_UID + int(hashed(ref.name), 16) % _UIDS  # RLIMIT_NPROC counts by uid, over all pods of a runc node
    most = {"cpu": _millis(limits.cpu), "memory": str(limits.memory), "ephemeral-storage": str(_LOG_BYTES)}
    least = most | {"cpu": _millis(limits.cpu / _CPU_SHARED_BY)}
    pod: Manifest = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": ref.name, "namespace": namespace_name(ref), "labels": labels(ref)},
        "spec": {
            "restartPolicy": "Never",
            "activeDeadlineSeconds": seconds,
            "terminationGracePeriodSeconds": 1,
            "serviceAccountName": "sandbox",
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "hostNetwork": False,
            "hostPID": False,
            "hostIPC": False,
            "shareProcessNamespace": False,
            "hostname": "sandbox",
            "dnsPolicy": "None",
            "dnsConfig": {"nameservers": ["127.0.0.1"]},
            "priorityClassName": "blastdoor-low",
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": uid,
                "runAsGroup": uid,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": CONTAINER,
                    "image": image,
                    "imagePullPolicy": "IfNotPresent",
                    "command": [init_at(ref.variant), *words],
                    # No service is for the guest; its environment is made anew for each step.
                    "env": [{"name": f"KUBERNETES_SERVICE_{name}", "value": ""} for name in ("HOST", "PORT")],
                    "resources": {"requests": least, "limits": most},
                    "securityContext": {
                        "privileged": False,
                        "allowPrivilegeEscalation": False,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"]},
                    },
                    # One volume for both: the limit of bytes holds for them together.
                    "volumeMounts": [
                        {"name": "scratch", "mountPath": f"/{name}", "subPath": name} for name in ("work", "tmp")
                    ],
                }
            ],
            "volumes": [{"name": "scratch", "emptyDir": {"medium": "Memory", "sizeLimit": str(limits.disk)}}],
        },
    }
    if ref.variant != SOFT:
        pod["spec"]["runtimeClassName"] = ref.variant
    if spec.node_group is not None:
        pod["spec"] |= _on_nodes_of(spec.node_group, tenant=tenant_hash(ref.installation, ref.tenant))
    return pod


def _on_nodes_of(group: str, *, tenant: str) -> dict[str, Any]:
    """And never beside a pod of another tenant, whoever put it there."""
    others = {"key": f"{PREFIX}tenant-hash", "operator": "NotIn", "values": [tenant, NOBODY]}
    there = {"key": f"{PREFIX}tenant-hash", "operator": "Exists"}
    return {
        "nodeSelector": {GROUP_KEY: group},
        "tolerations": [toleration(group)],
        "affinity": {
            "podAntiAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": [
                    {
                        "topologyKey": "kubernetes.io/hostname",
                        "namespaceSelector": {},
                        "labelSelector": {"matchExpressions": [there, others]},
                    }
                ]
            }
        },
    }


# --- the listener that every pod must fail to reach ------------------------------------------------------------------


def listener_labels(installation: str, site: str) -> dict[str, str]:
    """As a run's, and of no run: it is nothing to reap."""
    return {
        PREFIX + "managed": "true",
        PREFIX + "installation": installation,
        PREFIX + "kind": BoundaryKind.NAMESPACE.value,
        PREFIX + "variant": SOFT,
        PREFIX + "site": as_label(site),
        PREFIX + "tenant-hash": NOBODY,
        PREFIX + "run": "",
        PREFIX + "fence": "",
        PREFIX + "expires-at": "",
    }


def listener_namespace(installation: str) -> str:
    return f"bd-listener-{installation}"


def render_listener_namespace(installation: str, site: str) -> Sequence[Manifest]:
    """As any other, and one hole: its pods may be reached at one port, and reach each other there."""
    name = listener_namespace(installation)
    stood = _stood(listener_labels(installation, site))
    port = [{"protocol": "TCP", "port": LISTENER_PORT}]
    hole = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "allow-listen", "namespace": name, "labels": listener_labels(installation, site)},
        "spec": {
            "podSelector": {},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"ports": port}],
            "egress": [{"to": [{"podSelector": {}}], "ports": port}],
        },
    }
    return [*_filled({"namespace": name} | stood | _sizes(_OURS, 8)), hole]


def render_listener_pod(name: str, installation: str, site: str, *, image: str, words: Sequence[str]) -> Manifest:
    """`words`: `listen PORT`, or of the control `reach IP PORT`."""
    ref = BoundaryRef(
        installation=installation, kind=BoundaryKind.NAMESPACE, variant=SOFT, site=site, tenant="", run_id="", fence=0,
        expires_at=datetime.fromtimestamp(0, UTC),
    )  # fmt: skip
    spec = BoundarySpec(limits=_OURS, network=Network())
    pod = render_pod(ref, spec, image=image, words=words, seconds=LISTENER_SECONDS)
    pod["metadata"] = {
        "name": name,
        "namespace": listener_namespace(installation),
        "labels": listener_labels(installation, site),
    }
    return pod


LISTENER_SECONDS = 1100
_OURS = Limits(cpu=0.1, memory=32 * 2**20, disk=2**20)


def _sizes(limits: Limits, pods: int, *, overhead: bool = True) -> dict[str, Any]:
    cpu, memory = math.ceil(limits.cpu * 1000), limits.memory
    if overhead:
        cpu, memory = cpu + _OVERHEAD_CPU_M, memory + _OVERHEAD_BYTES
    return {
        "pods": str(pods),
        "cpu": f"{cpu * pods}m",
        "memory": str(memory * pods),
        "storage": str(_LOG_BYTES * pods),
        "container_cpu": _millis(limits.cpu),
        "container_memory": str(limits.memory),
        "container_storage": str(_LOG_BYTES),
    }


def _millis(cpus: float) -> str:
    return f"{math.ceil(cpus * 1000)}m"


def _stood(said: Mapping[str, str]) -> dict[str, str]:
    """Labels, as the templates call what stands in theirs; that an object is managed is written there."""
    words = {key.removeprefix(PREFIX).replace("-", "_"): value for key, value in said.items()}
    return {name: value for name, value in words.items() if name != "managed"}


def _filled(values: Mapping[str, Any]) -> Sequence[Manifest]:
    """Each template takes what it has a place for; together they must take all, and nothing may be missing."""
    found = templates("namespace")
    if unused := values.keys() - frozenset[str]().union(*map(placeholders, found)):
        raise ValueError(f"cluster_templates/namespace has no place for {', '.join(sorted(unused))}")
    return [filled(one, {key: values[key] for key in placeholders(one) & values.keys()}) for one in found]
