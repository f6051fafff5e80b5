"""Whole clusters by kind: one node, a container of an engine on this host, in a network of its own.

Order of making: the network, whose labels carry the whole reference; the directory; kind, which makes the container;
the container's limits. Undoing goes by names and labels alone, from any process, in the other direction, and needs no
kind: what still makes the cluster is ended first. What the engine says exists is what exists.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import structlog

from service.core.boundary import BoundaryKind, BoundaryRef, Cancellation
from service.core.controls import Limits
from service.core.errors import NotYetDestroyed, ProvisionFailed
from workers.boundaries.cluster.engine import LOAD_S, Engine, EngineFailed
from workers.boundaries.cluster.kind_host import Needs, lacks, memory_lacks, versions
from workers.boundaries.cluster.kind_places import MARK, Place, Places, kill_makers
from workers.boundaries.cluster.kind_render import (
    LABELS,
    PREFIX,
    STANDBY,
    VARIANT,
    Node,
    is_installation,
    is_name,
    labels,
    left_for_a_run,
    network_name,
    read_labels,
    read_network_name,
    reason_of,
    render_config,
    render_limits,
    render_network_options,
    render_wall,
    step_of,
    unlabelled,
)
from workers.boundaries.cluster.provisioners import NameTaken, NoRoom, Tell
from workers.boundaries.cluster.stranger import answer
from workers.proc import ProcessFailed, follow

log = structlog.get_logger()

_PATIENT_S = 20.0
_CREATE_S = 300.0
_CLEAR_S = 20.0
_CLEAR_AGAIN_S = 1.0
_QUIET_S = 2.0
_LOOK_S = 0.5
_SLACK_S = 60.0
"""For what the engine is asked before and after kind."""
_ANSWERS_S = 3.0


@dataclass(frozen=True, kw_only=True)
class KindHost:
    """What the provisioner is told. `docker_host`: the engine's socket, on this host; `node_image`: as the engine knows
    it, best by digest or id; `state`: a directory of this worker's host for this installation and site alone;
    `max_clusters`: on this engine at once, whosever they are; `archives`: OCI archives that each node is given, beyond
    what is in its image."""

    installation: str
    site: str
    state: Path
    node_image: str
    docker_host: str = "unix:///var/run/docker.sock"
    docker: Path = Path("/usr/bin/docker")
    kind: Path = Path("/usr/bin/kind")
    max_clusters: int = 2
    archives: tuple[Path, ...] = ()
    node: Node = field(default_factory=Node)

    def __post_init__(self) -> None:
        if not is_installation(self.installation):
            raise ValueError("installation should be letters, digits, - and _")
        if not self.site.isprintable():
            raise ValueError("site should be printable text")
        if not self.state.is_absolute():
            raise ValueError("state should be an absolute path")


class KindProvisioner:
    """Implements `workers.boundaries.cluster.provisioners.Provisioner`. Keeps nothing but what this host lacked when it
    was last asked."""

    def __init__(self, host: KindHost) -> None:
        self._host = host
        self._places = Places(state=host.state)
        self._engine = Engine(docker=host.docker, host=host.docker_host, home=self._places.home)
        self._needs = Needs(
            engine=self._engine, kind=host.kind, node_image=host.node_image, node=host.node,
            max_clusters=host.max_clusters,
        )  # fmt: skip
        self._resisted: set[str] = set()

    @property
    def variant(self) -> str:
        return VARIANT

    @property
    def host(self) -> KindHost:
        return self._host

    @property
    def places(self) -> Places:
        return self._places

    @property
    def engine(self) -> Engine:
        return self._engine

    def lacks(self) -> Sequence[str]:
        return lacks(self._needs)

    def versions(self) -> Mapping[str, str]:
        return versions(self._needs)

    def too_small_for(self, limits: Limits) -> str | None:
        left = left_for_a_run(self._host.node)
        if limits.memory <= left:
            return None
        return f"{limits.memory >> 20} MiB of memory: a cluster's node has {left >> 20} MiB left for a run"

    def create(self, ref: BoundaryRef, *, cancelled: Cancellation, tell: Tell) -> Path:
        """When it returns the API server answers; the node may still be getting ready. It waits for no place: whoever
        asks may be given one by other means. Raises NoRoom at once, NameTaken, ProvisionFailed."""
        self.accept(ref)
        if cancelled.is_set():
            raise ProvisionFailed("not wanted any more, before anything was made")
        if missing := [*lacks(self._needs, within_s=_PATIENT_S), *memory_lacks()]:
            raise ProvisionFailed("this host cannot make a cluster now: " + "; ".join(missing))
        try:
            self._places.make()
            self._take_place(ref)
        except (EngineFailed, OSError) as error:
            raise ProvisionFailed(f"the cluster's network could not be made: {error}") from error
        try:
            return self._make(ref, cancelled, tell)
        except BaseException as error:
            with suppress(NotYetDestroyed):  # the reaper has the reference
                self.destroy(ref)
            if isinstance(error, EngineFailed | ProcessFailed | OSError):
                raise ProvisionFailed(f"the cluster could not be made: {error}") from error
            raise

    def longest_s(self) -> float:
        return _PATIENT_S + _CREATE_S + 2 * LOAD_S * len(self._host.archives) + _CLEAR_S + _SLACK_S

    def discover(self) -> Iterator[BoundaryRef]:
        """From the labels of networks. What lost its network, or its directory, is found by its name: those are listed
        first, so that whatever is listed had its network by then. Raises EngineFailed."""
        names = {place.name for place in self._places.all()}
        for container in self._engine.containers():
            said = read_network_name(container.network)
            if said is not None and said[1] == self._host.installation:
                names.add(said[0])
        elsewhere = set()
        for network in self._networks():
            ref = read_labels(network)
            if ref is not None and ref.site == self._host.site:
                names.discard(ref.name)
                yield self._as_claimed(ref)
            elif ref is not None:
                elsewhere.add(ref.name)
        for name in sorted(names - elsewhere):
            ref = self._places.place(name).ref()
            lost = unlabelled(name, installation=self._host.installation, site=self._host.site)
            yield self._as_claimed(lost if ref is None or ref.name != name else ref)

    def destroy(self, ref: BoundaryRef) -> None:
        """Waits for the engine to be done with it, which takes seconds; hardly at all for what has resisted before,
        since the reaper comes back to it."""
        if ref.installation != self._host.installation or not is_name(ref.name):
            return
        for name in [ref.name, *(place.name for place in self._places.claimed_for(ref))]:
            if self._is_still(ref, name):
                self.clear(name)

    def accept(self, ref: BoundaryRef) -> None:
        """Raises ProvisionFailed for what is not of this variant, installation and site."""
        if (ref.kind, ref.variant) != (BoundaryKind.CLUSTER, VARIANT):
            raise ProvisionFailed(f"{ref.name} is not for this provisioner")
        if (ref.installation, ref.site) != (self._host.installation, self._host.site):
            raise ProvisionFailed(f"{ref.name} is not for this installation and site")

    def has_room(self) -> bool:
        """Whether another cluster is allowed. Raises EngineFailed."""
        return self._all_there() < self._host.max_clusters

    def image_id(self) -> str | None:
        """Of the node image; None when the engine does not have it. Raises EngineFailed."""
        image = self._engine.image(self._host.node_image)
        return None if image is None else image.id

    def answers(self, kubeconfig: Path) -> bool:
        """Whether the API server says that it is ready."""
        return answer(kubeconfig, "/readyz", within_s=_ANSWERS_S) == 200  # one of the three that it answers to anyone

    def _is_still(self, ref: BoundaryRef, name: str) -> bool:
        """A standby cluster is its own until it is claimed. To end one is to claim it for itself first, so that no run
        does: also while it is being made, since it may be ready before it is gone. Should it resist, its time is
        over for the reaper. Raises NotYetDestroyed."""
        place = self._places.place(name)
        if name == ref.name and (ref.tenant == STANDBY or place.standby.exists()):
            try:
                place.claim(ref.model_copy(update={"expires_at": min(ref.expires_at, datetime.now(UTC))}))
            except OSError as error:
                raise NotYetDestroyed(f"{name} could not be kept from runs that may claim it: {error}") from error
        owner = place.claimed_by()
        return owner is None or owner.name == ref.name

    def _as_claimed(self, ref: BoundaryRef) -> BoundaryRef:
        owner = self._places.place(ref.name).claimed_by()
        return ref if owner is None or owner.installation != ref.installation else owner

    def _all_there(self) -> int:
        """Clusters on this engine, whosever they are. Raises EngineFailed."""
        return len(self._engine.networks(labels=_OF_KIND, read=()))

    def _networks(self) -> list[Mapping[str, str]]:
        mine = {PREFIX + "managed": "true", PREFIX + "installation": self._host.installation}
        return [one.labels for one in self._engine.networks(labels=mine | _OF_KIND, read=LABELS)]

    def _take_place(self, ref: BoundaryRef) -> None:
        """Under the cap the network is made: from then on it counts. The lock is of this host's state alone: another
        installation may have looked when we did, so that whoever then finds too many takes its own back. Raises NoRoom,
        NameTaken, EngineFailed, OSError."""
        most = self._host.max_clusters
        full = NoRoom(f"there are {most} clusters on this host, and no more are allowed at once")
        with self._places.locked("cap"):
            if self._all_there() >= most:
                raise full
            name = network_name(ref.name, ref.installation)
            if self._engine.has_network(name):
                raise NameTaken(f"there is a network {name} already")
            self._engine.create_network(name, labels=labels(ref), options=render_network_options())
            if self._all_there() > most:
                self._engine.remove_network(name)
                raise full

    def _make(self, ref: BoundaryRef, cancelled: Cancellation, tell: Tell) -> Path:
        """Raises ProvisionFailed, EngineFailed, ProcessFailed, OSError."""
        about, image = self._engine.about(), self.image_id()
        if image is None:
            raise ProvisionFailed(f"the engine does not have node image {self._host.node_image} any more")
        place = self._places.place(ref.name)
        place.make(ref)
        config = render_config(self._host.node, host_memory_bytes=about.memory_bytes, cgroup_v1=about.cgroup_v1)
        place.config.write_text(config)
        self._run_kind(ref, place, image, cancelled, tell)
        for container in self._containers(ref.name):
            self._engine.limit(container, render_limits(self._host.node))
            self._engine.execute(container, render_wall())
            for archive in self._host.archives:
                self._engine.load(container, archive)
        place.kubeconfig.chmod(0o600)
        if cancelled.is_set():
            raise ProvisionFailed("cancelled when the cluster was there")
        return place.kubeconfig

    def _run_kind(self, ref: BoundaryRef, place: Place, image: str, cancelled: Cancellation, tell: Tell) -> None:
        network = network_name(ref.name, ref.installation)
        environment = self._engine.environment | {
            MARK: network,
            "KIND_EXPERIMENTAL_PROVIDER": "docker",
            "KIND_EXPERIMENTAL_DOCKER_NETWORK": network,
        }
        argv = [str(self._host.kind), "create", "cluster", f"--name={ref.name}", f"--image={image}"]
        argv += [f"--config={place.config}", f"--kubeconfig={place.kubeconfig}", "--wait=0s"]

        def tell_step(line: str) -> None:
            if step := step_of(line):
                tell(step)

        left_s = (ref.expires_at - datetime.now(UTC)).total_seconds()
        timeout_s = min(_CREATE_S, max(left_s, 0.0))
        started = time.monotonic()
        ended = follow(argv, env=environment, timeout_s=timeout_s, tell=tell_step, unwanted=cancelled.is_set)
        if ended.status is None and cancelled.is_set():
            raise ProvisionFailed("cancelled while the cluster was being made")
        if ended.status is None:
            raise ProvisionFailed(f"the cluster was not there within {timeout_s:.0f} s")
        if ended.status != 0:
            log.warning("kind failed", boundary=ref.name, status=ended.status, said=ended.said[-2000:])
            raise ProvisionFailed(f"kind did not make the cluster: {reason_of(ended.said)}")
        log.info("cluster made", boundary=ref.name, seconds=round(time.monotonic() - started, 1))

    def _containers(self, name: str) -> list[str]:
        """By kind's label, and by the name of their network: another installation's may be called the same."""
        network = network_name(name, self._host.installation)
        return [one.id for one in self._engine.containers() if (one.cluster, one.network) == (name, network)]

    def clear(self, name: str) -> None:
        """End the cluster that kind calls so, whosever it is: again and again until a look finds nothing, and of one
        that was half-made every look for a while, since the engine finishes what a killed process asked of it. What
        comes later still has its name, by which it is discovered. Raises NotYetDestroyed."""
        began = seen = time.monotonic()
        wait_s = _CLEAR_AGAIN_S if name in self._resisted else _CLEAR_S
        quiet_s = 0.0 if self._places.place(name).kubeconfig.exists() else _QUIET_S
        while (why := self._cleared(name)) is not None or time.monotonic() - seen < quiet_s:
            if why is not None:
                seen = time.monotonic()
                if seen - began > wait_s:
                    self._resisted.add(name)
                    raise NotYetDestroyed(f"{name}: {why}")
            time.sleep(_LOOK_S)
        self._resisted.discard(name)

    def _cleared(self, name: str) -> str | None:
        """-> None when nothing is left, or why not."""
        network, place = network_name(name, self._host.installation), self._places.place(name)
        kill_makers(network)
        try:
            for container in self._containers(name):
                self._engine.remove_container(container)
            place.remove()
            self._engine.remove_network(network)
            left = [*self._containers(name), *([network] if self._engine.has_network(network) else ())]
        except (EngineFailed, OSError) as error:
            return str(error)
        return f"there still is {', '.join(left)}" if left or place.exists else None


_OF_KIND = {PREFIX + "kind": BoundaryKind.CLUSTER.value, PREFIX + "variant": VARIANT}
