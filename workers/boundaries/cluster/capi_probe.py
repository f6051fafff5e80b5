"""Whether a management cluster could make what the templates ask for, found by asking it: nothing is made."""

from collections.abc import Iterator, Sequence

from workers.boundaries.cluster.capi_api import LEASES, SECRETS, Management, Resource, Right
from workers.boundaries.cluster.capi_render import GROUP, class_of, group_of, pretended
from workers.kube import Manifest

_RBAC = "cluster_templates/capi/rbac has what the engine needs"
_SHOWN = 5


def lacking(
    management: Management, topology: Sequence[Manifest], *, namespace: str, development: bool
) -> Iterator[str]:
    """What is missing, each with its remedy. `namespace`: for the clusters; `development`: of `no_machines`. Raises
    ClusterError."""
    groups = management.groups()
    if GROUP not in groups:
        yield "Cluster API in the management cluster: `clusterctl init --infrastructure PROVIDER` puts it there"
        return
    kinds: list[Resource] = []
    for one in topology:
        if (found := management.kinds(one["apiVersion"]).get(one["kind"])) is not None:
            kinds.append(found)
        elif served := groups.get(group_of(one)):
            yield (
                f"{one['kind']} of {one['apiVersion']}, which the topology asks for: the management cluster has "
                f"{', '.join(served)}. Bring its providers up to date, or write the topology for these"
            )
        else:
            yield f"a provider that knows {one['kind']} of {one['apiVersion']}: `clusterctl init` puts it there"
    if len(kinds) < len(topology):
        return
    if refused := management.refused(_rights(kinds, management.every_kind(), namespace)):
        shown = ", ".join(map(str, refused[:_SHOWN])) + (" ..." if len(refused) > _SHOWN else "")
        yield f"the right to {shown}: {_RBAC}"
    elif (wanted := class_of(topology)) is not None:
        yield from _lacking_class(management, topology[-1], wanted[0], wanted[1] or namespace, development)


def no_machines(documents: Sequence[Manifest], *, development: bool) -> str | None:
    """What is wrong where nodes would be no machines of their own, though every run here is promised a kernel that is
    nobody else's -> with its remedy. `development`: nobody is promised anything."""
    if development or not (kinds := pretended(documents)):
        return None
    return (
        f"machines of the cluster's own: {', '.join(kinds)} are containers that share their host's kernel, or nothing; "
        "they are taken only where BLASTDOOR_ENVIRONMENT=test. Put your provider's kinds in their place"
    )


def class_in_use(management: Management, topology: Sequence[Manifest], *, namespace: str) -> Sequence[Manifest]:
    """The ClusterClass that a Cluster of this topology would be made by, where it has one. Raises ClusterError."""
    wanted = class_of(topology)
    kind = None if wanted is None else management.kinds(topology[-1]["apiVersion"]).get("ClusterClass")
    if wanted is None or kind is None:
        return []
    found = management.get(kind, wanted[0], namespace=wanted[1] or namespace)
    return [] if found is None else [found]


def _lacking_class(
    management: Management, cluster: Manifest, name: str, namespace: str, development: bool
) -> Iterator[str]:
    kind = management.kinds(cluster["apiVersion"]).get("ClusterClass")
    if kind is None:
        yield f"ClusterClass of {cluster['apiVersion']}, which the topology asks for"
    elif refused := management.refused([Right("get", GROUP, kind.plural, namespace)]):
        yield f"the right to {refused[0]}: {_RBAC}"
    elif (found := management.get(kind, name, namespace=namespace)) is None:
        yield f"the ClusterClass {namespace}/{name}: cluster_templates/capi/class shows how to write one"
    elif (why := no_machines([found], development=development)) is not None:
        yield why


def _rights(made: Sequence[Resource], every: Sequence[Resource], namespace: str) -> Sequence[Right]:
    """Each once, for a call that `capi.py` makes; what it makes first."""
    verbs = ("get", "list", "create", "patch", "delete")
    rights = [
        *(Right(verb, kind.group, kind.plural, namespace) for kind in reversed(made) for verb in verbs),
        *(Right(verb, LEASES.group, LEASES.plural, namespace) for verb in ("get", "list", "create", "delete")),
        *(Right(verb, SECRETS.group, SECRETS.plural, namespace) for verb in ("get", "list")),
        *(Right("list", kind.group, kind.plural, namespace) for kind in every),
    ]
    return list(dict.fromkeys(rights))
