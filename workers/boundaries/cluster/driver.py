"""The cluster boundary: a whole Kubernetes cluster for one run, and in it the same pod, behind the same walls, as in a
cluster that is shared.

Order of making: the cluster, or a standby one that is claimed; what `blastdoor cluster install` puts in; the pod.
What was to be shown once in a shared cluster is shown in each of these before the first step (`inside.py`). The
cluster's administrator is this worker, whose kubeconfig no guest sees. Undoing is the provisioner's: it takes all.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import structlog

from service.core.boundary import (
    Boundary,
    BoundaryKind,
    BoundaryRef,
    BoundarySpec,
    Cancellation,
    Capabilities,
    ClusterChoices,
    Host,
    Sandbox,
)
from service.core.cleanup import StandbyState
from service.core.controls import Need
from service.core.errors import BlastdoorError, BoundaryLost, NotYetDestroyed, ProvisionFailed
from service.core.failpoints import Failpoint, reach
from workers.boundaries.cluster.capi import CapiHost, CapiProvisioner
from workers.boundaries.cluster.engine import EngineFailed
from workers.boundaries.cluster.inside import LONGEST_S, Inside, common_prefix, get_ready
from workers.boundaries.cluster.kind import KindHost, KindProvisioner
from workers.boundaries.cluster.provisioners import NameTaken, NoRoom, Provisioner, Tell
from workers.boundaries.cluster.standby import Standby
from workers.kube import ClusterError
from workers.pods.render import hashed

log = structlog.get_logger()

GIVES = frozenset({Need.KUBERNETES_API})
PATIENCE_S = 60.0
"""A run that just ended may still have its cluster, and one may be in the making that nobody has asked for: for so long
one of them is waited for."""
_LOOK_S = 1.0
_NO_MANAGEMENT = "a management cluster of Cluster API: BLASTDOOR_CAPI_KUBECONFIG names one"
_NO_IMAGES = "images of its runtimes, by digest: BLASTDOOR_CLUSTER_IMAGES names them, or BLASTDOOR_KUBE_IMAGE the one"


def _silent(line: str) -> None:
    """Nobody asked to be told."""


class ClusterBoundary:
    """Implements `service.core.boundary.Boundary`, and of `workers.registry` Telling, Keeping and Slow."""

    def __init__(
        self, *, installation: str, site: str, images: Mapping[str, str], provisioners: Sequence[Provisioner],
        standby: Standby | None = None, tell: Tell = _silent, without: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        """`images`: of each runtime, by digest; `standby`: of the provisioner for kind; `without`: variants that cannot
        even be asked what they lack, and why."""
        self._without = without or {}
        self._installation, self._site, self._images = installation, site, images
        self._provisioners = {one.variant: one for one in provisioners}
        self._standby, self._tell = standby, tell

    @classmethod
    def for_host(cls, host: Host) -> "ClusterBoundary":
        """As the registry makes it."""
        choices = host.clusters
        images = dict(choices.images) or ({"default": host.kube_image} if host.kube_image else {})
        state = host.state_dir.absolute() / "clusters" / hashed(host.site)[:12]
        made = {variant: _made(variant, host, choices, state / variant) for variant in choices.provisioners}
        kind = made.get("kind")
        standby = None
        if isinstance(kind, KindProvisioner) and images:
            standby = Standby(
                kind,
                wanted=choices.standby,
                prepare=lambda path, cancelled: get_ready(path, images, cancelled=cancelled).close(),
                made_of=repr(sorted(images.items())),
            )
        return cls(
            installation=host.installation, site=host.site, images=images, standby=standby,
            provisioners=[one for one in made.values() if one is not None],
            without={variant: _NO_MANAGEMENT for variant, one in made.items() if one is None},
        )  # fmt: skip

    @property
    def kind(self) -> BoundaryKind:
        return BoundaryKind.CLUSTER

    def telling(self, tell: Tell) -> Boundary:
        return ClusterBoundary(
            installation=self._installation, site=self._site, images=self._images, standby=self._standby, tell=tell,
            provisioners=list(self._provisioners.values()), without=self._without,
        )  # fmt: skip

    def making_s(self, variant: str) -> float:
        """Of a variant that is not offered any more there is nothing to be made."""
        made = self._provisioners.get(variant)
        return 0.0 if made is None else PATIENCE_S + made.longest_s() + LONGEST_S

    def keep(self, *, cancelled: Cancellation) -> None:
        if self._standby is not None:
            self._standby.keep(cancelled=cancelled)

    def keep_none(self) -> None:
        if self._standby is not None:
            self._standby.keep_none()

    def standing(self) -> Mapping[str, int]:
        return {} if self._standby is None else vars(self._standby.standing())

    def kept(self) -> Mapping[str, StandbyState]:
        return {} if self._standby is None else self._standby.states()

    def probe(self) -> Sequence[Capabilities]:
        """What a cluster needs that would be made now. What the cluster itself enforces is found out in each, before
        its run's first step: one that only shows it would take half a minute of this host."""
        rows = [self._row(one) for one in self._provisioners.values()]
        return rows + [
            Capabilities(boundary=f"{BoundaryKind.CLUSTER}/{variant}", available=False, missing=(why,))
            for variant, why in self._without.items()
        ]

    def _row(self, provisioner: Provisioner) -> Capabilities:
        missing = [*provisioner.lacks()]
        if not self._images:
            missing.append(_NO_IMAGES)
        elif (why := _amiss(self._images)) is not None:
            missing.append(why)
        return Capabilities(
            boundary=f"{BoundaryKind.CLUSTER}/{provisioner.variant}",
            available=not missing,
            missing=tuple(missing),
            abilities=frozenset(need.value for need in GIVES),
            runtimes={name: image.rpartition("@")[2] for name, image in self._images.items()},
            versions=dict(provisioner.versions()),
        )

    @contextmanager
    def open(self, spec: BoundarySpec, ref: BoundaryRef, *, cancelled: Cancellation) -> Iterator[Sandbox]:
        provisioner, image = self._accept(spec, ref)
        reach(Failpoint.OPEN_BEFORE_CREATE)
        if cancelled.is_set():
            raise ProvisionFailed("not wanted any more, before anything was made")
        with ExitStack() as opened:
            try:
                inside = self._make(provisioner, ref, cancelled)
                opened.callback(inside.close)
                sandbox = inside.open(spec, ref, image=image, cancelled=cancelled, tell=self._tell)
                reach(Failpoint.OPEN_CREATED)
            except NameTaken:
                raise
            except BaseException as error:
                with suppress(NotYetDestroyed):  # the reaper has the reference
                    provisioner.destroy(ref)
                if isinstance(error, ClusterError | BoundaryLost | EngineFailed | OSError):
                    raise ProvisionFailed(f"the cluster could not be used: {error}") from error
                raise
            try:
                yield sandbox
            finally:
                with suppress(BoundaryLost):  # with the cluster everything in it goes
                    sandbox.end()

    def discover(self) -> Iterator[BoundaryRef]:
        """Raises BlastdoorError when one of the platforms cannot be asked: then nothing may be called absent."""
        for provisioner in self._provisioners.values():
            yield from provisioner.discover()

    def destroy(self, ref: BoundaryRef) -> None:
        provisioner = self._provisioners.get(ref.variant)
        if provisioner is None:
            raise NotYetDestroyed(f"{ref.name}: this host has no provisioner {ref.variant!r} any more")
        try:
            provisioner.destroy(ref)
        except NotYetDestroyed:
            raise
        except BlastdoorError as error:
            raise NotYetDestroyed(f"{ref.name}: {error}") from error

    def _accept(self, spec: BoundarySpec, ref: BoundaryRef) -> tuple[Provisioner, str]:
        """Isolation never degrades. Raises ProvisionFailed."""
        if ref.kind is not BoundaryKind.CLUSTER or ref.installation != self._installation:
            raise ProvisionFailed(f"{ref.name} is not for this boundary")
        if ref.variant not in self._provisioners:
            raise ProvisionFailed(f"variant {ref.variant!r} is not offered here")
        if spec.runtime not in self._images:
            raise ProvisionFailed(f"there is no runtime {spec.runtime} here; there are: {', '.join(self._images)}")
        if (why := _amiss(self._images)) is not None:
            raise ProvisionFailed(why)
        if not_given := [need.value for need in spec.needs if need not in GIVES]:
            raise ProvisionFailed(f"this boundary does not give {', '.join(not_given)}")
        if spec.network.mode != "none":
            raise ProvisionFailed("this boundary has no network to allow")
        if (why := self._provisioners[ref.variant].too_small_for(spec.limits)) is not None:
            raise ProvisionFailed(f"a cluster here does not hold {why}")
        return self._provisioners[ref.variant], self._images[spec.runtime]

    def _make(self, provisioner: Provisioner, ref: BoundaryRef, cancelled: Cancellation) -> Inside:
        """A cluster that is kept ready, or one of its own; when there is neither, whichever comes first. Raises
        ProvisionFailed, BoundaryLost, ClusterError, EngineFailed, OSError."""
        deadline, told = time.monotonic() + PATIENCE_S, False
        while True:
            if self._standby is not None and isinstance(provisioner, KindProvisioner):
                kubeconfig = self._standby.claim(ref)
                if kubeconfig is not None:
                    self._tell("a standby cluster was claimed")
                    return Inside.of_ready(kubeconfig, self._images)
            try:
                kubeconfig = provisioner.create(ref, cancelled=cancelled, tell=self._tell)
                break
            except NoRoom:
                if time.monotonic() > deadline:
                    raise
            if cancelled.is_set():
                raise ProvisionFailed("cancelled while it waited for another cluster to go")
            if not told:
                self._tell("waiting for another cluster to go")
                told = True
            time.sleep(_LOOK_S)
        reach(Failpoint.OPEN_HALF_CREATED)
        self._tell("getting the cluster ready")
        return get_ready(kubeconfig, self._images, cancelled=cancelled)


