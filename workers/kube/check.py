"""Which defences a cluster has: there as we would have them, and shown to work.

Each is tried, with a request that must be refused; beside them stands one that must not be, since a cluster that
refuses everything would show nothing.

Nothing runs: pods are sent as dry runs into one namespace of this check's own, which is deleted at its end. What only a
running pod can show (that `gvisor` is gVisor, that network policy is enforced) the probe of the boundary shows.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from workers.kube.canary import any_image, canary_namespace, plain_pod, settled
from workers.kube.cluster import Cluster, path
from workers.kube.errors import ClusterError, Denied
from workers.kube.install import Choices, differences, wanted
from workers.kube.lint import CONTAINER
from workers.kube.manifests import PREFIX, Manifest
from workers.kube.rights import FORBIDDEN, allowed, shown


class State(StrEnum):
    ENFORCED = "enforced"  # tried, and it held
    PRESENT = "present"  # as we would have it; nothing tries it by itself
    UNTRIED = "untried"  # nobody was asked to
    DIFFERS = "differs"
    MISSING = "missing"
    INERT = "inert"  # tried, and it did not hold


_COMPARED = (State.MISSING, State.DIFFERS, State.PRESENT)
"""What only looking says, the worst first."""


@dataclass(frozen=True)
class Row:
    defence: str
    state: State
    detail: str = ""

    @property
    def holds(self) -> bool:
        return self.state in {State.ENFORCED, State.PRESENT, State.UNTRIED}


def _policy(name: str) -> tuple[str, ...]:
    return f"ValidatingAdmissionPolicy blastdoor-{name}", f"ValidatingAdmissionPolicyBinding blastdoor-{name}"


MADE_OF = {
    "admission of pods": (*_policy("pods"), "ConfigMap admission"),
    "exec by another": _policy("interactive"),
    "attach by another": _policy("interactive"),
    "portforward by another": _policy("interactive"),
    "contents by another": _policy("contents"),
    "our labels by another": _policy("namespaces"),
    "the engine elsewhere": _policy("engine"),
    "priority": ("PriorityClass blastdoor-low",),
    "flow control": ("FlowSchema blastdoor-engine", "PriorityLevelConfiguration blastdoor-engine"),
    "rights of the engine": tuple(
        f"{kind} blastdoor-engine" for kind in ("ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding")
    ),
    "sandboxes namespace/gvisor": ("RuntimeClass gvisor",),
}
"""Defences that are tried, and what of the installed makes them; the others stand in each run's own namespace."""


@dataclass(frozen=True)
class Line:
    """Of the matrix: is it there as we would have it, and did it hold when it was tried just now. None: there is
    nothing of the kind to be said."""

    defence: str
    present: State | None
    enforced: State | None
    detail: str


def matrix(rows: Sequence[Row]) -> list[Line]:
    """What was tried beside what it is made of; then what nothing tries by itself. Pure."""
    compared = {row.defence: row for row in rows if row.state in _COMPARED}
    tried = [row for row in rows if row.state not in _COMPARED]
    lines = []
    for row in tried:
        parts = [compared[name] for name in MADE_OF.get(row.defence, ()) if name in compared]
        present = min((part.state for part in parts), key=_COMPARED.index, default=None)
        amiss = [f"{part.defence} {part.state} {part.detail}".rstrip() for part in parts if not part.holds]
        lines.append(Line(row.defence, present, row.state, "; ".join([*amiss, row.detail])))
    told = {name for row in tried for name in MADE_OF.get(row.defence, ())}
    return lines + [
        Line(row.defence, row.state, None, row.detail) for row in compared.values() if row.defence not in told
    ]


def check(admin: Cluster, engine: Cluster, choices: Choices) -> list[Row]:
    """`admin` may do everything, `engine` comes as the engine. Raises ClusterError when the cluster cannot be asked."""
    rows = [_compared(admin, manifest) for manifest in wanted(choices)]
    try:
        with canary_namespace(engine) as namespace:
            rows += _tried(admin, engine, choices, namespace)
    except Denied as error:
        rows.append(Row("a namespace of ours", State.MISSING, f"the engine may not make one: {error}"))
    return [*rows, _rights(admin, choices)]


def _compared(cluster: Cluster, manifest: Manifest) -> Row:
    """What `install` would apply, against what is there."""
    kind, metadata = manifest["kind"], manifest["metadata"]
    name = f"{kind} {metadata['name']}"
    live = cluster.get(kind, metadata["name"], metadata.get("namespace"))
    if live is None:
        return Row(name, State.MISSING)
    places = differences(manifest, live)
    return Row(name, State.DIFFERS if places else State.PRESENT, ", ".join(places))


