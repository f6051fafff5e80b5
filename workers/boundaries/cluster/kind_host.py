"""What a host needs to make clusters with kind, each with how to get it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from workers.boundaries.cluster.engine import Engine, EngineFailed
from workers.boundaries.cluster.kind_render import NODE_IMAGE, NODE_IMAGE_WITH, RUNSC, Node
from workers.proc import ProcessFailed, run

KIND_SINCE = (0, 33)
"""The first that merges our patches into the lists of kubeadm's v1beta4, which Kubernetes 1.36 asks for."""
INOTIFY_INSTANCES, INOTIFY_WATCHES = 48, 8192
"""Of one cluster. Measured in an empty one: 28 and 200; the rest is for what runs put into it. Without them systemd or
the kubelet in the node fails half-way, and does not say why (kind.sigs.k8s.io, "Known Issues": too many open files)."""
LEAST_BYTES = 2**30
"""Of memory that nobody uses, to begin a cluster: an empty one takes two thirds of it."""
BRIEF_S = 5.0
"""For questions that are asked all the time: usually a few tenths of a second."""
_VERSION = re.compile(r"\bv(\d+)\.(\d+)\.(\d+)\S*")
_INOTIFY = Path("/proc/sys/fs/inotify")


@dataclass(frozen=True, kw_only=True)
class Needs:
    engine: Engine
    kind: Path
    node_image: str
    node: Node
    max_clusters: int
    inotify: Path = _INOTIFY


def lacks(needs: Needs, *, within_s: float = BRIEF_S) -> Sequence[str]:
    """`within_s`: what does not answer by then counts as absent."""
    return tuple(_lacks(needs, within_s=within_s))


def memory_lacks(meminfo: Path = Path("/proc/meminfo")) -> Sequence[str]:
    """Of this moment: asked before a cluster is begun, and no reason to offer none."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo.read_text(), re.MULTILINE)
    available = int(found[1]) * 1024 if found else 0
    if available >= LEAST_BYTES:
        return ()
    return (f"{LEAST_BYTES >> 20} MiB of free memory: {available >> 20} MiB are left; allow fewer clusters at once",)


def versions(needs: Needs) -> Mapping[str, str]:
    """Of what is there."""
    found = {}
    if (kind := _kind_version(needs.kind, within_s=BRIEF_S)) is not None:
        found["kind"] = ".".join(map(str, kind))
    try:
        found["engine"] = needs.engine.about(within_s=BRIEF_S).version
        if (image := needs.engine.image(needs.node_image, within_s=BRIEF_S)) is not None:
            found["node_image"] = image.id
            if runsc := image.labels.get(RUNSC):
                found["runsc"] = runsc
    except EngineFailed:
        pass  # what is not known is left out
    return found


def inotify_lacks(*, instances: int, watches: int, clusters: int) -> Sequence[str]:
    """Pure. The limits are of a user on the whole host; what others of its programs use is not known."""
    faults = []
    for name, has, each in (
        ("max_user_instances", instances, INOTIFY_INSTANCES),
        ("max_user_watches", watches, INOTIFY_WATCHES),
    ):
        if has < each * clusters:
            wanted = max(512 if each == INOTIFY_INSTANCES else 524_288, each * clusters)
            faults.append(
                f"fs.inotify.{name} of {each * clusters} for {clusters} clusters, it is {has}: "
                f"run `sysctl -w fs.inotify.{name}={wanted}`, and put it into /etc/sysctl.d"
            )
    return faults


def _lacks(needs: Needs, *, within_s: float) -> Iterator[str]:
    version = _kind_version(needs.kind, within_s=within_s)
    since = ".".join(map(str, KIND_SINCE))
    if version is None:
        yield f"kind at {needs.kind}: install {since} or later (kind.sigs.k8s.io), or BLASTDOOR_KIND says where it is"
    elif version < KIND_SINCE:
        yield f"kind {since} or later: {needs.kind} is {'.'.join(map(str, version))}"
    yield from _inotify_lacks(needs)
    if not needs.engine.host.startswith("unix:///"):
        yield f"an engine on this host: BLASTDOOR_DOCKER_HOST is {needs.engine.host}, and no unix:// socket"
    elif not needs.engine.docker.is_file():
        yield f"docker's command at {needs.engine.docker}: install docker-cli, or BLASTDOOR_DOCKER says where it is"
    elif needs.engine.docker.name != "docker":
        yield f"docker's command by its own name: kind looks for `docker` beside {needs.engine.docker}"
    else:
        yield from _engine_lacks(needs, within_s=within_s)


def _engine_lacks(needs: Needs, *, within_s: float) -> Iterator[str]:
    try:
        about = needs.engine.about(within_s=within_s)
        image = needs.engine.image(needs.node_image, within_s=within_s) if needs.node_image else None
    except EngineFailed as error:
        yield f"a container engine that answers ({error}): start it, and let this user reach its socket"
        return
    if not needs.node_image:
        yield "a node image: BLASTDOOR_KIND_NODE_IMAGE names one (cluster_templates/kind/node-image/README.md)"
    elif image is None:
        yield f"node image {needs.node_image} in the engine, which pulls nothing: build or load it there first"
    elif image.labels.get(NODE_IMAGE) != NODE_IMAGE_WITH:
        yield (
            f"gVisor and the API server's policies in node image {needs.node_image}: it has no label "
            f"{NODE_IMAGE}={NODE_IMAGE_WITH} (cluster_templates/kind/node-image/README.md)"
        )
    wanted = needs.node.memory_bytes * needs.max_clusters
    if about.memory_bytes < wanted:
        yield (
            f"memory for {needs.max_clusters} clusters of {needs.node.memory_bytes >> 20} MiB: this host has "
            f"{about.memory_bytes >> 20} MiB; allow fewer (BLASTDOOR_CLUSTERS_AT_ONCE)"
        )


def _inotify_lacks(needs: Needs) -> Sequence[str]:
    try:
        instances, watches = (
            int((needs.inotify / name).read_text()) for name in ("max_user_instances", "max_user_watches")
        )
    except (OSError, ValueError) as error:
        return [f"inotify, whose limits could not be read: {error}"]
    return inotify_lacks(instances=instances, watches=watches, clusters=needs.max_clusters)


def _kind_version(kind: Path, *, within_s: float) -> tuple[int, ...] | None:
    try:
        found = _VERSION.search(run([str(kind), "version"], timeout_s=within_s).text)
    except ProcessFailed:
        return None
    return tuple(int(part) for part in found.groups()) if found else None
