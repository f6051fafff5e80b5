"""Choosing the wall. Who the tenant is and what the code needs give requirements; the lowest-ranked boundary that a
live worker can build and whose guarantees cover them wins; none means refusal that says what was missing.

A pure function of its arguments: the same question always has the same answer, and the answer explains itself.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from service.core.boundary import BoundaryKind, Capabilities, ControlPlane, Guarantees, Kernel, Nodes
from service.core.controls import AppliedControls, Isolation, Need
from service.core.errors import PlacementRefused
from service.core.tenancy import Tenant, Trust


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Offer(_Frozen):
    """One row of the table in docs/architecture.md. `rank`: what it costs the platform; lower is preferred."""

    kind: BoundaryKind
    variant: str = ""
    rank: int
    guarantees: Guarantees

    @property
    def boundary(self) -> str:
        return f"{self.kind}/{self.variant}" if self.variant else str(self.kind)


def _offer(kind: BoundaryKind, variant: str, rank: int, kernel: Kernel, nodes: Nodes, plane: ControlPlane) -> Offer:
    return Offer(
        kind=kind, variant=variant, rank=rank, guarantees=Guarantees(kernel=kernel, nodes=nodes, control_plane=plane)
    )


_NS, _CL = BoundaryKind.NAMESPACE, BoundaryKind.CLUSTER
OFFERS: tuple[Offer, ...] = (
    _offer(_NS, "runc", 10, Kernel.SHARED, Nodes.SHARED, ControlPlane.SHARED),
    _offer(BoundaryKind.GVISOR, "", 30, Kernel.SANDBOXED, Nodes.SHARED, ControlPlane.ISOLATED),
    _offer(_NS, "gvisor", 40, Kernel.SANDBOXED, Nodes.SHARED, ControlPlane.SHARED),
    _offer(BoundaryKind.MICROVM, "", 50, Kernel.DEDICATED, Nodes.SHARED, ControlPlane.ISOLATED),
    _offer(_NS, "kata-qemu", 60, Kernel.DEDICATED, Nodes.SHARED, ControlPlane.SHARED),
    _offer(_NS, "kata-fc", 60, Kernel.DEDICATED, Nodes.SHARED, ControlPlane.SHARED),
    _offer(_CL, "kind", 70, Kernel.SANDBOXED, Nodes.SHARED, ControlPlane.DEDICATED),
    _offer(_CL, "capi", 80, Kernel.DEDICATED, Nodes.DEDICATED, ControlPlane.DEDICATED),
)
_LEVELS: dict[str, type[StrEnum]] = {"kernel": Kernel, "nodes": Nodes, "control_plane": ControlPlane}
AFFINITY_RANK = 10
AFFINITY_SUFFIX = "+affinity"


class Policy(_Frozen):
    """The operator's file. It can only tighten: add floors, demand versions, re-rank. There is no way to weaken.

    `minimum_versions`: boundary to the oldest version of each thing that builds it (`gvisor: {runsc: "20260901"}`, by
    the names that GET /v1/capabilities shows), below which it is no candidate; `floors`: guarantee to minimum, for
    every run of that trust; `ranks`: boundary to rank.
    """

    minimum_versions: Mapping[str, Mapping[str, str]] = {}
    floors: Mapping[Trust, Mapping[str, str]] = {}
    ranks: Mapping[str, int] = {}

    @model_validator(mode="after")
    def _about_what_exists(self) -> "Policy":
        """A misspelt rule is an error when it is read: one that silently did nothing would be a weaker policy."""
        known = {offer.boundary for offer in OFFERS}
        for boundary in {*self.minimum_versions, *self.ranks} - known:
            raise ValueError(f"{boundary} is no boundary; there are: {', '.join(sorted(known))}")
        for floors in self.floors.values():
            for name, minimum in floors.items():
                if name not in _LEVELS or minimum not in list(_LEVELS[name]):
                    raise ValueError(f"{name} >= {minimum} is no guarantee")
        return self

    @property
    def digest(self) -> str:
        return "sha256:" + hashlib.sha256(self.model_dump_json().encode()).hexdigest()


class Requirements(_Frozen):
    """The least that will do. `abilities` are further words that a boundary must have among its capabilities."""

    kernel: Kernel = Kernel.SHARED
    nodes: Nodes = Nodes.SHARED
    control_plane: ControlPlane = ControlPlane.SHARED
    abilities: tuple[str, ...] = ()

    def shown(self) -> dict[str, Any]:
        """Only what is required beyond nothing, as the run's JSON has it."""
        weakest = Requirements()
        rows = {name: str(getattr(self, name)) for name in _LEVELS if getattr(self, name) != getattr(weakest, name)}
        return rows | ({"abilities": list(self.abilities)} if self.abilities else {})


class Rejected(_Frozen):
    boundary: str
    missing: str


