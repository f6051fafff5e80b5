"""Cluster API: a management cluster makes a whole cluster for one run, on machines of its own, and takes it away again.

Order of making: a place (one of `max_clusters` names, which the API server gives to one run only), the objects, the
Cluster last. Undoing goes by labels alone, from any process: the Cluster is asked to end, and its own finalizer sees to
the order in which machines and infrastructure go; then all that carries its name is looked for, of every kind that any
provider defines, until nothing is left; the place goes last. What the management cluster says exists is what exists.
"""

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from service.core.boundary import BoundaryKind, BoundaryRef, Cancellation
from service.core.controls import Limits
from service.core.errors import BlastdoorError, BoundaryError, NotYetDestroyed, ProvisionFailed
from workers.boundaries.cluster.capi_api import LEASES, SECRETS, Management, Resource
from workers.boundaries.cluster.capi_probe import class_in_use, lacking, no_machines
from workers.boundaries.cluster.capi_render import (
    CLUSTER_NAME,
    GROUP,
    SHIPPED,
    VARIANT,
    KubeconfigFault,
    Standing,
    TopologyFault,
    digest,
    held_by,
    is_of,
    kubeconfig_of,
    kubernetes_version,
    mine,
    read_ref,
    read_topology,
    render_cluster,
    render_place,
    standing,
)
from workers.boundaries.cluster.provisioners import Tell
from workers.kube import PREFIX, Cluster, ClusterError, Manifest, Taken, Unreachable

log = structlog.get_logger()

PATIENCE_S = 60.0
"""A run that finds all places taken waits for so long."""
_BRIEF_S = 3.0
_PROBE_S = 0.5
_POLL_S, _LONGEST_PAUSE_S = 0.5, 2.0
_CLEAR_S = 20.0
_CLEAR_AGAIN_S = 1.0
_SLACK_S = 30.0
"""For what is asked of the management cluster before and after what is waited for."""
_NAMED = 5
"""So many of what is left are named."""


@dataclass(frozen=True, kw_only=True)
class CapiHost:
    """What the provisioner is told. `kubeconfig`: of the engine's user in the management cluster; `namespace`: there,
    for clusters of ours and nothing else; `topology`: a folder of templates, None for the shipped one; `max_clusters`:
    at once, of this installation and site; `state`: a folder of this host; `ready_s`: after so long, a cluster that is
    not ready is given up; `development`: nodes may be containers of one host, where nobody is promised machines."""

    installation: str
    site: str
    kubeconfig: Path
    namespace: str
    topology: Path | None
    max_clusters: int
    state: Path
    ready_s: float
    development: bool = False


