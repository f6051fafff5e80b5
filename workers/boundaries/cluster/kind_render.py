"""PURE: what kind and the engine are told of a cluster. Reviewers read it in `cluster_templates/kind/`, and as a whole
in the golden file of the tests.

Nothing of a run's bundle, scenario or tenant is in it: two clusters differ by their names and labels alone.
"""

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import yaml

from service.core.boundary import STANDBY_TENANT, BoundaryKind, BoundaryRef, tenant_hash
from workers.kube.manifests import FOLDER, Manifest, filled

VARIANT = "kind"
STANDBY = STANDBY_TENANT
"""In place of a tenant: no run has it yet."""
PREFIX = "dev.blastdoor."
"""Of labels on what the engine has (docs.docker.com, "Docker object labels": a domain of ours, backwards)."""
NODE_IMAGE = PREFIX + "node-image"
"""On a node image that has what our configuration names, the number of what it has to have (node-image/Dockerfile)."""
NODE_IMAGE_WITH = "1"
RUNSC = PREFIX + "runsc"
"""On a node image, the release of gVisor that is in it: 20260905."""
LABELS = tuple(
    PREFIX + word
    for word in ("installation", "kind", "variant", "site", "tenant-hash", "run", "fence", "expires-at", "created-at")
)
_NAME = re.compile(r"bd-([0-9a-f]{32})-f([0-9]{1,18})")
_NETWORK = re.compile(r"(bd-[0-9a-f]{32}-f[0-9]{1,18})\.([A-Za-z0-9_-]{1,64})")
_INSTALLATION = re.compile(r"[A-Za-z0-9_-]{1,64}")
_RUN_ID = re.compile(r"run_[0-9a-f]{32}")
_COMPLAINT = re.compile(r"\b(error|failed|unable|cannot)\b.*:", re.IGNORECASE)
_PATCHES = ("kubeadm", "init", "kubelet")
_CONTAINERD = ("containerd-v2", "containerd-v3")
_OUTSIDE_PODS = 256 * 2**20
"""Of a node's memory, for its systemd, containerd and kubelet: they are in no pod."""
_OTHER_PODS = 640 * 2**20
"""What all pods but the run's ask for: 290 MiB those of the control plane and of the network, the rest is for ours with
their overhead, and the overhead of the run's own."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """How large a cluster's one node is, which is a container of the engine. `memory_bytes`: with all pods and the
    control plane; `pids`: tasks in all; `pod_pids`: tasks of one pod; `cpus`: None shares the host's."""

    memory_bytes: int = 3 * 2**30
    pids: int = 4096
    pod_pids: int = 1024
    cpus: float | None = None


def left_for_a_run(node: Node) -> int:
    """-> the most memory that a run's pod may ask for, in bytes: a larger one is placed on no such node."""
    return node.memory_bytes - _OUTSIDE_PODS - _OTHER_PODS


def is_installation(text: str) -> bool:
    """It can stand in the name of a network."""
    return _INSTALLATION.fullmatch(text) is not None


def is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None


def network_name(name: str, installation: str) -> str:
    """A container keeps the name of its network: where that was lost, it still says whose the container is."""
    return f"{name}.{installation}"


def read_network_name(text: str) -> tuple[str, str] | None:
    """-> name of the boundary and installation; None for what is no network of ours."""
    found = _NETWORK.fullmatch(text)
    return (found[1], found[2]) if found else None


def labels(ref: BoundaryRef) -> dict[str, str]:
    """The whole reference; the tenant is a hash, since whoever may ask the engine reads it."""
    made = {
        "managed": "true",
        "installation": ref.installation,
        "kind": ref.kind.value,
        "variant": ref.variant,
        "site": ref.site,
        "tenant-hash": tenant_hash(ref.installation, ref.tenant),
        "run": ref.run_id,
        "fence": str(ref.fence),
        "expires-at": str(math.ceil(ref.expires_at.timestamp())),
        "created-at": "" if ref.created_at is None else str(int(ref.created_at.timestamp())),
    }
    return {PREFIX + word: value for word, value in made.items()}


def read_labels(found: Mapping[str, str]) -> BoundaryRef | None:
    """The reference that stands on a network; None when there is none."""
    said = {key.removeprefix(PREFIX): value for key, value in found.items() if key.startswith(PREFIX)}
    if said.get("variant") != VARIANT or not _RUN_ID.fullmatch(said.get("run", "")):
        return None
    try:
        installation, tenant, created = said["installation"], said["tenant-hash"], said.get("created-at", "")
        return BoundaryRef(
            installation=installation,
            kind=BoundaryKind(said["kind"]),
            variant=VARIANT,
            site=said["site"],
            tenant=STANDBY if tenant == tenant_hash(installation, STANDBY) else tenant,
            run_id=said["run"],
            fence=int(said["fence"]),
            expires_at=datetime.fromtimestamp(int(said["expires-at"]), UTC),
            created_at=datetime.fromtimestamp(int(created), UTC) if created else None,
        )
    except (KeyError, ValueError, OverflowError):
        return None