class Placement(_Frozen):
    """The decision, with all that explains it to its owner."""

    boundary: str
    guarantees: Guarantees
    requirements: Mapping[str, Any]
    why: tuple[str, ...]
    rejected: tuple[Rejected, ...]
    policy: str
    node_group: str | None = None
    """The tenant's, as it was when the run was placed: what becomes of the tenant later moves no queued run."""

    @property
    def queue(self) -> str:
        """What its run waits in: its boundary, and for a node group one of that group's own."""
        return self.boundary if self.node_group is None else f"{self.boundary}/{self.node_group}"

    @property
    def kind(self) -> BoundaryKind:
        return BoundaryKind(self.boundary.removesuffix(AFFINITY_SUFFIX).split("/")[0])

    @property
    def variant(self) -> str:
        return self.boundary.removesuffix(AFFINITY_SUFFIX).partition("/")[2]


def queues(capabilities: Iterable[Capabilities]) -> list[str]:
    """What a worker with these rows may claim from: `namespace/runc`, and for each node group that it reaches
    `namespace/runc+affinity/blue`."""
    found = []
    for row in capabilities:
        if row.available:
            found += [row.boundary, *(f"{row.boundary}{AFFINITY_SUFFIX}/{group}" for group in sorted(row.node_groups))]
    return found


def boundary_of(queue: str) -> str:
    """Without the node group, which is a name of the operator's and no word of ours."""
    boundary, suffix, _ = queue.partition(AFFINITY_SUFFIX)
    return boundary + suffix


def strength(level: StrEnum) -> int:
    """0 is the weakest: the place in its enum, which is written weakest first."""
    return list(type(level)).index(level)


def require(tenant: Tenant, controls: AppliedControls, policy: Policy) -> tuple[Requirements, tuple[str, ...]]:
    """-> the requirements, and one sentence for each thing that raised them."""
    levels: dict[str, StrEnum] = {name: next(iter(enum)) for name, enum in _LEVELS.items()}
    abilities: list[str] = []
    why: list[str] = []

    def raise_to(name: str, level: StrEnum, reason: str) -> None:
        why.append(f"{reason}: {_words(name)} >= {level}")
        if strength(level) > strength(levels[name]):
            levels[name] = level

    untrusted = tenant.trust is Trust.UNTRUSTED or controls.code is Trust.UNTRUSTED
    if tenant.trust is Trust.UNTRUSTED:
        raise_to("kernel", Kernel.SANDBOXED, f"tenant {tenant.name} is untrusted")
    elif untrusted:
        raise_to("kernel", Kernel.SANDBOXED, "the controls call this code untrusted")
    if tenant.affinity:
        raise_to("nodes", Nodes.DEDICATED, f"tenant {tenant.name} has affinity to node group {tenant.affinity}")
    if controls.isolation is Isolation.HARD:
        raise_to("kernel", Kernel.SANDBOXED, "isolation hard")
        raise_to("control_plane", ControlPlane.ISOLATED, "isolation hard")
    if controls.isolation is Isolation.DEDICATED_CLUSTER:
        raise_to("control_plane", ControlPlane.DEDICATED, "isolation dedicated-cluster")
    if Need.KUBERNETES_API in controls.needs:
        raise_to("control_plane", ControlPlane.DEDICATED, "the code needs a Kubernetes API")
        abilities.append(Need.KUBERNETES_API.value)
    if Need.PRIVILEGED in controls.needs:
        raise_to("kernel", Kernel.DEDICATED, "the code needs privileges")
        raise_to("control_plane", ControlPlane.ISOLATED, "the code needs privileges")
        abilities.append(Need.PRIVILEGED.value)
    if controls.network.mode == "allow":
        abilities.append("egress-allow-list")
        why.append("network allow: capability egress-allow-list")
    for name, minimum in policy.floors.get(Trust.UNTRUSTED if untrusted else Trust.TRUSTED, {}).items():
        raise_to(name, _LEVELS[name](minimum), "the operator's policy")
    if not why:
        why.append(f"tenant {tenant.name} is trusted and nothing more was asked")
    return Requirements(**levels, abilities=tuple(abilities)), tuple(why)


