"""What is asked of a management cluster, as whole documents (read golden/capi_*.json in review), and what is believed
of its answers."""

import base64
import json
from collections.abc import Callable
from copy import deepcopy
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.core.boundary import BoundaryKind, BoundaryRef, tenant_hash
from tests.unit.test_gvisor_render import assert_golden
from workers.boundaries.cluster.capi_render import (
    CLUSTER_NAME,
    SHIPPED,
    KubeconfigFault,
    TopologyFault,
    class_of,
    digest,
    held_by,
    is_of,
    kubeconfig_of,
    kubernetes_version,
    mine,
    pretended,
    read_ref,
    read_topology,
    render_cluster,
    render_place,
    standing,
)
from workers.kube import Manifest
from workers.kube.manifests import FOLDER

PLAIN = FOLDER / "capi" / "plain"
VARIANTS = [FOLDER / "capi" / "variants" / name for name in ("bottlerocket", "cos", "flatcar", "talos")]
REF = BoundaryRef(
    installation="inst0", kind=BoundaryKind.CLUSTER, variant="capi", site="here", tenant="acme",
    run_id="run_" + "0" * 31 + "1", fence=2, expires_at=datetime(2026, 1, 2, 3, 4, 5, 600, tzinfo=UTC),
)  # fmt: skip
NAME = REF.name
HOSTILE = "acme\n  ${x}: {{name}} blastdoor.dev/run=1 " + "a" * 80


def rendered(folder: Path, ref: BoundaryRef = REF) -> list[Manifest]:
    return list(render_cluster(ref, read_topology(folder), namespace="clusters"))


@pytest.mark.parametrize("kind", ["DockerCluster", "DockerMachineTemplate", "DockerMachinePool", "DevMachineTemplate",
                                  "InMemoryCluster", "InMemoryMachineTemplate"])  # fmt: skip
def test_what_is_no_machine_is_found_where_it_stands_and_where_it_is_referred_to(kind: str) -> None:
    ref = {"apiGroup": "infrastructure.cluster.x-k8s.io", "kind": kind, "name": "x"}
    assert pretended([{"kind": "Cluster", "spec": {"infrastructureRef": ref}}]) == [kind]
    assert pretended([{"kind": "ClusterClass", "spec": {"workers": [{"templateRef": ref}, ref]}}]) == [kind]
    assert pretended([{"kind": kind}]) == [kind]
    assert pretended([{"kind": "AWSCluster", "spec": {"note": kind, "name": [kind]}}]) == []


def test_of_the_shipped_templates_the_plain_one_has_no_machines_of_its_own_and_no_variant_is_like_it() -> None:
    found = {folder.name: pretended(read_topology(folder)) for folder in (PLAIN, SHIPPED, *VARIANTS)}
    assert found.pop("plain") == ["DevCluster", "DevMachineTemplate"]
    assert set(map(tuple, found.values())) == {()}


# --- Documents --------------------------------------------------------------------------------------------------------


def test_the_cluster_of_a_run_by_a_class() -> None:
    assert_golden("capi_topology.json", rendered(SHIPPED))


def test_the_cluster_of_a_run_by_plain_objects() -> None:
    assert_golden("capi_plain.json", rendered(PLAIN))


def test_the_place_of_a_run() -> None:
    assert_golden("capi_place.json", render_place(REF, 1, namespace="clusters"))


@pytest.mark.parametrize("folder", [SHIPPED, PLAIN], ids=["topology", "plain"])
def test_every_document_carries_the_whole_reference_and_no_word_of_the_tenant(folder: Path) -> None:
    ref = REF.model_copy(update={"tenant": HOSTILE, "site": HOSTILE})
    documents = [*rendered(folder, ref), render_place(ref, 0, namespace="clusters")]
    for one in documents:
        found = read_ref(one, site=HOSTILE)
        assert found is not None
        assert found.is_of(HOSTILE)
        expires_at = datetime(2026, 1, 2, 3, 4, 6, tzinfo=UTC)  # a label has whole seconds
        tenant = tenant_hash("inst0", HOSTILE)
        assert found == ref.model_copy(update={"tenant": tenant, "expires_at": expires_at})
        assert is_of(one, ref)
        assert one["metadata"]["name"].startswith(("bd-", "blastdoor-"))
    assert "acme" not in json.dumps(documents)
    assert ref.run_id in json.dumps(documents)  # the control: what is said is found this way


