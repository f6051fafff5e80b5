"""What a real API server makes of the templates: it takes them, and refuses every pod that breaks a rule of theirs.

PodSecurity is asked before our admission, and would hide it. So the rules are tried in a namespace without PodSecurity,
to which the test binds our policy for itself, and PodSecurity in one of its own, to which nothing of ours is bound.
"""

import secrets
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.engines import CHOICES, IMAGE_PREFIX, Ready, ready
from tests.cluster.mutants import FIXTURES, mutants, of_the_standard
from tests.cluster.pods import eventually
from workers.kube import Cluster, ClusterError, Denied, Manifest
from workers.kube.canary import any_image, canary_namespace, namespace_manifests, plain_pod, settled
from workers.kube.install import wanted
from workers.kube.lint import VARIANTS

__all__ = ["ready"]
IMAGE = any_image(IMAGE_PREFIX)


@pytest.fixture(scope="module")
def bare(ready: Ready) -> Iterator[Manifest]:
    """A namespace of the variant gvisor with our rules for pods, and neither PodSecurity nor a quota."""
    with _room(ready.admin, podsecurity=False) as room:
        mark = {f"{IMAGE_PREFIX}rules": room["metadata"]["name"]}
        binding = next(one for one in wanted(CHOICES) if one["kind"].endswith("Binding") and "pods" in str(one))
        binding = {**binding, "metadata": {"name": room["metadata"]["name"]}}
        binding["spec"] = {**binding["spec"], "matchResources": {"namespaceSelector": {"matchLabels": mark}}}
        ready.admin.apply(binding)
        try:
            rule, broken = mutants(plain_pod(room, IMAGE))["privileged"]
            eventually(lambda: rule in _refusal(ready.admin, broken))
            yield room
        finally:
            ready.admin.delete(binding["kind"], binding["metadata"]["name"])


@pytest.fixture(scope="module")
def standard(ready: Ready) -> Iterator[Manifest]:
    """A namespace of the variant gvisor with PodSecurity alone."""
    with _room(ready.admin, podsecurity=True) as room:
        yield room


class _room:  # noqa: N801
    """A namespace that does not say it is managed: none of our policies is bound to it."""

    def __init__(self, admin: Cluster, *, podsecurity: bool) -> None:
        self._admin = admin
        name = f"room-{secrets.token_hex(4)}"
        self._manifest = namespace_manifests(name, variant="gvisor")[0]
        labels = self._manifest["metadata"]["labels"]
        del labels["blastdoor.dev/managed"]
        labels[f"{IMAGE_PREFIX}rules"] = name
        for key in [key for key in labels if key.startswith("pod-security") and not podsecurity]:
            del labels[key]

    def __enter__(self) -> Manifest:
        made = self._admin.apply(self._manifest)
        account = {"name": "sandbox", "namespace": made["metadata"]["name"]}
        self._admin.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": account})
        return made

    def __exit__(self, *_: object) -> None:
        self._admin.delete("Namespace", self._manifest["metadata"]["name"])


def _refusal(cluster: Cluster, pod: Manifest) -> str:
    """What the API server says against it; empty when it would make it."""
    try:
        cluster.create(pod, dry_run=True)
    except ClusterError as error:
        return error.detail
    return ""


# --- Taken ------------------------------------------------------------------------------------------------------------


def test_the_api_server_finds_no_mistake_in_an_expression(ready: Ready) -> None:
    for policy in (one for one in wanted(CHOICES) if one["kind"] == "ValidatingAdmissionPolicy"):
        name = policy["metadata"]["name"]

        def checked(name: str = name) -> Manifest:
            live = ready.admin.get("ValidatingAdmissionPolicy", name)
            assert live is not None
            return live if live.get("status", {}).get("observedGeneration") == live["metadata"]["generation"] else {}

        assert eventually(checked)["status"]["typeChecking"] == {}, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_pod_that_breaks_no_rule_is_taken_and_gets_its_overhead(ready: Ready, variant: str) -> None:
    with canary_namespace(ready.engine, variant=variant) as room:
        pod = plain_pod(room, IMAGE)
        if variant != "runc":  # the quota counts the overhead, which is more than the canary's quota has room for
            for amounts in pod["spec"]["containers"][0]["resources"].values():
                amounts.update(cpu="10m", memory="16Mi")
        made = settled(lambda: ready.engine.create(pod, dry_run=True))
    assert made["spec"].get("runtimeClassName", "runc") == variant
    assert ("overhead" in made["spec"]) is (variant != "runc")
    assert made["spec"]["priority"] == -10


