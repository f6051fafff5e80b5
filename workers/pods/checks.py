"""What a cluster is asked, and what is looked at in a pod of ours, before anybody relies on the walls around it.

Our own program answers and no guest, so what it says of its kernel is ours to believe.
"""

import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

from service.core.boundary import BoundaryRef, BoundarySpec
from workers.kube import Cluster, ClusterError, Denied, Manifest
from workers.pods.render import SOFT, render_pod
from workers.pods.sandbox import PodSandbox

_GVISOR = re.compile(rb"gvisor", re.IGNORECASE)
_SHARES_KERNEL = frozenset({"", "runc", "crun", "youki"})
"""What handlers of the runtimes are called that start processes of the node."""


def handler_faults(runtime_class: Manifest, nodes: Sequence[Manifest]) -> list[str]:
    """What the nodes say of the handler that a class names; `nodes`: those that its pods may be put on. Pure. A node
    older than Kubernetes 1.30 says nothing of its handlers: then it is the canary that finds out."""
    name, handler = runtime_class["metadata"]["name"], str(runtime_class["handler"])
    if handler in _SHARES_KERNEL:
        return [f"RuntimeClass {name} that isolates: its handler {handler!r} shares the node's kernel"]
    if not nodes:
        wanted = (runtime_class.get("scheduling") or {}).get("nodeSelector") or {}
        shown = ", ".join(f"{key}={value}" for key, value in wanted.items())
        return [f"a node for RuntimeClass {name}: no one that is ready has {shown or 'what it asks for'}"]
    faults = []
    for node in nodes:
        had = {str(one.get("name") or "") for one in node["status"].get("runtimeHandlers") or ()}
        if had and handler not in had:
            said = f"{node['metadata']['name']} has {', '.join(sorted(had - {''})) or 'only its default'}"
            faults.append(f"handler {handler}, which RuntimeClass {name} names, on every node for it: {said}")
    return faults


def refusals(cluster: Cluster, ref: BoundaryRef, spec: BoundarySpec, *, image: str) -> str | None:
    """What must be refused beside this pod, asked for in dry run: nothing is made if it is not. -> what was taken."""
    good = render_pod(ref, spec, image=image, words=["kill"], seconds=60)
    good["metadata"]["name"] += "-canary"

    def privileged(pod: Manifest) -> None:
        pod["spec"]["containers"][0]["securityContext"] |= {"privileged": True, "allowPrivilegeEscalation": True}

    def greedy(pod: Manifest) -> None:
        if ref.variant == SOFT:  # its quota is for many pods
            for kind in ("requests", "limits"):
                pod["spec"]["containers"][0]["resources"][kind]["memory"] = str(2**50)

    def annotated(pod: Manifest) -> None:
        pod["metadata"]["annotations"] = {"dev.gvisor.spec.mount": "none"}

    for what, change, words in (
        ("PodSecurity restricted", privileged, ("PodSecurity",)),
        ("admission of pods", annotated, ("annotations:",)),
        ("ResourceQuota and LimitRange", greedy, ("quota", "maximum memory")),
    ):
        why = _refused(cluster, good, change, words)
        if why is not None:
            return f"{what}: {why}"
    return None


def _refused(cluster: Cluster, good: Manifest, change: Callable[[Manifest], Any], words: Sequence[str]) -> str | None:
    pod = deepcopy(good)
    change(pod)
    try:
        cluster.create(pod, dry_run=True)
    except Denied as error:
        return None if any(word in error.detail for word in words) else f"it was another that refused: {error}"
    except ClusterError as error:
        return f"it did not answer: {error}"
    return "a pod that must be refused was taken"


def kernel(sandbox: PodSandbox, variant: str, nodes: Sequence[Manifest]) -> str | None:
    """Whose kernel a pod of the variant has, as our own program in it sees it -> what is wrong. Raises BoundaryLost."""
    said = sandbox.about()
    kernels = {str(node["status"]["nodeInfo"]["kernelVersion"]).encode() for node in nodes}
    seen = any(kernel in said for kernel in kernels)
    if variant == SOFT:
        return None if seen else "pods on the nodes' own kernel: without a RuntimeClass they see another one"
    if seen:
        return f"RuntimeClass {variant} that isolates: its pods see the node's own kernel"
    if variant == "gvisor" and not _GVISOR.search(said):
        return "RuntimeClass gvisor that is gVisor: its kernel does not say so"
    return None