def test_the_cluster_is_applied_last() -> None:
    assert [one["kind"] for one in rendered(PLAIN)][-1] == "Cluster"
    assert len(rendered(PLAIN)) == 6


def test_what_lists_an_installations_clusters_finds_what_was_rendered_and_no_other() -> None:
    for one in [*rendered(PLAIN), render_place(REF, 0, namespace="clusters")]:
        said = one["metadata"]["labels"]
        assert mine("inst0", "here").items() <= said.items()
        assert not mine("inst1", "here").items() <= said.items()
        assert not mine("inst0", "there").items() <= said.items()


@pytest.mark.parametrize(
    "change", [{"kind": "namespace"}, {"variant": "kind"}, {"run": "x"}, {"fence": "two"}, {"expires-at": "9" * 30}]
)
def test_labels_that_are_not_ours_are_no_reference(change: dict[str, str]) -> None:
    (cluster,) = rendered(SHIPPED)
    assert read_ref(cluster, site="here") is not None
    for key, value in change.items():
        cluster["metadata"]["labels"][f"blastdoor.dev/{key}"] = value
    assert read_ref(cluster, site="here") is None


# --- A platform team's own templates ----------------------------------------------------------------------------------


def changed(folder: Path, change: Callable[[Manifest], object]) -> Path:
    (cluster,) = yaml.safe_load_all((SHIPPED / "cluster.yaml").read_text())
    change(cluster)
    (folder / "cluster.yaml").write_text(yaml.safe_dump(cluster))
    return folder


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda one: one["metadata"].update(name="mine"), "its name must be"),
        (lambda one: one["metadata"].update(name="{{name}}-a"), "the Cluster's name must be"),
        (lambda one: one["metadata"].update(name="{{name}}{{name}}"), "its name must be"),
        (lambda one: one["metadata"].update(namespace="kube-system"), "its namespace is a setting"),
        (lambda one: one["metadata"].update(finalizers=["a/b"]), "metadata.finalizers is not a template's"),
        (lambda one: one["metadata"]["labels"].update({"blastdoor.dev/run": "x"}), "labels of ours"),
        (lambda one: one["metadata"].update(annotations={"blastdoor.dev/x": "x"}), "annotations of ours"),
        (lambda one: one["metadata"]["labels"].update({CLUSTER_NAME: "x"}), "labels of ours"),
        (lambda one: one["spec"]["topology"].update(version="{{version}}"), "no value for {{version}}"),
        (lambda one: one.update(apiVersion="cluster.x-k8s.io/v1alpha4"), "version v1alpha4 is not known here"),
        (lambda one: one["spec"].pop("topology"), "needs spec.topology"),
        (lambda one: one["spec"].update(paused=True), "it is paused"),
        (lambda one: one.update(kind="Machine"), "0 documents of kind Cluster"),
        (lambda one: one.pop("metadata"), "without apiVersion"),
    ],
)
def test_a_topology_that_would_not_be_one_runs_own_is_refused(
    tmp_path: Path, change: Callable[[Manifest], object], says: str
) -> None:
    with pytest.raises(TopologyFault, match=says):
        read_topology(changed(tmp_path, change))


def test_a_topology_may_say_all_that_a_provider_knows(tmp_path: Path) -> None:
    """The control of the above."""
    found = read_topology(changed(tmp_path, lambda one: one["spec"]["topology"].update(version="v1.35.1")))
    assert kubernetes_version(found) == "v1.35.1"
    assert class_of(found) == ("blastdoor", None)
    assert digest(found) != digest(read_topology(SHIPPED))
    assert kubernetes_version(read_topology(PLAIN)) == "v1.36.2"
    assert class_of(read_topology(PLAIN)) is None


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("role.yaml", {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role"}, "of no group of Cluster API"),
        ("pod.yaml", {"apiVersion": "v1", "kind": "Pod"}, "without apiVersion"),
        ("near.yaml", {"apiVersion": "evilcluster.x-k8s.io/v1", "kind": "Thing"}, "of no group of Cluster API"),
        ("twice.yaml", {"apiVersion": "cluster.x-k8s.io/v1beta2", "kind": "Cluster"}, "2 documents of kind Cluster"),
        ("text.yaml", "a text", "is no mapping"),
    ],
)  # fmt: skip
def test_a_topology_makes_nothing_but_what_belongs_to_a_cluster(
    tmp_path: Path, name: str, text: Any, says: str
) -> None:
    changed(tmp_path, lambda one: one)
    more = text | {"metadata": {"name": "{{name}}"}} if isinstance(text, dict) else text
    (tmp_path / name).write_text(yaml.safe_dump(more))
    with pytest.raises(TopologyFault, match=says):
        read_topology(tmp_path)


