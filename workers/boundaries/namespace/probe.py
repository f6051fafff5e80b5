"""What this cluster can enforce, measured now: by looking, by asking for what must be refused, and by real pods.

What has to be shown for a variant, and is missing if it is not:

    nodes         one that is ready, and a RuntimeClass of the variant's name (none for runc), whose handler every node
                  that it may choose has, as the node itself says, and which is none that shares the node's kernel
    runtime       in a pod of the class no kernel is seen but gVisor's, or a machine's own: not the node's
    PodSecurity   a pod that must fail is refused by it
    policy        our first process in a canary pod cannot reach the listener, and a pod that policy lets through can
    quota         a second pod is refused by it
    admission     our policies are bound

The canaries run our own program and no guest, so what they say of their kernel is ours to believe.
"""

import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from service.core.boundary import (
    BoundaryKind,
    BoundaryRef,
    BoundarySpec,
    Capabilities,
    Ended,
    Execution,
    Share,
    StepSpec,
)
from service.core.controls import Limits, Network
from service.core.errors import BlastdoorError
from service.core.ids import new_run_id
from workers.kube import Manifest
from workers.pods.checks import handler_faults, kernel, refusals
from workers.pods.evidence import admission_in_force
from workers.pods.nodes import groups, has_labels, is_ready
from workers.pods.render import SOFT

if TYPE_CHECKING:
    from workers.boundaries.namespace.driver import NamespaceBoundary

_CANARY_VALID_S = 600.0
_CANARIES = 64
"""Of one cluster at once: each worker has its own, and the soft ones share a namespace."""
_ADMISSION = frozenset({"blastdoor-pods", "blastdoor-namespaces", "blastdoor-interactive"})
_INSTALL = "run `blastdoor cluster install`"
_NO_CLUSTER = "a cluster: BLASTDOOR_KUBECONFIG and BLASTDOOR_KUBE_IMAGE name one"
_VERSIONS = {"kubelet": "kubeletVersion", "engine": "containerRuntimeVersion", "kernel": "kernelVersion"}
_passed: dict[tuple[str, str, str, str], float] = {}


class _Never:
    def is_set(self) -> bool:
        return False


def probe(boundary: "NamespaceBoundary") -> Sequence[Capabilities]:
    """A row for each variant that is asked for. Never raises for what a cluster lacks: it says so in `missing`."""
    if boundary.host.kubeconfig is None or not boundary.host.image:
        return tuple(_without(variant, _NO_CLUSTER) for variant in boundary.host.variants)
    try:
        nodes = boundary.brief.list("Node")  # once: rows that differ in nothing else speak of the same moment
    except BlastdoorError as error:
        return tuple(_without(variant, f"a cluster that answers: {error}") for variant in boundary.host.variants)
    return tuple(_row(boundary, variant, nodes) for variant in boundary.host.variants)


def _without(variant: str, missing: str) -> Capabilities:
    return Capabilities(boundary=f"{BoundaryKind.NAMESPACE}/{variant}", available=False, missing=(missing,))


def _row(boundary: "NamespaceBoundary", variant: str, every: Sequence[Manifest]) -> Capabilities:
    missing: list[str] = []
    versions: dict[str, str] = {}
    node_groups: frozenset[str] = frozenset()
    try:
        nodes = [node for node in every if is_ready(node)]
        versions = _versions(nodes)
        runtime_class = None if variant == SOFT else boundary.cluster.get("RuntimeClass", variant)
        selector = ((runtime_class or {}).get("scheduling") or {}).get("nodeSelector") or {}
        missing += _lacks(boundary, variant, nodes)
        if runtime_class is not None:
            missing += handler_faults(runtime_class, [node for node in nodes if has_labels(node, selector)])
        if not missing and (why := _canary(boundary, variant, nodes)) is not None:
            missing.append(why)
        node_groups = groups(every, selector=selector)
    except BlastdoorError as error:
        missing.append(f"a cluster that answers: {error}")
    digest = boundary.host.image.rpartition("@")[2]
    return Capabilities(
        boundary=f"{BoundaryKind.NAMESPACE}/{variant}",
        available=not missing,
        missing=tuple(missing),
        node_groups=node_groups,
        runtimes={"default": digest},
        versions=versions,
    )