def unlabelled(name: str, *, installation: str, site: str) -> BoundaryRef:
    """What a name alone says; long expired, so that whoever reaps takes it when no run claims it."""
    found = _NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"{name!r} is no boundary's name")
    return BoundaryRef(
        installation=installation, kind=BoundaryKind.CLUSTER, variant=VARIANT, site=site, tenant="",
        run_id=f"run_{found[1]}", fence=int(found[2]), expires_at=datetime.fromtimestamp(0, UTC),
    )  # fmt: skip


def render_network_options() -> Sequence[str]:
    """A bridge of the cluster's own, IPv4 alone. What is in it can be reached from this host, but gets no address that
    anyone else could answer to."""
    return ("com.docker.network.bridge.enable_ip_masquerade=false",)


def render_config(node: Node, *, host_memory_bytes: int, cgroup_v1: bool) -> str:
    """-> the YAML that `kind create cluster --config` reads. Raises ValueError for a node larger than its host."""
    reserved = host_memory_bytes - node.memory_bytes + _OUTSIDE_PODS
    if reserved < _OUTSIDE_PODS:
        raise ValueError(f"a node of {node.memory_bytes} bytes on a host of {host_memory_bytes}")
    cluster, kubeadm, init, kubelet = (_template(name) for name in ("cluster", *_PATCHES))
    kubelet = filled(kubelet, {"pod_pids": node.pod_pids, "not_the_nodes": str(reserved)})
    if cgroup_v1:  # else it stays the kubelet's own business to refuse it
        kubelet["failCgroupV1"] = False
    cluster["kubeadmConfigPatches"] = [yaml.safe_dump(patch, sort_keys=False) for patch in (kubeadm, init, kubelet)]
    cluster["containerdConfigPatches"] = [(FOLDER / "kind" / f"{name}.toml").read_text("utf-8") for name in _CONTAINERD]
    return yaml.safe_dump(cluster, sort_keys=False)


def render_limits(node: Node) -> Sequence[str]:
    """-> options of `docker update`: what the node's container may have of the host. It is not started again: what
    came back would be a cluster without its wall (`render_wall`), and nobody's."""
    limits = [f"--memory={node.memory_bytes}", f"--memory-swap={node.memory_bytes}", f"--pids-limit={node.pids}"]
    return [*limits, "--restart=no"] if node.cpus is None else [*limits, "--restart=no", f"--cpus={node.cpus:g}"]


def render_wall() -> Sequence[str]:
    """-> what is executed in a node to set the rules that hold beside network policy."""
    cluster = _template("cluster")
    return ["sh", "-c", (FOLDER / "kind" / "wall.sh").read_text("utf-8"), "sh", cluster["networking"]["podSubnet"]]


def step_of(line: str) -> str | None:
    """What kind is about to do, in plain words: " • Preparing nodes 📦  ..." is "preparing nodes"."""
    if not line.startswith(" • "):
        return None
    said = "".join(char for char in line[3:] if unicodedata.category(char) not in ("So", "Mn", "Cf", "Sk"))
    said = re.sub(r"\s*\([^()]*\)", "", said.removesuffix("...").rstrip(" .")).strip()  # the image: an id, of no use
    return said[:1].lower() + said[1:] if said else None


def reason_of(said: str) -> str:
    """Why kind failed, from the last that it said: what it tried, and the last complaint of the program that it tried
    it with; at most 600 characters."""
    lines = [line.strip() for line in said.partition("\nStack Trace:")[0].splitlines() if line.strip()]
    tried = next((line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")), "")
    complaints = [line for line in lines if _COMPLAINT.search(line) and not line.startswith("ERROR: ")]
    last = complaints[-1] if complaints else "" if tried else (lines or ["it did not say why"])[-1]
    tried = re.sub(r'command "(\S+ \S+) [^"]*"', r"`\1`", tried)
    return ": ".join(part[:300] for part in (tried, last) if part)


def _template(name: str) -> Manifest:
    loaded = yaml.safe_load((FOLDER / "kind" / f"{name}.yaml").read_text("utf-8"))
    assert isinstance(loaded, dict)
    return loaded