def test_what_is_applied_again_changes_nothing(ready: Ready) -> None:
    for manifest in wanted(CHOICES):
        metadata = manifest["metadata"]
        before = ready.admin.get(manifest["kind"], metadata["name"], metadata.get("namespace"))
        after = ready.admin.apply(manifest)
        assert before is not None
        assert before["metadata"].get("generation") == after["metadata"].get("generation"), metadata["name"]
        assert before | {"metadata": None} == after | {"metadata": None}


# --- Refused ----------------------------------------------------------------------------------------------------------


def test_the_pod_that_the_mutants_are_made_of_is_taken(ready: Ready, bare: Manifest, standard: Manifest) -> None:
    for room in (bare, standard):
        assert _refusal(ready.admin, plain_pod(room, IMAGE)) == ""


_ANY = plain_pod(namespace_manifests("any", variant="gvisor")[0], IMAGE)


@pytest.mark.parametrize("name", mutants(_ANY))
def test_the_api_server_refuses_a_mutant_by_the_rule_that_it_breaks(ready: Ready, bare: Manifest, name: str) -> None:
    rule, mutant = mutants(plain_pod(bare, IMAGE))[name]
    assert f"{rule}: " in _refusal(ready.admin, mutant)


@pytest.mark.parametrize("name", FIXTURES)
def test_what_must_fail_by_the_standard_is_refused_by_podsecurity_and_by_us(
    ready: Ready, bare: Manifest, standard: Manifest, name: str
) -> None:
    assert 'violates PodSecurity "restricted:v1.34"' in _refusal(
        ready.admin, of_the_standard(plain_pod(standard, IMAGE), name)
    )
    assert "'blastdoor-pods'" in _refusal(ready.admin, of_the_standard(plain_pod(bare, IMAGE), name))


def test_a_pod_that_was_made_cannot_become_one_that_must_not_be(ready: Ready, bare: Manifest) -> None:
    """By an update of what may be updated, and by a container that is added for debugging."""
    pod = plain_pod(bare, IMAGE)
    pod["spec"]["nodeSelector"] = {"no.such/node": "x"}
    ready.admin.create(pod)
    metadata = {"name": "canary", "namespace": bare["metadata"]["name"]}
    where = f"/api/v1/namespaces/{metadata['namespace']}/pods/canary"
    live = ready.admin.get("Pod", metadata["name"], metadata["namespace"])
    assert live is not None
    del live["metadata"]["resourceVersion"]  # whatever the control plane has written to it since
    for change in ({"annotations": {"dev.gvisor.flag.network": "host"}}, {"finalizers": ["example.com/stay"]}):
        changed = live | {"metadata": live["metadata"] | change}
        with pytest.raises(ClusterError, match=r"(annotations|ends): "):
            ready.admin.raw("PUT", f"{where}?dryRun=All", body=changed)
    extra = {"name": "debug", "image": IMAGE, "targetContainerName": "run"}
    debugged = live | {"spec": live["spec"] | {"ephemeralContainers": [extra]}}
    with pytest.raises(ClusterError, match="one-container: "):
        ready.admin.raw("PUT", f"{where}/ephemeralcontainers?dryRun=All", body=debugged)
    ready.admin.delete("Pod", **metadata, grace_s=0)


# --- Namespaces -------------------------------------------------------------------------------------------------------


def _namespace(**labels: str) -> dict[str, Any]:
    manifest = namespace_manifests(f"bd-{secrets.token_hex(4)}")[0]
    manifest["metadata"]["labels"] |= {key.replace("__", "/").replace("_", "-"): value for key, value in labels.items()}
    return manifest


@pytest.mark.parametrize(
    "label",
    [
        {"blastdoor.dev__variant": "mine"},
        {"blastdoor.dev__installation": ""},
        {"blastdoor.dev__tenant_hash": ""},
        {"pod_security.kubernetes.io__enforce": "baseline"},
        {"pod_security.kubernetes.io__enforce_version": "latest"},
    ],
)
def test_not_even_the_engine_makes_a_namespace_that_is_less_than_ours(ready: Ready, label: dict[str, str]) -> None:
    ready.engine.apply(_namespace(), dry_run=True)
    with pytest.raises(Denied, match="complete: "):
        ready.engine.apply(_namespace(**label), dry_run=True)