def _amiss(images: Mapping[str, str]) -> str | None:
    """What is wrong with the images' names, or None."""
    try:
        common_prefix(images.values())
    except ValueError as error:
        return f"images that can be told from others: {error} (BLASTDOOR_CLUSTER_IMAGES)"
    return None if "default" in images else "an image for runtime `default` (BLASTDOOR_CLUSTER_IMAGES)"


def _made(variant: str, host: Host, choices: ClusterChoices, state: Path) -> Provisioner | None:
    """None for Cluster API without a management cluster: nothing is known of it that could be probed."""
    if variant == "kind":
        return KindProvisioner(
            KindHost(
                installation=host.installation, site=host.site, state=state, node_image=choices.node_image,
                docker_host=choices.docker_host, docker=choices.docker, kind=choices.kind,
                max_clusters=choices.at_once, archives=choices.archives,
            )
        )  # fmt: skip
    if choices.capi_kubeconfig is None:
        return None
    return CapiProvisioner(
        CapiHost(
            installation=host.installation, site=host.site, state=state, kubeconfig=choices.capi_kubeconfig,
            namespace=choices.capi_namespace, topology=choices.capi_topology, max_clusters=choices.at_once,
            ready_s=choices.ready_s, development=choices.development,
        )
    )  # fmt: skip