class CapiProvisioner:
    """Implements `Provisioner`. Connections are made in the process that uses them."""

    def __init__(self, host: CapiHost) -> None:
        self._host = host
        self._connected: dict[float, tuple[int, Management]] = {}
        self._resisted: set[str] = set()

    @property
    def variant(self) -> str:
        return VARIANT

    @property
    def host(self) -> CapiHost:
        return self._host

    def close(self) -> None:
        for pid, management in self._connected.values():
            if pid == os.getpid():
                management.close()
        self._connected.clear()

    # --- What it can -------------------------------------------------------------------------------------------------

    def lacks(self) -> Sequence[str]:
        if self._host.max_clusters < 1:
            return ("a setting that lets at least one cluster be made",)
        if not self._host.kubeconfig.is_file():
            return (f"a kubeconfig of the management cluster: there is no file {self._host.kubeconfig}",)
        try:
            topology = self._topology()
        except TopologyFault as error:
            return (f"a topology that a cluster can be made from: {error}",)
        namespace, development = self._host.namespace, self._host.development
        if (why := no_machines(topology, development=development)) is not None:
            return (why,)
        try:
            return tuple(lacking(self._management(_PROBE_S), topology, namespace=namespace, development=development))
        except BlastdoorError as error:
            return (f"a management cluster that answers: {error}",)

    def versions(self) -> Mapping[str, str]:
        found: dict[str, str] = {}
        with suppress(TopologyFault):
            topology = self._topology()
            found = {"cluster_api": topology[-1]["apiVersion"].rpartition("/")[2], "topology": digest(topology)}
            if version := kubernetes_version(topology):
                found["kubernetes"] = version
        with suppress(BlastdoorError):
            found["management_cluster"] = self._management(_PROBE_S).version()
        return found

    def too_small_for(self, limits: Limits) -> str | None:
        """How large its machines are is for the management cluster to know."""
        return None

    # --- Making -------------------------------------------------------------------------------------------------------

    def create(self, ref: BoundaryRef, *, cancelled: Cancellation, tell: Tell, patience_s: float = PATIENCE_S) -> Path:
        """`patience_s`: for so long a place is waited for when all are taken; what is made then has `ready_s`."""
        if (ref.kind, ref.variant) != (BoundaryKind.CLUSTER, VARIANT):
            raise ProvisionFailed(f"{ref.name} is not for this provisioner")
        if (ref.installation, ref.site) != (self._host.installation, self._host.site):
            raise ProvisionFailed(f"{ref.name} is not for this installation and site")
        room = _Until(patience_s, cancelled)
        room.look()
        try:
            topology = self._topology()
        except TopologyFault as error:
            raise ProvisionFailed(f"no cluster can be made from the topology: {error}") from error
        try:
            self._await_place(ref, room, tell)
            return self._make(ref, topology, _Until(self._host.ready_s, cancelled), tell)
        except BaseException as error:
            with suppress(BoundaryError):  # what is left carries the reference, for the reaper
                self.destroy(ref)
            if isinstance(error, ClusterError | OSError):
                raise ProvisionFailed(f"the cluster could not be made: {error}") from error
            raise

    def longest_s(self) -> float:
        return PATIENCE_S + self._host.ready_s + _CLEAR_S + _SLACK_S

    def _make(self, ref: BoundaryRef, topology: Sequence[Manifest], until: "_Until", tell: Tell) -> Path:
        management = self._management()
        in_use = class_in_use(management, topology, namespace=self._host.namespace)
        if (why := no_machines([*topology, *in_use], development=self._host.development)) is not None:
            raise ProvisionFailed(f"a cluster here needs {why}")
        made: Manifest = {}
        for one in render_cluster(ref, topology, namespace=self._host.namespace):
            until.look()
            there = management.get(management.kind_of(one), one["metadata"]["name"])
            if there is not None and not is_of(there, ref):
                raise ProvisionFailed(f"there is a {one['kind']} {one['metadata']['name']}, and not of this run")
            made = management.apply(one)
        tell("the management cluster was asked for a cluster")
        kind = management.kind_of(made)
        self._await_ready(kind, made, until, tell)
        path = self._write_kubeconfig(ref, self._await_kubeconfig(ref, until))
        tell("waiting for its API server to answer this host")
        self._await_answer(path, until)
        while True:
            with suppress(Unreachable):
                self._insist_on(kind, made)  # a deletion from outside may have come meanwhile
                return path
            until.pause("the management cluster does not answer")

    def _await_place(self, ref: BoundaryRef, until: "_Until", tell: Tell) -> None:
        """Raises ProvisionFailed, ClusterError."""
        told = False
        while not self._take_place(ref):
            if not told:
                tell("waiting for another cluster to go")
                told = True
            until.pause(f"there are {self._host.max_clusters} clusters, and no more are allowed at once")

    def _take_place(self, ref: BoundaryRef) -> bool:
        """Not when all are taken: also those of clusters that are being deleted, whose machines are still there. A
        setting that was lowered counts what there is, not only names."""
        management = self._management()
        taken = management.list(LEASES, mine(ref.installation, ref.site))
        if any(is_of(one, ref) for one in taken):  # by a try whose answer was lost
            return True
        names = {one["metadata"]["name"] for one in taken}
        for n in range(self._host.max_clusters if len(taken) < self._host.max_clusters else 0):
            place = render_place(ref, n, namespace=self._host.namespace)
            if place["metadata"]["name"] not in names:
                with suppress(Taken):
                    management.create(LEASES, place)
                    return True
        return False

    def _await_ready(self, kind: Resource, made: Manifest, until: "_Until", tell: Tell) -> None:
        told: set[str] = set()
        waits = ""
        while True:
            now: Standing | None = None
            with suppress(Unreachable):  # a management cluster that is away for a while ends nothing
                now = standing(self._insist_on(kind, made))
            if now is not None:
                for line in now.done:
                    if line not in told:
                        told.add(line)
                        tell(line)
                if now.ready:
                    return
                if now.failed:
                    raise ProvisionFailed(f"the cluster will not come: {now.failed}")
                waits = now.waits
            until.pause(f"the cluster is not ready: {waits or 'the management cluster does not answer'}")

    def _insist_on(self, kind: Resource, made: Manifest) -> Manifest:
        """The very Cluster that was made, still wanted. Raises ProvisionFailed, ClusterError."""
        name, uid = made["metadata"]["name"], made["metadata"]["uid"]
        found = self._management(_BRIEF_S).get(kind, name)
        if found is None or found["metadata"]["uid"] != uid:
            raise ProvisionFailed("the cluster was deleted while it was being made")
        if "deletionTimestamp" in found["metadata"]:
            raise ProvisionFailed("the cluster is being deleted while it is being made")
        return found

    def _await_kubeconfig(self, ref: BoundaryRef, until: "_Until") -> str:
        name = f"{ref.name}-kubeconfig"
        while True:
            with suppress(Unreachable):
                if (secret := self._management(_BRIEF_S).get(SECRETS, name)) is not None:
                    try:
                        return kubeconfig_of(secret, ref.name)
                    except KubeconfigFault as error:
                        raise ProvisionFailed(f"the secret {name} cannot be used: {error}") from error
            until.pause(f"the cluster is ready, but there is no secret {name}")

    def _write_kubeconfig(self, ref: BoundaryRef, text: str) -> Path:
        folder = self._folder(ref)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        path = folder / "kubeconfig"
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "w") as file:
            file.write(text)
        return path

    def _await_answer(self, path: Path, until: "_Until") -> None:
        """That the management cluster reaches it does not say that this host does. Raises ProvisionFailed,
        ClusterError."""
        while True:
            cluster = Cluster.from_kubeconfig(path, patience_s=0)
            try:
                cluster.get("Namespace", "kube-system")
                return
            except Unreachable as error:
                why = str(error)
            finally:
                cluster.close()
            until.pause(f"its API server does not answer this host: {why}")

    # --- What there is, and its end -----------------------------------------------------------------------------------

    def discover(self) -> Iterator[BoundaryRef]:
        """Raises ClusterError."""
        management = self._management(_BRIEF_S)
        chosen = mine(self._host.installation, self._host.site)
        found = management.list(LEASES, chosen)
        if (kind := self._cluster_kind(management)) is not None:
            found += management.list(kind, chosen)
        refs = (read_ref(one, site=self._host.site) for one in found)
        yield from {ref.name: ref for ref in refs if ref is not None}.values()

    def destroy(self, ref: BoundaryRef) -> None:
        """Waits some seconds for the management cluster to say that all is gone; hardly at all for what has resisted
        before, since the reaper comes back to it."""
        if ref.installation != self._host.installation:
            return
        deadline = time.monotonic() + (_CLEAR_AGAIN_S if ref.name in self._resisted else _CLEAR_S)
        try:
            shutil.rmtree(self._folder(ref), ignore_errors=True)
            pause = _POLL_S / 2
            while why := self._still_there(ref):
                if time.monotonic() > deadline:
                    raise NotYetDestroyed(f"{ref.name}: {why}")
                time.sleep(pause := min(2 * pause, _LONGEST_PAUSE_S))  # each look is a question for every kind
            if self._folder(ref).exists():
                raise NotYetDestroyed(f"{ref.name}: {self._folder(ref)} cannot be removed")
        except ClusterError as error:
            self._resisted.add(ref.name)
            raise NotYetDestroyed(f"{ref.name}: {error}") from error
        except NotYetDestroyed:
            self._resisted.add(ref.name)
            raise
        self._resisted.discard(ref.name)

    def _still_there(self, ref: BoundaryRef) -> str:
        """Asks what is left to end -> what it is; empty when it is gone to the last object."""
        management = self._management(_BRIEF_S)
        kind = self._cluster_kind(management)
        cluster = management.get(kind, ref.name) if kind is not None else None
        if cluster is None or is_of(cluster, ref):
            if kind is not None and cluster is not None:
                if "deletionTimestamp" not in cluster["metadata"]:
                    management.delete(kind, cluster)
                if (seen := management.get(kind, ref.name)) is not None:
                    return held_by(seen)
            if left := self._left(management, ref):
                shown = "; ".join(held_by(one) for one in left[:_NAMED])
                return shown if len(left) <= _NAMED else f"{shown}; and {len(left) - _NAMED} more"
        else:
            log.warning("cluster_of_another", name=ref.name)
        for place in management.list(LEASES, mine(ref.installation, ref.site)):
            if is_of(place, ref):
                management.delete(LEASES, place)
        return ""

    def _left(self, management: Management, ref: BoundaryRef) -> Sequence[Manifest]:
        """All that bears the Cluster's name and may be this run's, once the Cluster is gone. What we applied is asked
        to end, and looked for again; what the providers made is theirs to end, in their order."""
        left = []
        for kind in (*management.every_kind(), SECRETS):
            for one in management.list(kind, {CLUSTER_NAME: ref.name}):
                if is_of(one, ref):
                    if "deletionTimestamp" not in one["metadata"]:
                        management.delete(kind, one)
                elif PREFIX + "installation" in (one["metadata"].get("labels") or {}):
                    continue
                left.append(one)
        return left

    def _cluster_kind(self, management: Management) -> Resource | None:
        """In the version that the management cluster would rather speak, whatever the topology of today says; None
        where there is no Cluster API, and so no Cluster."""
        for version in management.groups().get(GROUP, ()):
            if (found := management.kinds(version).get("Cluster")) is not None:
                return found
        return None

    # --- Of this host -------------------------------------------------------------------------------------------------

    def _topology(self) -> Sequence[Manifest]:
        return read_topology(self._host.topology or SHIPPED)

    def _folder(self, ref: BoundaryRef) -> Path:
        return self._host.state / "clusters" / ref.name

    def _management(self, patience_s: float = 45.0) -> Management:
        found = self._connected.get(patience_s)
        if found is None or found[0] != os.getpid():
            cluster = Cluster.from_kubeconfig(self._host.kubeconfig, patience_s=patience_s)
            found = self._connected[patience_s] = os.getpid(), Management(cluster, self._host.namespace)
        return found[1]


class _Until:
    """How long something may take, and whether it is still wanted."""

    def __init__(self, seconds: float, cancelled: Cancellation) -> None:
        self._seconds, self._cancelled = seconds, cancelled
        self._deadline = time.monotonic() + seconds

    def look(self) -> None:
        if self._cancelled.is_set():
            raise ProvisionFailed("not wanted any more")

    def pause(self, why: str) -> None:
        """Raises ProvisionFailed when there is no time left, with what was waited for."""
        self.look()
        if time.monotonic() > self._deadline:
            raise ProvisionFailed(f"after {self._seconds:g} s {why}")
        time.sleep(_POLL_S)
        self.look()


__all__ = ["CapiHost", "CapiProvisioner"]