def test_a_folder_without_templates_is_no_topology(tmp_path: Path) -> None:
    with pytest.raises(TopologyFault, match="0 documents of kind Cluster"):
        read_topology(tmp_path)
    (tmp_path / "cluster.yaml").write_text("{")
    with pytest.raises(TopologyFault, match="cannot be read"):
        read_topology(tmp_path)


# --- How far it is ----------------------------------------------------------------------------------------------------


def cluster(version: str = "v1beta2", *, generation: int = 1, **status: Any) -> Manifest:
    return {"apiVersion": f"cluster.x-k8s.io/{version}", "kind": "Cluster",
            "metadata": {"name": NAME, "generation": generation}, "status": status}  # fmt: skip


def row(kind: str, status: str = "True", **more: Any) -> Manifest:
    return {"type": kind, "status": status, **more}


ALL = [
    row(one) for one in ("InfrastructureReady", "ControlPlaneInitialized", "ControlPlaneAvailable", "WorkersAvailable")
]


def test_a_cluster_is_ready_when_it_says_that_it_is_available() -> None:
    now = standing(cluster(conditions=[*ALL, row("Available")]))
    assert now.ready
    assert now.done == [
        "its infrastructure is there",
        "its control plane has begun",
        "its control plane is there",
        "its nodes are there",
    ]


@pytest.mark.parametrize(
    ("status", "waits"),
    [
        ({}, "no condition Available yet"),
        ({"conditions": ALL}, "no condition Available yet"),
        ({"conditions": [*ALL, row("Available", "Unknown", reason="Wait", message="a\n b")]}, "Available: Wait: a b"),
        ({"conditions": [*ALL[:3], row("WorkersAvailable", "False"), row("Available", "False")]}, "WorkersAvailable"),
        ({"conditions": [row("Available", observedGeneration=1)]}, "no condition Available yet"),
        ({"conditions": [row("Ready")]}, "no condition Available yet"),
    ],
)
def test_a_cluster_is_not_ready_for_less(status: dict[str, Any], waits: str) -> None:
    now = standing(cluster(generation=2, **status))
    assert not now.ready
    assert now.waits == waits
    assert not now.failed


def test_a_cluster_that_is_ending_is_not_ready() -> None:
    ending = cluster(conditions=[*ALL, row("Available")])
    ending["metadata"]["deletionTimestamp"] = "2026-01-02T03:04:05Z"
    assert not standing(ending).ready


def test_an_older_cluster_api_says_ready_and_a_newer_one_of_that_version_says_available() -> None:
    assert standing(cluster("v1beta1", conditions=[row("ControlPlaneReady"), row("Ready")])).ready
    assert not standing(cluster("v1beta1", conditions=[row("Ready", "False")])).ready
    both = {"conditions": [row("Ready")], "v1beta2": {"conditions": [row("Available", "False", reason="No")]}}
    assert not standing(cluster("v1beta1", **both)).ready
    both["v1beta2"] = {"conditions": [row("Available")]}
    assert standing(cluster("v1beta1", **both)).ready


@pytest.mark.parametrize(
    ("status", "why"),
    [
        ({"phase": "Failed"}, "its phase is Failed"),
        ({"failureReason": "Invalid", "failureMessage": "no"}, "Invalid: no"),
        ({"deprecated": {"v1beta1": {"failureMessage": "no quota"}}}, "no quota"),
        ({"phase": "Provisioning"}, ""),
    ],
)
def test_a_cluster_that_has_failed_for_good_says_so(status: dict[str, Any], why: str) -> None:
    assert standing(cluster(**status)).failed == why


def test_what_holds_a_deletion_is_told_in_the_clusters_own_words() -> None:
    ending = cluster(conditions=[row("Deleting", reason="Waiting", message="* Machine:\n  a volume")])
    assert held_by(ending) == f"Cluster {NAME} is not asked to end"
    ending["metadata"] |= {"deletionTimestamp": "2026-01-02T03:04:05Z", "finalizers": ["a/b", "c/d"]}
    assert held_by(ending) == f"Cluster {NAME} held by a/b, c/d; Waiting: * Machine: a volume"
    ending["metadata"]["finalizers"] = []
    assert held_by(ending).startswith(f"Cluster {NAME} not gone yet")