def choose(
    tenant: Tenant,
    controls: AppliedControls,
    policy: Policy,
    capabilities: Iterable[Capabilities],
    *,
    runtime: str = "default",
) -> Placement:
    """The lowest-ranked boundary that covers the requirements, or PlacementRefused with `requirements`, `candidates`.

    `capabilities` are those of workers that are alive now; the same boundary may be offered by several.
    """
    requirements, why = require(tenant, controls, policy)
    offered: dict[str, list[Capabilities]] = {}
    for capability in capabilities:
        offered.setdefault(capability.boundary, []).append(capability)
    judged: list[tuple[int, str, Guarantees, str | None]] = []
    group_of: dict[str, str | None] = {}
    for offer in OFFERS:
        rank = policy.ranks.get(offer.boundary, offer.rank)
        workers = offered.get(offer.boundary, [])
        for boundary, promised, place in _variants(offer, tenant):
            guarantees = measured(promised, workers)
            missing = _missing(offer, guarantees, place, requirements, policy, workers, runtime)
            judged.append((rank + (AFFINITY_RANK if place else 0), boundary, guarantees, missing))
            group_of[boundary] = place
    fitting = sorted((rank, boundary) for rank, boundary, _, missing in judged if missing is None)
    if not fitting:
        candidates = [{"boundary": boundary, "missing": missing} for _, boundary, _, missing in judged]
        would_do = sorted(
            (rank, name, lacks) for rank, name, given, lacks in judged if not _uncovered(given, requirements)
        )
        wanted = ", ".join(f"{_words(k)} >= {v}" for k, v in requirements.shown().items() if k != "abilities")
        wanted = ", ".join(filter(None, [wanted, *(f"capability {a}" for a in requirements.abilities)])) or "nothing"
        hint = f"; the nearest is {would_do[0][1]}: {would_do[0][2]}" if would_do else ""
        detail = f"no boundary that can be built now gives what this run requires ({wanted}){hint}"
        extra = {"requirements": requirements.shown(), "candidates": candidates, "why": list(why)}
        raise PlacementRefused(detail, extra=extra)
    best_rank, best = fitting[0]
    rejected = [
        Rejected(boundary=boundary, missing=missing or f"nothing; {best} ranks before it ({best_rank} < {rank})")
        for rank, boundary, _, missing in judged
        if boundary != best
    ]
    return Placement(
        boundary=best,
        guarantees=next(g for _, boundary, g, _ in judged if boundary == best),
        requirements=requirements.shown(),
        why=why,
        rejected=tuple(rejected),
        policy=policy.digest,
        node_group=group_of[best],
    )


def _variants(offer: Offer, tenant: Tenant) -> list[tuple[str, Guarantees, str | None]]:
    """The offer as it stands, and for a namespace also on the tenant's own node group."""
    rows: list[tuple[str, Guarantees, str | None]] = [(offer.boundary, offer.guarantees, None)]
    if offer.kind is BoundaryKind.NAMESPACE and tenant.affinity:
        dedicated = offer.guarantees.model_copy(update={"nodes": Nodes.DEDICATED})
        rows.append((offer.boundary + AFFINITY_SUFFIX, dedicated, tenant.affinity))
    return rows


def measured(promised: Guarantees, workers: Sequence[Capabilities]) -> Guarantees:
    """The weakest of what is promised and what any worker that may claim the run has measured: no overstatement."""
    found = [promised, *(w.guarantees for w in workers if w.available and w.guarantees is not None)]
    return Guarantees(**{name: min((getattr(g, name) for g in found), key=strength) for name in _LEVELS})


def _missing(
    offer: Offer, guarantees: Guarantees, node_group: str | None, requirements: Requirements, policy: Policy,
    workers: Sequence[Capabilities], runtime: str,
) -> str | None:  # fmt: skip
    """The first thing this candidate lacks, guarantees before availability; None when it will do."""
    if lacking := _uncovered(guarantees, requirements):
        return lacking
    if not workers:
        return f"no live worker offers {offer.boundary}"
    reasons = [_worker_lacks(worker, node_group, requirements, policy, runtime) for worker in workers]
    return None if None in reasons else reasons[0]


def _worker_lacks(
    worker: Capabilities, node_group: str | None, requirements: Requirements, policy: Policy, runtime: str
) -> str | None:
    if not worker.available:
        return "no live worker can build it: " + ("; ".join(worker.missing) or "its probe failed")
    for name, minimum in policy.minimum_versions.get(worker.boundary, {}).items():
        version = worker.versions.get(name, "")
        if not version_at_least(version, minimum):
            return f"{name} {minimum} or later, by policy (found {version or 'none'})"
    for ability in requirements.abilities:
        if ability not in worker.abilities:
            return f"capability {ability}"
    if node_group is not None and node_group not in worker.node_groups:
        return f"no live worker has a node in group {node_group} that is kept for it"
    if runtime not in worker.runtimes:
        offered = ", ".join(sorted(worker.runtimes)) or "none"
        return f"runtime {runtime} (offered: {offered})"
    return None


def _uncovered(guarantees: Guarantees, requirements: Requirements) -> str | None:
    for name in _LEVELS:
        if strength(getattr(guarantees, name)) < strength(getattr(requirements, name)):
            return f"{_words(name)} >= {getattr(requirements, name)}"
    return None


def version_at_least(version: str, minimum: str) -> bool:
    """Compare the numbers in two version strings, left to right; a version without any number is older than all."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", text, re.ASCII)]

    found = numbers(version)
    return bool(found) and found >= numbers(minimum)


def _words(name: str) -> str:
    return name.replace("_", " ")