def test_the_engine_makes_no_namespace_but_ours_and_takes_over_none(ready: Ready) -> None:
    unmarked = _namespace()
    del unmarked["metadata"]["labels"]["blastdoor.dev/managed"]
    with pytest.raises(Denied, match="engine: "):
        ready.engine.apply(unmarked, dry_run=True)
    stolen = _namespace()
    stolen["metadata"]["name"] = "kube-system"
    with pytest.raises(Denied, match="own: "):
        ready.engine.apply(stolen, dry_run=True)
    with _room(ready.admin, podsecurity=False) as other, pytest.raises(Denied, match="engine: "):
        ready.engine.delete("Namespace", other["metadata"]["name"])


def test_whose_a_namespace_is_never_changes_and_nobody_else_changes_its_labels(ready: Ready) -> None:
    with canary_namespace(ready.engine) as room:
        name, labels = room["metadata"]["name"], room["metadata"]["labels"]

        def relabelled(**change: str | None) -> Manifest:
            own = {key.replace("__", "/").replace("_", "-"): value for key, value in change.items()}
            kept = {key: value for key, value in (labels | own).items() if value is not None}
            return room | {"metadata": {**room["metadata"], "labels": kept}}

        where = f"/api/v1/namespaces/{name}?dryRun=All"
        for change in ({"blastdoor.dev__variant": "gvisor"}, {"blastdoor.dev__installation": "other"}):
            with pytest.raises(Denied, match="lasting: "):
                ready.admin.raw("PUT", where, body=relabelled(**change))
        for change in (
            {"blastdoor.dev__managed": None},
            {"blastdoor.dev__expires_at": "9999999999"},
            {"pod_security.kubernetes.io__enforce": "privileged"},
        ):
            with pytest.raises(Denied, match="labels: "):
                ready.admin.raw("PUT", where, body=relabelled(**change))  # type: ignore[arg-type]
        ready.admin.raw("PUT", where, body=relabelled(team="x"))  # what is not ours is not our business


# --- What lies in one -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("ConfigMap", {}),
        ("NetworkPolicy", {"spec": {"podSelector": {}, "policyTypes": ["Egress"], "egress": [{}]}}),
        ("Role", {"rules": []}),
        ("RoleBinding", {"roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "edit"}}),
        ("ServiceAccount", {}),
        ("ResourceQuota", {}),
    ],
)
def test_nobody_but_the_engine_writes_in_a_namespace_of_ours(ready: Ready, kind: str, body: Manifest) -> None:
    example = next(one for one in [*wanted(CHOICES), *namespace_manifests("x")] if one["kind"] == kind)
    with canary_namespace(ready.engine) as room:
        metadata = {"name": "mine", "namespace": room["metadata"]["name"]}
        manifest = {"apiVersion": example["apiVersion"], "kind": kind, "metadata": metadata, **body}
        with pytest.raises(Denied, match="contents: "):
            ready.admin.create(manifest, dry_run=True)
        ready.admin.create(manifest | {"metadata": {"name": "mine", "namespace": "default"}}, dry_run=True)


def test_no_token_is_made_for_an_account_of_a_sandbox_by_anybody(ready: Ready) -> None:
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"audiences": []}}
    with canary_namespace(ready.engine) as room:
        where = f"/api/v1/namespaces/{room['metadata']['name']}/serviceaccounts/sandbox/token"
        with pytest.raises(Denied, match=r"(contents|tokens): "):
            ready.admin.raw("POST", where, body=request)


def test_the_control_plane_puts_into_a_namespace_of_ours_what_it_puts_everywhere(ready: Ready) -> None:
    with canary_namespace(ready.engine) as room:
        name = room["metadata"]["name"]
        eventually(lambda: ready.admin.get("ConfigMap", "kube-root-ca.crt", name))
        quota = eventually(lambda: (ready.admin.get("ResourceQuota", "blastdoor", name) or {}).get("status"))
        assert eventually(lambda: quota.get("hard"))["pods"] == "1"
    eventually(lambda: ready.admin.get("Namespace", name) is None)
