"""Makes the pod of one run, behind its walls, and shows that they stand: the way of every boundary that has pods.

Order of making: namespace with labels, its walls, pod; then our first process in the pod has to find that network
policy is in force. Undoing is the driver's.
"""

import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

import structlog

from service.core.boundary import BoundaryRef, BoundarySpec, Cancellation
from service.core.errors import BoundaryLost, ProvisionFailed
from service.core.failpoints import Failpoint, reach
from workers.kube import PREFIX, Cluster, Denied, Manifest, Taken, together
from workers.pods.evidence import DEFAULT, Shut, lets_nothing_pass, network
from workers.pods.listener import Listener, create
from workers.pods.nodes import kept_for
from workers.pods.pod import Pod
from workers.pods.render import (
    LISTENER_PORT,
    MAX_SECONDS,
    SOFT,
    init_at,
    namespace_name,
    render_namespace,
    render_pod,
)
from workers.pods.sandbox import PodSandbox

log = structlog.get_logger()

_READY_S = 60.0
_ROOM_S = 15.0
_LOOK_FOR_ROOM_S = 0.25
_OPENED = PREFIX + "opened"
"""A label with a word that only one attempt to open knows: an object that is there already, and has it, is ours."""


class NameTaken(ProvisionFailed):
    """What has it is not ours to undo."""


@dataclass(frozen=True, kw_only=True)
class Additions:
    """What one kind of boundary gives a run beyond the common walls: `walls` are applied after them and before the
    pod, which `pod` may change. `told`: the evidence's word for what all policies of the namespace let pass."""

    walls: Sequence[Manifest] = ()
    pod: Callable[[Manifest], Manifest] = lambda manifest: manifest
    told: Callable[[Sequence[Manifest]], str] = network


@dataclass(frozen=True, kw_only=True)
class Opening:
    """Makes pods in this cluster. `listener`: what every one of them must fail to reach."""

    cluster: Cluster
    listener: Listener

    def make(
        self, spec: BoundarySpec, ref: BoundaryRef, *, image: str, cancelled: Cancellation,
        additions: Additions = Additions(),
    ) -> PodSandbox:  # fmt: skip
        """Raises NameTaken, ProvisionFailed, BoundaryLost, ClusterError; what was made until then is left."""
        address = self.listener.address()
        opened = {_OPENED: secrets.token_hex(8)}
        namespace, *walls = render_namespace(ref, spec)
        if ref.variant == SOFT:
            self.cluster.apply(namespace)
        else:
            self._create(namespace, opened)
        reach(Failpoint.OPEN_HALF_CREATED)
        together([partial(self.cluster.apply, wall) for wall in (*walls, *additions.walls)])
        lifetime_s = (spec.lifetime or ref.expires_at - datetime.now(UTC)).total_seconds()
        manifest = render_pod(
            ref, spec, image=image, words=["first", address, str(LISTENER_PORT)],
            seconds=min(max(math.ceil(lifetime_s), 1), MAX_SECONDS),
        )  # fmt: skip
        created = self._create_pod(additions.pod(manifest), opened, cancelled)
        pod = Pod(self.cluster, namespace_name(ref), ref.name, created["metadata"]["uid"], init_at(ref.variant))
        running = pod.await_running(cancelled, within_s=_READY_S)
        if spec.node_group is not None:
            self._insist_on_group(running["spec"]["nodeName"], spec.node_group)
        times, seconds = pod.await_shut(cancelled)
        if not self.listener.is_there(address):  # then that it could not be reached shows nothing
            raise BoundaryLost("the listener for the check of network policy went away meanwhile")
        if not lets_nothing_pass(self.cluster.get("NetworkPolicy", DEFAULT, pod.namespace)):
            raise BoundaryLost("the namespace's network policy is not what was applied")
        log.info("pod_ready", run_id=ref.run_id, fence=ref.fence, reached_before=times, shut_after_s=seconds)
        shut = Shut(f"{address}:{LISTENER_PORT}", times, seconds)
        return PodSandbox(spec, pod=pod, shut=shut, cancelled=cancelled, told=additions.told)

    def _create(self, manifest: Manifest, opened: Mapping[str, str]) -> Manifest:
        """Raises NameTaken, ClusterError."""
        manifest["metadata"]["labels"] = manifest["metadata"]["labels"] | opened
        try:
            return create(self.cluster, manifest)
        except Taken as error:
            raise NameTaken(f"there is a {manifest['kind']} of that name: {error}") from error

    def _create_pod(self, manifest: Manifest, opened: Mapping[str, str], cancelled: Cancellation) -> Manifest:
        """A soft run's counts against its tenant's quota, where one that has just ended may still be counted: for a
        while that is waited out. Raises ProvisionFailed, ClusterError."""
        deadline = time.monotonic() + _ROOM_S
        while True:
            try:
                return self._create(manifest, opened)
            except Denied as error:
                if "exceeded quota" not in error.detail:
                    raise
                if cancelled.is_set() or time.monotonic() > deadline:
                    raise ProvisionFailed(f"the tenant's quota has no room for this pod: {error.detail}") from error
            time.sleep(_LOOK_FOR_ROOM_S)

    def _insist_on_group(self, node: str, group: str) -> None:
        """Where the pod runs is what counts, not where it was to run. Raises BoundaryLost."""
        found = self.cluster.get("Node", node)
        if found is None or kept_for(found) != group:
            raise BoundaryLost(f"the pod runs on node {node}, which is not kept for group {group}")
