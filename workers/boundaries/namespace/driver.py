"""The namespace boundary: one bare pod per run, in a namespace of its own or, for soft isolation, in its tenant's.

How a pod is made is in workers/pods/opening.py. Undoing goes by names and labels alone, from any process, and only ever
takes the very object that was looked at (uid). What the cluster says exists is what exists.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from service.core.boundary import BoundaryKind, BoundaryRef, BoundarySpec, Cancellation, Capabilities, Host, Sandbox
from service.core.errors import BoundaryError, BoundaryLost, NotYetDestroyed, ProvisionFailed
from service.core.failpoints import Failpoint, reach
from workers.kube import PREFIX, Cluster, ClusterError, Manifest
from workers.pods.listener import Listener
from workers.pods.opening import NameTaken, Opening
from workers.pods.render import (
    LISTENER_PORT,
    SOFT,
    VARIANTS,
    as_label,
    labels,
    namespace_name,
    read_labels,
)

log = structlog.get_logger()

DEFAULT = "default"
"""The one runtime: what is in the image."""

_NODES_TRIED = 3
_CLEAR_S = 20.0
_CLEAR_AGAIN_S = 1.0
_BRIEF_S = 3.0
_NO_CLUSTER = "no cluster is configured: BLASTDOOR_KUBECONFIG names one"


@dataclass(frozen=True, kw_only=True)
class NamespaceHost:
    """What the driver is told. `kubeconfig`: of the engine's user, None where there is no cluster; `image`: ours, by
    digest, as the nodes call it; `variants`: those to be offered."""

    installation: str
    site: str
    kubeconfig: Path | None
    image: str
    variants: Sequence[str] = ("runc", "gvisor")


class NamespaceBoundary:
    """Implements `service.core.boundary.Boundary`. Connections are made in the process that uses them."""

    def __init__(self, host: NamespaceHost) -> None:
        self._host = host
        self._connected: tuple[int, Cluster, Listener] | None = None
        self._looking: tuple[int, Cluster] | None = None
        self._resisted: set[str] = set()

    @classmethod
    def for_host(cls, host: Host) -> "NamespaceBoundary":
        """As the registry makes it."""
        return cls(
            NamespaceHost(
                installation=host.installation, site=host.site, kubeconfig=host.kubeconfig, image=host.kube_image,
                variants=host.namespace_variants,
            )
        )  # fmt: skip

    @property
    def kind(self) -> BoundaryKind:
        return BoundaryKind.NAMESPACE

    @property
    def host(self) -> NamespaceHost:
        return self._host

    @property
    def cluster(self) -> Cluster:
        return self._here()[0]

    @property
    def listener(self) -> Listener:
        return self._here()[1]

    def warm(self) -> None:
        """The kubeconfig is read; the probe of the worker's parent keeps the listener there."""
        with suppress(ClusterError):  # the run will find out for itself
            self._here()

    def close(self) -> None:
        """End what was kept ready."""
        if self._connected is not None and self._connected[0] == os.getpid():
            _, cluster, listener = self._connected
            with suppress(ClusterError):  # it ends by itself
                listener.close()
            cluster.close()
        if self._looking is not None and self._looking[0] == os.getpid():
            self._looking[1].close()
        self._connected = self._looking = None

    def surroundings(self) -> Sequence[tuple[str, int]]:
        """The listener, which answers for sure; of each node, kubelet and API server. Raises ClusterError."""
        addresses = [
            row["address"]
            for node in self.cluster.list("Node")
            for row in node["status"].get("addresses", ())
            if row["type"] in ("InternalIP", "ExternalIP")
        ]
        ports = (10250, 6443, 443)
        nodes = [(address, port) for address in addresses[:_NODES_TRIED] for port in ports]
        return [(self.listener.address(), LISTENER_PORT), *nodes]

    def probe(self) -> Sequence[Capabilities]:
        from workers.boundaries.namespace.probe import probe  # it plays runs through this driver

        return probe(self)

    @contextmanager
    def open(self, spec: BoundarySpec, ref: BoundaryRef, *, cancelled: Cancellation) -> Iterator[Sandbox]:
        self._accept(spec, ref)
        reach(Failpoint.OPEN_BEFORE_CREATE)
        if cancelled.is_set():  # above all: a lease that was slept through. What stood under it is known to be gone
            raise ProvisionFailed("not wanted any more, before anything was made")
        try:
            self.listener.address()  # before anything is made
            opening = Opening(cluster=self.cluster, listener=self.listener)
        except ClusterError as error:
            raise ProvisionFailed(str(error)) from error
        try:
            sandbox = opening.make(spec, ref, image=self._host.image, cancelled=cancelled)
            reach(Failpoint.OPEN_CREATED)
        except NameTaken:
            raise
        except BaseException as error:
            self._undo(ref)
            if isinstance(error, ClusterError | BoundaryLost):
                raise ProvisionFailed(f"the pod could not be made: {error}") from error
            raise
        try:
            yield sandbox
        finally:
            with suppress(BoundaryLost):  # what cannot be ended now has its deadline, and the reaper has the reference
                sandbox.end()

    def discover(self) -> Iterator[BoundaryRef]:
        """From labels: namespaces of runs, and pods in tenants' namespaces. Raises ClusterError."""
        if self._host.kubeconfig is None:
            return
        mine = {
            PREFIX + "managed": "true",
            PREFIX + "installation": self._host.installation,
            PREFIX + "kind": self.kind.value,
            PREFIX + "site": as_label(self._host.site),
        }
        found = self.brief.list("Namespace", labels=mine)
        found += self.brief.list("Pod", labels=mine | {PREFIX + "variant": SOFT})
        for one in found:
            ref = read_labels(one["metadata"].get("labels") or {}, site=self._host.site)
            if ref is not None and one["metadata"]["name"] == ref.name:
                yield ref

    def destroy(self, ref: BoundaryRef) -> None:
        """Waits some seconds for the cluster to say that it is gone; hardly at all for what has resisted before, since
        the reaper comes back to it."""
        within_s = _CLEAR_AGAIN_S if ref.name in self._resisted else _CLEAR_S
        try:
            self._destroy(ref, deadline=time.monotonic() + within_s)
        except ClusterError as error:
            self._resisted.add(ref.name)
            raise NotYetDestroyed(f"{ref.name}: {error}") from error
        except NotYetDestroyed:
            self._resisted.add(ref.name)
            raise
        self._resisted.discard(ref.name)

    def _destroy(self, ref: BoundaryRef, *, deadline: float) -> None:
        """A namespace takes its time to go: it is asked to before the pod is, and looked for after it."""
        namespace = self._pods_namespace(ref)
        around = self._doomed("Namespace", ref, None) if ref.variant != SOFT else None
        if pod := self._doomed("Pod", ref, namespace):
            self._see_gone(pod, deadline=deadline)
        if around:
            self._see_gone(around, deadline=deadline)

    def _pods_namespace(self, ref: BoundaryRef) -> str:
        """A reference that was discovered has the tenant's hash where its name would be."""
        if ref.variant != SOFT:
            return ref.name
        known = f"bd-t-{ref.tenant}"
        return known if len(ref.tenant) == 40 and self.cluster.get("Namespace", known) else namespace_name(ref)

    def _doomed(self, kind: str, ref: BoundaryRef, namespace: str | None) -> Manifest | None:
        """Asked to end, as it was found; None for what is not there, or has the name and is of another installation or
        attempt: that is left alone."""
        found = self.cluster.get(kind, ref.name, namespace)
        if found is None or not _is_of(found, ref):
            return None
        uid = found["metadata"]["uid"]
        self.cluster.delete(kind, ref.name, namespace, uid=uid, grace_s=1 if kind == "Pod" else None)
        return found

    def _see_gone(self, doomed: Manifest, *, deadline: float) -> None:
        kind, metadata = doomed["kind"], doomed["metadata"]
        name, namespace = metadata["name"], metadata.get("namespace")
        seconds = max(deadline - time.monotonic(), 0.0)
        for what, seen in self.cluster.watch(kind, namespace, name=name, since=doomed, seconds=seconds):
            if what == "DELETED" and seen["metadata"]["uid"] == metadata["uid"]:
                return
        found = self.cluster.get(kind, name, namespace)
        if found is not None and found["metadata"]["uid"] == metadata["uid"]:
            raise NotYetDestroyed(f"{kind} {name}: {_held_by(found)}")

    def _here(self) -> tuple[Cluster, Listener]:
        if self._host.kubeconfig is None:
            raise ClusterError(_NO_CLUSTER)
        if self._connected is None or self._connected[0] != os.getpid():
            cluster = Cluster.from_kubeconfig(self._host.kubeconfig)
            listener = Listener(
                cluster, installation=self._host.installation, site=self._host.site, image=self._host.image
            )
            self._connected = os.getpid(), cluster, listener
        return self._connected[1:]

    @property
    def brief(self) -> Cluster:
        """For what is asked again soon: a reaper has other kinds to look at while a cluster is away."""
        if self._host.kubeconfig is None:
            raise ClusterError(_NO_CLUSTER)
        if self._looking is None or self._looking[0] != os.getpid():
            self._looking = os.getpid(), Cluster.from_kubeconfig(self._host.kubeconfig, patience_s=_BRIEF_S)
        return self._looking[1]

    def _accept(self, spec: BoundarySpec, ref: BoundaryRef) -> None:
        """Isolation never degrades: what this wall cannot do is not done by halves. Raises ProvisionFailed."""
        if ref.kind is not BoundaryKind.NAMESPACE or ref.installation != self._host.installation:
            raise ProvisionFailed(f"{ref.name} is not for this boundary")
        if ref.variant not in VARIANTS or ref.variant not in self._host.variants:
            raise ProvisionFailed(f"variant {ref.variant!r} is not offered here")
        if not self._host.image:
            raise ProvisionFailed("no image is configured: BLASTDOOR_KUBE_IMAGE names one")
        if spec.runtime != DEFAULT:
            raise ProvisionFailed(f"there is no runtime {spec.runtime} here; the image is the only one")
        if spec.network.mode != "none":
            raise ProvisionFailed("this boundary has no network to allow")

    def _undo(self, ref: BoundaryRef) -> None:
        with suppress(BoundaryError):  # the reaper has the reference
            self.destroy(ref)


def _is_of(found: Manifest, ref: BoundaryRef) -> bool:
    said = found["metadata"].get("labels") or {}
    wanted = labels(ref)
    return all(said.get(PREFIX + key) == wanted[PREFIX + key] for key in ("installation", "run", "fence"))


def _held_by(found: Manifest) -> str:
    """Why the cluster does not let go, in its own words."""
    said = [
        f"{row['reason']}: {row['message']}"
        for row in found.get("status", {}).get("conditions", ())
        if row.get("status") == "True" and row.get("message")
    ]
    finalizers = [*found["metadata"].get("finalizers", ()), *found.get("spec", {}).get("finalizers", ())]
    held = f"held by {', '.join(finalizers)}" if finalizers else "not gone yet"
    return "; ".join([held, *said])[:500]


__all__ = ["NamespaceBoundary", "NamespaceHost"]
