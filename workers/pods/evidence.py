"""What the wall is, read back from the API server after the pod runs; nothing of it is what we asked for.

    runtime, runtime_class    the RuntimeClass in the pod's spec, and its handler; "node default" without one
    runtime_version           null: the API server does not know which version of the handler's program a node has
    node                      the pod's node: its container engine, which starts that program, kernel, operating system
                              and kubelet, as its kubelet says (Node.status.nodeInfo), and the group that it is kept for
                              (Node's label and taint)
    network                   "none" when the namespace's policy lets nothing pass and it has no other, and our first
                              process in this very pod could not reach the listener that it must not reach
    policy                    that NetworkPolicy's uid, how often the listener was reached before, and for how long
    limits, uid, pod_spec     the pod's spec as it was admitted, amounts as numbers (disk: the volume for the guest's
                              files; ephemeral storage: what else may lie on its node; seconds: of life); the digest is
                              of its JSON with sorted keys
    image                     the digest that the node runs (containerStatuses)
    admission                 our ValidatingAdmissionPolicies that are bound to deny
    namespace                 its name and uid, and the PodSecurity standard that is enforced in it

A probe has shown, at most ten minutes before, that these things do what they say (`probe.py`).
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from fractions import Fraction
from functools import partial

from service.core.boundary import Evidence
from workers.kube import Cluster, ClusterError, Manifest, together
from workers.pods.nodes import kept_for
from workers.pods.pod import Pod

DEFAULT = "default-deny"
"""The policy of every namespace of ours."""
_OURS = "blastdoor-"
_QUANTITY = re.compile(r"(\d+\.?\d*(?:[eE][+-]?\d{1,3})?)(|[num]|[kMGTPE]|[KMGTPE]i)", re.ASCII)
_TIMES = (
    {suffix: Fraction(1, 1000**n) for n, suffix in enumerate(("", "m", "u", "n"))}
    | {suffix: Fraction(1000**n) for n, suffix in enumerate("kMGTPE", 1)}
    | {f"{suffix}i": Fraction(1024**n) for n, suffix in enumerate("KMGTPE", 1)}
)
_PSA = "pod-security.kubernetes.io/enforce"


@dataclass(frozen=True)
class Shut:
    """What our first process found: the listener was reached `times`, and after `seconds` it could not be any more."""

    listener: str
    times: int
    seconds: float


def network(policies: Sequence[Manifest]) -> str:
    """What all policies of a namespace let pass together: "none" or "open"."""
    (only,) = policies if len(policies) == 1 else (None,)
    return "none" if lets_nothing_pass(only) else "open"


def observe(pod: Pod, shut: Shut, *, at: datetime, told: Callable[[Sequence[Manifest]], str] = network) -> Evidence:
    """`told`: a word for what the policies of the pod's namespace let pass. Raises ClusterError, also when the pod is
    gone."""
    cluster = pod.cluster
    found = _there(pod.read(), f"pod {pod.name}")
    spec = found["spec"]
    runtime_class = spec.get("runtimeClassName")
    read = partial(partial, cluster.get)
    host_, namespace_, class_ = together(
        [
            read("Node", spec["nodeName"]),
            read("Namespace", pod.namespace),
            read("RuntimeClass", runtime_class) if runtime_class is not None else lambda: None,
        ]
    )
    host = _there(host_, f"node {spec['nodeName']}")
    node = host["status"]["nodeInfo"]
    namespace = _there(namespace_, f"namespace {pod.namespace}")["metadata"]
    handler = None
    if runtime_class is not None:
        handler = _there(class_, f"RuntimeClass {runtime_class}")["handler"]
    policies = cluster.list("NetworkPolicy", pod.namespace)
    policy = next((one for one in policies if one["metadata"]["name"] == DEFAULT), None)
    most = spec["containers"][0]["resources"]["limits"]
    return Evidence(
        runtime=handler or "node default",
        runtime_version=None,
        runtime_sha256=None,
        platform=None,
        network=told(policies),
        limits={
            "memory_bytes": math.ceil(amount(most["memory"])),
            "cpu": amount(most["cpu"]),
            "disk_bytes": math.ceil(amount(spec["volumes"][0]["emptyDir"]["sizeLimit"])),
            "ephemeral_storage_bytes": math.ceil(amount(most["ephemeral-storage"])),
            "seconds": spec["activeDeadlineSeconds"],
        },
        uid=spec["securityContext"]["runAsUser"],
        observed_at=at,
        runtime_class=runtime_class,
        node={
            "name": spec["nodeName"], "engine": node["containerRuntimeVersion"], "kernel": node["kernelVersion"],
            "os": node["osImage"], "kubelet": node["kubeletVersion"], "group": kept_for(host),
        },
        policy={
            "uid": policy["metadata"]["uid"] if policy else None, "listener": shut.listener,
            "reached_before": shut.times, "shut_after_s": shut.seconds,
        },
        pod_spec={"uid": pod.uid, "sha256": digest(spec)},
        image=found["status"]["containerStatuses"][0]["imageID"],
        admission=admission_in_force(cluster),
        namespace={
            "name": pod.namespace, "uid": namespace["uid"],
            "pod_security": f"{namespace['labels'].get(_PSA)} {namespace['labels'].get(_PSA + '-version')}",
        },
    )  # fmt: skip


def lets_nothing_pass(policy: Manifest | None) -> bool:
    """A policy for all pods of its namespace, in both directions, with no rule that allows anything."""
    if policy is None:
        return False
    spec = policy["spec"]
    both = set(spec.get("policyTypes") or ()) == {"Ingress", "Egress"}
    return both and not any(spec.get(key) for key in ("podSelector", "ingress", "egress"))


def admission_in_force(cluster: Cluster) -> Sequence[str]:
    """Names of our policies that a binding has deny. Raises ClusterError."""
    policies, bindings = together(
        [partial(cluster.list, f"ValidatingAdmissionPolicy{what}") for what in ("", "Binding")]
    )
    there = {one["metadata"]["name"] for one in policies}
    bound = {one["spec"]["policyName"] for one in bindings if "Deny" in one["spec"]["validationActions"]}
    return sorted(name for name in there & bound if name.startswith(_OURS))


def amount(quantity: str) -> float:
    """Of bytes or CPUs, as Kubernetes writes them: "64Mi", "100m", "1e3" (apimachinery, resource.Quantity). An amount
    below 2**53 is exact. Raises ClusterError."""
    match = _QUANTITY.fullmatch(quantity)
    if not match:
        raise ClusterError(f"{quantity!r} is no quantity")
    return float(Fraction(match[1]) * _TIMES[match[2]])


def digest(spec: Manifest) -> str:
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()


def _there(found: Manifest | None, what: str) -> Manifest:
    if found is None:
        raise ClusterError(f"{what} is not there any more")
    return found
