"""Inside a cluster of one run: what is installed, what is shown before anybody relies on it, and the run's pod.

Shown in each cluster, before the first step:

    node          it is ready, and says that it has the handler which RuntimeClass gvisor names
    runtime       our own program in the run's pod sees gVisor's kernel and not the node's
    PodSecurity, quota, admission    a pod that must fail is refused by each
    policy        our first process cannot reach the listener, and a pod that policy lets through can
    strangers     the token that every cluster by kind is made with is nobody's
    own API       where the scenario has it: what only one of its policies refuses is refused to its account, by each
"""

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from service.core.boundary import (
    ArtifactLimits,
    Artifacts,
    ArtifactSink,
    BoundaryKind,
    BoundaryRef,
    BoundarySpec,
    Bundle,
    Cancellation,
    Evidence,
    Execution,
    StepSpec,
)
from service.core.boundary import Listener as StepListener
from service.core.controls import Need
from service.core.errors import BoundaryLost, ProvisionFailed
from workers.boundaries.cluster.provisioners import Tell
from workers.boundaries.cluster.stranger import KNOWN_TOKEN, answer
from workers.kube import Cluster, Manifest, together
from workers.kube.install import ENGINE, Choices, wanted
from workers.pods.checks import handler_faults, kernel, refusals
from workers.pods.listener import Listener
from workers.pods.nodes import is_ready
from workers.pods.opening import Additions, Opening
from workers.pods.own_api import (
    Endpoint,
    network_with_own_api,
    own_api_cluster,
    own_api_environment,
    render_own_api,
    render_way_to_api,
    with_own_api,
)
from workers.pods.own_api_checks import own_api_fault
from workers.pods.render import namespace_name
from workers.pods.sandbox import PodSandbox

RUNTIME_CLASS = "gvisor"
"""Of every pod, and the variant of the run's. What the nodes are is the provisioner's business."""
_NODE_S = 240.0
_SETTLE_S = 60.0
_LOOK_S = 0.2
LONGEST_S = 2 * _NODE_S + 2 * _SETTLE_S + 300.0
"""What is waited for in here at most, one after the other: nodes and policies, each twice; the listener, the pod, that
it cannot reach the listener and a pod that can."""
_ANSWER_S = 10.0
_REGISTERED = (
    "/apis/apiregistration.k8s.io/v1/apiservices",
    "/apis/apiextensions.k8s.io/v1/customresourcedefinitions",
)
"""What says of a group of the API that there is one, before it is served."""


def common_prefix(images: Iterable[str]) -> str:
    """What all these names begin with, up to `/` or `@`: the admission policies take no other image. Raises
    ValueError."""
    names = list(images)
    if wrong := [name for name in names if "@sha256:" not in name]:
        raise ValueError(f"{wrong[0]!r} is no image by digest (NAME@sha256:...)")
    beginnings = [names[0][: end.end()] for end in re.finditer("[/@]", names[0])]
    shared = [one for one in beginnings if all(name.startswith(one) for name in names)]
    if not shared:
        raise ValueError(f"{', '.join(names)} do not begin alike, up to a /")
    return shared[-1]


def get_ready(kubeconfig: Path, images: Mapping[str, str], *, cancelled: Cancellation) -> "Inside":
    """Everything that can be done before a run is known. Raises ProvisionFailed, ClusterError."""
    inside = Inside.of_ready(kubeconfig, images)
    try:
        inside.install(cancelled)
    except BaseException:
        inside.close()
        raise
    return inside