# --- Its kubeconfig ---------------------------------------------------------------------------------------------------

PEM = base64.b64encode(b"-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n").decode()
GOOD = {
    "apiVersion": "v1", "kind": "Config", "current-context": "admin@c", "preferences": {},
    "clusters": [{"name": "c", "cluster": {"server": "https://10.0.0.1:6443", "certificate-authority-data": PEM}}],
    "users": [{"name": "admin", "user": {"client-certificate-data": PEM, "client-key-data": "a2V5"}}],
    "contexts": [{"name": "admin@c", "context": {"cluster": "c", "user": "admin"}}],
}  # fmt: skip


def secret(text: str, **change: Any) -> Manifest:
    return {
        "type": "cluster.x-k8s.io/secret", "metadata": {"labels": {CLUSTER_NAME: NAME}},
        "data": {"value": base64.b64encode(text.encode()).decode()},
    } | change  # fmt: skip


def said(of: str, key: str, value: Any) -> Manifest:
    found = deepcopy(GOOD)
    part: Any = found[of]
    part[0][of.removesuffix("s")][key] = value
    return found


def test_a_kubeconfig_is_made_anew_from_what_was_checked() -> None:
    made = json.loads(kubeconfig_of(secret(yaml.safe_dump(GOOD)), NAME))
    assert made["clusters"][0]["cluster"] == GOOD["clusters"][0]["cluster"]  # type: ignore[index]
    assert made["users"][0]["user"] == GOOD["users"][0]["user"]  # type: ignore[index]
    assert set(made) == {"apiVersion", "kind", "clusters", "users", "contexts", "current-context"}
    with_token = said("users", "token", "abc")
    assert json.loads(kubeconfig_of(secret(yaml.safe_dump(with_token)), NAME))["users"][0]["user"]["token"] == "abc"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (said("users", "exec", {"command": "/bin/sh"}), "its user says exec"),
        (said("users", "auth-provider", {"name": "x"}), "its user says auth-provider"),
        (said("users", "tokenFile", "/etc/shadow"), "its user says tokenFile"),
        (said("users", "client-key", "/root/.ssh/id"), "its user says client-key"),
        (said("users", "as", "system:admin"), "its user says as"),
        (said("users", "client-key-data", ""), "neither a client's certificate"),
        (said("users", "client-certificate-data", "eA=="), "is no certificate"),
        (said("users", "token", ["x"]), "is no text"),
        (said("clusters", "insecure-skip-tls-verify", True), "its cluster says insecure-skip-tls-verify"),
        (said("clusters", "certificate-authority", "/x"), "its cluster says certificate-authority"),
        (said("clusters", "proxy-url", "http://x"), "its cluster says proxy-url"),
        (said("clusters", "certificate-authority-data", "eA=="), "is no certificate"),
        (said("clusters", "server", "http://10.0.0.1"), "no https address"),
        (said("clusters", "server", "https://u:p@10.0.0.1"), "no https address"),
        (GOOD | {"current-context": "other"}, "holds no kubeconfig"),
        (GOOD | {"users": []}, "holds no kubeconfig"),
        ({}, "holds no kubeconfig"),
        (["a"], "holds no kubeconfig"),
    ],
)
def test_a_kubeconfig_that_would_do_more_than_lead_to_its_cluster_is_not_taken(config: Any, says: str) -> None:
    with pytest.raises(KubeconfigFault, match=says):
        kubeconfig_of(secret(yaml.safe_dump(config)), NAME)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (secret(yaml.safe_dump(GOOD), type="Opaque"), "no secret of type"),
        (secret(yaml.safe_dump(GOOD), metadata={"labels": {CLUSTER_NAME: "another"}}), "with the label"),
        (secret(yaml.safe_dump(GOOD), data={}), "holds no kubeconfig"),
        (secret(yaml.safe_dump(GOOD), data={"value": "%%%"}), "holds no kubeconfig"),
        (secret("[" * 100_000), "holds no kubeconfig"),
        (secret("a: &a [x]\n" + "#" * 300_000), "holds no kubeconfig"),
        (secret("!!python/object/apply:os.getcwd []"), "holds no kubeconfig"),
    ],
)
def test_a_secret_that_holds_something_else_is_not_taken(found: Manifest, says: str) -> None:
    with pytest.raises(KubeconfigFault, match=says):
        kubeconfig_of(found, NAME)
