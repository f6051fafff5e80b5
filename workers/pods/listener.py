"""A pod of ours that listens, so that every other pod can fail to reach it.

That proves something only while it can be reached from where no policy forbids it: the probe sends a control there.
One serves all runs of an installation in a cluster. It is a bare pod, with an end of its own as each of ours has, and
so it is renewed long before that.
"""

import time
from datetime import UTC, datetime, timedelta

from service.core.errors import ProvisionFailed
from workers.kube import Cluster, ClusterError, Manifest
from workers.kube.canary import settled
from workers.pods.pod import Pod, exit_code, explained, is_over, is_running
from workers.pods.render import (
    LISTENER_PORT,
    SOFT,
    init_at,
    listener_namespace,
    render_listener_namespace,
    render_listener_pod,
)

_RENEW_AFTER = timedelta(seconds=500)
_LOOK_AGAIN_S = 10.0
_START_S = 60.0


class _Never:
    def is_set(self) -> bool:
        return False


class Listener:
    """Of one process; any number of processes share the pod."""

    def __init__(self, cluster: Cluster, *, installation: str, site: str, image: str) -> None:
        self._cluster, self._installation, self._site, self._image = cluster, installation, site, image
        self._namespace = listener_namespace(installation)
        self._made = False
        self._address: str | None = None
        self._looked_at = 0.0

    def close(self) -> None:
        """Remove the namespace, if this process made it ready. Another that still needs a listener makes one anew."""
        if self._made:
            self._cluster.delete("Namespace", self._namespace)
            self._made, self._address = False, None

    def address(self) -> str:
        """The address of one that runs, seen within the last ten seconds; made if need be. Raises ProvisionFailed."""
        if self._address is None or time.monotonic() - self._looked_at > _LOOK_AGAIN_S:
            try:
                self._address = self._found() or self._new()
            except ClusterError as error:
                raise ProvisionFailed(f"no listener for the check of network policy: {error}") from error
            self._looked_at = time.monotonic()
        return self._address

    def is_there(self, address: str) -> bool:
        """Whether one with this address runs now: else that nobody reaches it shows nothing. Raises ClusterError."""
        return any(_address(pod) == address for pod in self._running())

    def control(self) -> str | None:
        """Whether a pod that policy lets through reaches it -> why not. Raises ProvisionFailed, ClusterError."""
        address = self.address()
        pod = self._start("control", ["reach", address, str(LISTENER_PORT)])
        try:
            ended = pod.await_end(within_s=_START_S) or {}
            return None if exit_code(ended) == 0 else f"a pod that may reach the listener did not: {explained(ended)}"
        finally:
            self._cluster.delete("Pod", pod.name, pod.namespace, uid=pod.uid, grace_s=1)

    def _running(self) -> list[Manifest]:
        return [pod for pod in self._cluster.list("Pod", self._namespace) if _is_listener(pod) and is_running(pod)]

    def _found(self) -> str | None:
        """Of the newest that has enough time left; what is over is cleared away."""
        pods = [pod for pod in self._cluster.list("Pod", self._namespace) if _is_listener(pod)]
        for pod in pods:
            if is_over(pod):
                self._cluster.delete("Pod", pod["metadata"]["name"], self._namespace, uid=pod["metadata"]["uid"])
        young = [pod for pod in pods if is_running(pod) and _age(pod) < _RENEW_AFTER]
        return _address(max(young, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))) if young else None

    def _new(self) -> str:
        pod = self._start("listener", ["listen", str(LISTENER_PORT)])
        running = pod.await_running(_Never(), within_s=_START_S)
        address = _address(running)
        if address is None:
            raise ProvisionFailed("the listener for the check of network policy has no IPv4 address")
        return address

    def _start(self, role: str, words: list[str]) -> Pod:
        if not self._made:
            for manifest in render_listener_namespace(self._installation, self._site):
                self._cluster.apply(manifest)
            self._made = True
        name = f"{role}-{time.time_ns():x}"
        manifest = render_listener_pod(name, self._installation, self._site, image=self._image, words=words)
        created = create(self._cluster, manifest)
        return Pod(self._cluster, self._namespace, name, created["metadata"]["uid"], init_at(SOFT))


def create(cluster: Cluster, manifest: Manifest) -> Manifest:
    """Makes what nobody made before; a pod once its namespace's quota is counted. Raises Taken, ClusterError."""
    return settled(lambda: cluster.create(manifest, ours=manifest["metadata"]["labels"]))


def _is_listener(pod: Manifest) -> bool:
    return str(pod["metadata"]["name"]).startswith("listener-") and "deletionTimestamp" not in pod["metadata"]


def _address(pod: Manifest) -> str | None:
    address: str | None = pod.get("status", {}).get("podIP")
    return address if address and ":" not in address else None


def _age(pod: Manifest) -> timedelta:
    made = datetime.fromisoformat(pod["metadata"]["creationTimestamp"].replace("Z", "+00:00"))
    return datetime.now(UTC) - made