@dataclass(frozen=True, kw_only=True)
class Inside:
    """A cluster as its administrator has it, and as the engine: that is who makes pods of ours, here as elsewhere, and
    whom the admission policies know. `images`: that its pods may have."""

    kubeconfig: Path
    admin: Cluster
    engine: Cluster
    images: Sequence[str]

    @classmethod
    def of_ready(cls, kubeconfig: Path, images: Mapping[str, str]) -> "Inside":
        """One in which `install` has been done. Raises ClusterError."""
        return cls(
            kubeconfig=kubeconfig, admin=Cluster.from_kubeconfig(kubeconfig), images=sorted(set(images.values())),
            engine=Cluster.from_kubeconfig(kubeconfig, acting_as=ENGINE),
        )  # fmt: skip

    def close(self) -> None:
        self.engine.close()
        self.admin.close()

    def install(self, cancelled: Cancellation) -> None:
        """Raises ProvisionFailed, ClusterError."""
        for manifest in wanted(Choices(image_prefix=common_prefix(self.images), pool={}, own_api=True)):
            self.admin.apply(manifest)
        self._await_node(cancelled)
        self._apply_own_api(self._groups())

    def open(
        self, spec: BoundarySpec, ref: BoundaryRef, *, image: str, cancelled: Cancellation, tell: Tell
    ) -> "ClusterSandbox":
        """Raises ProvisionFailed, BoundaryLost, ClusterError; what was made until then goes with the cluster."""
        mine = ref.model_copy(update={"kind": BoundaryKind.NAMESPACE, "variant": RUNTIME_CLASS})
        nodes = self._await_node(cancelled)
        listener = Listener(self.engine, installation=ref.installation, site=ref.site, image=image)
        additions, endpoints = Additions(), self.api_endpoints()
        own_api = Need.KUBERNETES_API in spec.needs
        groups: Sequence[str] = ()
        if own_api:
            groups = self._groups()
            self._apply_own_api(groups)
            for manifest in render_own_api(mine, spec, api_endpoints=endpoints):
                self.admin.apply(manifest)
            additions = Additions(
                walls=render_way_to_api(mine, api_endpoints=endpoints),
                pod=lambda pod: with_own_api(pod, api_endpoints=endpoints),
                told=lambda policies: network_with_own_api(policies, mine, api_endpoints=self.api_endpoints()),
            )
        tell("making the pod")
        pod = Opening(cluster=self.engine, listener=listener).make(
            spec, mine, image=image, cancelled=cancelled, additions=additions
        )
        tell("checking its walls")
        self._insist(pod, mine, spec, image, nodes, listener, cancelled)
        environment: Mapping[str, str] = {}
        if own_api:
            self._insist_on_own_api(mine, image, groups, cancelled)
            made = self.engine.get("Pod", mine.name, namespace_name(mine))
            if made is None:
                raise BoundaryLost("the pod is not there any more")
            environment = own_api_environment(made, api_endpoints=endpoints)
        return ClusterSandbox(pod, ref=ref, environment=environment)

    def api_endpoints(self) -> Sequence[Endpoint]:
        """As the cluster says itself. Raises ClusterError."""
        found = self.admin.raw("GET", "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices/kubernetes").body
        ports = [int(port["port"]) for port in found.get("ports") or () if port.get("port")]
        addresses = [address for one in found.get("endpoints") or () for address in one["addresses"]]
        return [(address, port) for address in addresses for port in ports]

    def _groups(self) -> Sequence[str]:
        """Of this cluster's API, also those whose server is away or is still getting ready; what makes a cluster may
        add some after its first answer. Raises ClusterError."""
        served = [one["name"] for one in self.admin.raw("GET", "/apis").body["groups"]]
        registered = [
            str(one["spec"].get("group") or "")
            for where in _REGISTERED
            for one in self.admin.raw("GET", where).body["items"]
        ]
        return sorted({*served, *registered} - {""})

    def _apply_own_api(self, groups: Sequence[str]) -> None:
        """Raises ClusterError."""
        for manifest in own_api_cluster(
            groups, images=self.images, runtime_class=RUNTIME_CLASS, api_endpoints=self.api_endpoints()
        ):
            self.admin.apply(manifest)

    def _await_node(self, cancelled: Cancellation) -> Sequence[Manifest]:
        """-> the nodes, one of them ready and each with the runtime. Raises ProvisionFailed, ClusterError."""
        deadline = time.monotonic() + _NODE_S
        while True:
            nodes = [node for node in self.admin.list("Node") if is_ready(node)]
            class_ = self.admin.get("RuntimeClass", RUNTIME_CLASS)
            if nodes and class_ is not None and not (faults := handler_faults(class_, nodes)):
                return nodes
            if cancelled.is_set():
                raise ProvisionFailed("cancelled while the cluster's nodes got ready")
            if time.monotonic() > deadline:
                why = "; ".join(faults) if nodes and class_ is not None else "no node is ready"
                raise ProvisionFailed(f"the cluster was not ready within {_NODE_S:g} s: {why}")
            time.sleep(_LOOK_S)

    def _insist(
        self, pod: PodSandbox, mine: BoundaryRef, spec: BoundarySpec, image: str, nodes: Sequence[Manifest],
        listener: Listener, cancelled: Cancellation,
    ) -> None:  # fmt: skip
        """Raises ProvisionFailed, BoundaryLost, ClusterError."""
        _, why_control = together(
            [
                lambda: self._until_refused(lambda: refusals(self.engine, mine, spec, image=image), cancelled),
                listener.control,
            ]
        )
        why = why_control or kernel(pod, RUNTIME_CLASS, nodes) or self._known_token()
        if why is not None:
            raise ProvisionFailed(f"the cluster does not keep what it must: {why}")

    def _known_token(self) -> str | None:
        """None when its bearer is nobody, or what it is told."""
        status = answer(self.kubeconfig, "/api", token=KNOWN_TOKEN, within_s=_ANSWER_S)
        return None if status == 401 else f"the bearer of a token that everybody knows is answered with {status}"

    def _insist_on_own_api(self, mine: BoundaryRef, image: str, groups: Sequence[str], cancelled: Cancellation) -> None:
        """Raises ProvisionFailed, ClusterError."""
        account = f"system:serviceaccount:{namespace_name(mine)}:sandbox"
        scenario = Cluster.from_kubeconfig(self.kubeconfig, acting_as=account)
        try:
            self._until_refused(
                lambda: own_api_fault(scenario, image=image, runtime_class=RUNTIME_CLASS, groups=groups), cancelled
            )
        finally:
            scenario.close()

    def _until_refused(self, tried: Callable[[], str | None], cancelled: Cancellation) -> None:
        """Policies are in force moments after they are applied. Raises ProvisionFailed, ClusterError."""
        deadline = time.monotonic() + _SETTLE_S
        while (why := tried()) is not None:
            if cancelled.is_set():
                raise ProvisionFailed("cancelled while the cluster's policies came into force")
            if time.monotonic() > deadline:
                raise ProvisionFailed(f"the cluster does not keep what it must: {why}")
            time.sleep(_LOOK_S)


class ClusterSandbox:
    """The run's pod, and what its cluster adds to it."""

    def __init__(self, pod: PodSandbox, *, ref: BoundaryRef, environment: Mapping[str, str]) -> None:
        self._pod, self._ref, self._environment = pod, ref, environment

    def upload(self, bundle: Bundle) -> None:
        self._pod.upload(bundle)

    def execute(self, step: StepSpec, *, listener: StepListener | None = None) -> Execution:
        """What the scenario says of its environment comes first."""
        told = step.model_copy(update={"env": {**self._environment, **step.env}})
        return self._pod.execute(told, listener=listener)

    def evidence(self) -> Evidence:
        """As of a pod (workers/pods/evidence.py), and which cluster it is in; `network` says "own-api" when
        what was observed is the way to that cluster's own API server, and no other."""
        return self._pod.evidence().model_copy(update={"cluster": f"{self._ref.kind}/{self._ref.variant}"})

    def collect(self, patterns: Sequence[str], *, limits: ArtifactLimits, sink: ArtifactSink) -> Artifacts:
        return self._pod.collect(patterns, limits=limits, sink=sink)

    def end(self) -> None:
        """Raises BoundaryLost."""
        self._pod.end()