def _versions(nodes: Sequence[Manifest]) -> dict[str, str]:
    """The oldest of each on any node: a run may land there."""
    found: dict[str, str] = {}
    for name, key in _VERSIONS.items():
        said = [str(node["status"]["nodeInfo"][key]) for node in nodes]
        if said:
            found[name] = min(said, key=_numbers)
    return found


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version, re.ASCII)]


def _lacks(boundary: "NamespaceBoundary", variant: str, nodes: Sequence[Manifest]) -> list[str]:
    """By looking alone."""
    missing = []
    if not nodes:
        missing.append("a node that is ready")
    if variant != SOFT and boundary.cluster.get("RuntimeClass", variant) is None:
        missing.append(f"RuntimeClass {variant} ({_INSTALL}, and its runtime on the nodes)")
    if boundary.cluster.get("PriorityClass", "blastdoor-low") is None:
        missing.append(f"PriorityClass blastdoor-low ({_INSTALL})")
    if absent := _ADMISSION - set(admission_in_force(boundary.cluster)):
        missing.append(f"admission policies {', '.join(sorted(absent))} ({_INSTALL})")
    return missing


def _canary(boundary: "NamespaceBoundary", variant: str, nodes: Sequence[Manifest]) -> str | None:
    """Real pods, at most every ten minutes for each variant and image. -> what is wrong."""
    boundary.listener.address()  # and so it is there before a run asks for it
    key = (boundary.host.installation, str(boundary.host.kubeconfig), boundary.host.image, variant)
    if time.monotonic() - _passed.get(key, -_CANARY_VALID_S) < _CANARY_VALID_S:
        return None
    try:
        why = boundary.listener.control()
        if why is not None:
            return f"a pod network: {why}"
        why = _play_canary(boundary, variant, nodes)
    except BlastdoorError as error:
        return f"a pod that works: the canary failed ({error})"
    if why is None:
        _passed[key] = time.monotonic()
    return why


def _play_canary(boundary: "NamespaceBoundary", variant: str, nodes: Sequence[Manifest]) -> str | None:
    ref = BoundaryRef(
        installation=boundary.host.installation,
        kind=BoundaryKind.NAMESPACE,
        variant=variant,
        site=boundary.host.site,
        tenant="_canary",
        run_id=new_run_id(),
        fence=0,
        expires_at=datetime.now(UTC) + timedelta(seconds=120),
    )
    spec = BoundarySpec(limits=Limits(), network=Network(), share=Share(runs=_CANARIES))
    try:
        with boundary.open(spec, ref, cancelled=_Never()) as sandbox:
            why = refusals(boundary.cluster, ref, spec, image=boundary.host.image) or kernel(sandbox, variant, nodes)  # type: ignore[arg-type]
            if why is None:
                exited = sandbox.execute(_shell(1, "exit 139"))
                signalled = sandbox.execute(_shell(2, "kill -SEGV $$"))
                absent = sandbox.execute(_step(3, ("/nonexistent",)))
                if not _speaks(exited, signalled, absent):
                    why = "an engine whose exec we know: the canary's results were wrong"
                elif sandbox.evidence().network != "none":
                    why = "network policy: a rule lets something pass"
    finally:
        boundary.destroy(ref)
    return why


def _speaks(exited: Execution, signalled: Execution, absent: Execution) -> bool:
    def is_(execution: Execution, ended: Ended, *, exit_code: int | None = None, signal: int | None = None) -> bool:
        return (execution.ended, execution.exit_code, execution.signal) == (ended, exit_code, signal)

    return (
        is_(exited, Ended.EXITED, exit_code=139)
        and is_(signalled, Ended.EXITED, signal=11)
        and is_(absent, Ended.NOT_STARTED)
    )


def _shell(n: int, command: str) -> StepSpec:
    return _step(n, ("/bin/sh", "-c", command))


def _step(n: int, argv: tuple[str, ...]) -> StepSpec:
    return StepSpec(n=n, argv=argv, env={"PATH": "/usr/bin:/bin"}, timeout_s=20)