def _tried(admin: Cluster, engine: Cluster, choices: Choices, namespace: Manifest) -> Iterator[Row]:
    name, pod = namespace["metadata"]["name"], plain_pod(namespace, any_image(choices.image_prefix))
    try:
        accepted = settled(lambda: engine.create(pod, dry_run=True))
    except Denied as error:
        yield Row("a pod that breaks no rule", State.MISSING, f"refused, so that no other refusal means much: {error}")
        return
    priority = accepted["spec"].get("priority")
    yield Row("priority", State.ENFORCED if priority == -10 else State.INERT, f"a sandbox's pod has {priority}")

    for defence, (word, changed) in broken_pods(pod).items():
        yield _refused(defence, word, lambda changed=changed: engine.create(changed, dry_run=True))  # type: ignore[misc]
    for inside in ("exec", "attach", "portforward"):
        where = f"{path('Pod', name, 'canary')}/{inside}?container={CONTAINER}"
        yield _refused(f"{inside} by another", "interactive:", lambda where=where: admin.raw("GET", where))  # type: ignore[misc]
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "canary", "namespace": name}}
    yield _refused("contents by another", "contents:", lambda: admin.create(config, dry_run=True))
    labels = {f"{PREFIX}managed": "true"}
    claim = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": f"{name}-x", "labels": labels}}
    yield _refused("our labels by another", "labels:", lambda: admin.create(claim, dry_run=True))
    outside = {"metadata": {"name": "canary", "namespace": "default"}, "spec": {"podSelector": {}}}
    outside |= {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy"}
    yield _refused("the engine elsewhere", "engine:", lambda: engine.create(outside, dry_run=True))
    yield _flow(admin, engine, name)


def broken_pods(pod: Manifest) -> dict[str, tuple[str, Manifest]]:
    """-> defence to (a word of its refusal, a pod that it must refuse and that no earlier one does)."""

    def with_(change: Callable[[Manifest, Manifest], Any]) -> Manifest:
        changed = deepcopy(pod)
        change(changed, changed["spec"]["containers"][0])
        return changed

    def amounts(cpu: str, memory: str) -> Manifest:
        asked = {"cpu": cpu, "memory": memory, "ephemeral-storage": "64Mi"}
        return {"limits": asked, "requests": asked}

    return {
        "PodSecurity": (
            "violates PodSecurity",
            with_(lambda _, container: container["securityContext"].update(capabilities={})),
        ),
        "admission of pods": (
            "annotations:",
            with_(lambda one, _: one["metadata"].update(annotations={"io.katacontainers.config_path": "/x"})),
        ),
        "limits of a container": (
            "maximum memory",
            with_(lambda _, container: container.update(resources=amounts("100m", "200Mi"))),
        ),
        "quota": ("exceeded quota", with_(lambda _, container: container.update(resources=amounts("400m", "64Mi")))),
    }


def _refused(defence: str, word: str, ask: Callable[[], object]) -> Row:
    """Whether it is refused, and by the defence that it is there for."""
    try:
        ask()
    except ClusterError as error:
        if word in error.detail:
            return Row(defence, State.ENFORCED, "refused, as it must be")
        return Row(defence, State.INERT, f"refused, but by something else: {error}")
    return Row(defence, State.INERT, "what it must refuse was accepted")


def _flow(admin: Cluster, engine: Cluster, namespace: str) -> Row:
    """The API server says in its answer which flow schema it counted a request under."""
    schema = admin.get("FlowSchema", "blastdoor-engine")
    headers = {key.lower(): value for key, value in engine.raw("GET", path("Pod", namespace)).headers.items()}
    counted = headers.get("x-kubernetes-pf-flowschema-uid", "none")
    if schema is not None and schema["metadata"]["uid"] == counted:
        return Row("flow control", State.ENFORCED, "the engine's requests are counted under it")
    return Row("flow control", State.INERT, f"the engine's requests are counted under another flow schema: {counted}")


def _rights(admin: Cluster, choices: Choices) -> Row:
    able = [shown(right) for right in FORBIDDEN if allowed(admin, choices.engine, right)]
    if able:
        return Row("rights of the engine", State.INERT, f"it can {', '.join(able)}")
    return Row("rights of the engine", State.ENFORCED, f"it can do none of {len(FORBIDDEN)} things that it must not")
