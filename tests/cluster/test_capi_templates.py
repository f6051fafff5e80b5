"""What a real API server with the published resource definitions makes of the templates for Cluster API: it takes every
document, strictly. And what is missing in a management cluster, and what the engine may do there.

Nothing of this is executed: no provider is at work behind these objects.
"""

import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.core.boundary import BoundaryKind, BoundaryRef
from service.core.errors import ProvisionFailed
from service.core.ids import new_run_id
from tests.cluster.capi_provider import install
from tests.cluster.capi_sites import TEMPLATES, Site, class_of_ours, defined, management, post, site, sites
from tests.cluster.lab.definitions import AWS, GOOGLE
from tests.cluster.pods import eventually
from tests.sandboxes import Never
from workers.boundaries.cluster.capi_render import read_topology, render_cluster
from workers.kube import Cluster, ClusterError, Manifest

__all__ = ["management", "site"]
REF = BoundaryRef(
    installation="inst0", kind=BoundaryKind.CLUSTER, variant="capi", site="here", tenant="acme",
    run_id=new_run_id(), fence=1, expires_at=datetime(2027, 1, 2, tzinfo=UTC),
)  # fmt: skip
NOT_TO_BE_HAD = {"TalosControlPlane", "TalosConfigTemplate"}
"""Kinds whose definitions cannot be fetched where these tests were written."""


@pytest.fixture(scope="module")
def every(management: Cluster) -> Cluster:
    """With the definitions of the providers that the variants are written for, as far as they are published."""
    install(management, defined(AWS, GOOGLE))
    return management


def rendered(folder: Path, namespace: str) -> Sequence[Manifest]:
    return render_cluster(REF, read_topology(folder), namespace=namespace)


# --- Templates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "folder", ["topology", "plain", *(f"variants/{name}" for name in ("bottlerocket", "cos", "flatcar", "talos"))]
)
def test_the_api_server_takes_every_document_of_a_topology(every: Cluster, folder: str) -> None:
    taken = []
    for one in rendered(TEMPLATES / folder, "default"):
        if one["kind"] not in NOT_TO_BE_HAD:
            taken.append(post(every, one, dry_run=True)["kind"])
            with pytest.raises(ClusterError, match=r"unknown field|Invalid value"):  # the control
                post(every, {**one, "spec": {**one.get("spec", {}), "noSuchField": {"a": 1}}}, dry_run=True)
    assert "Cluster" in taken


def test_nodes_for_kata_fit_in_the_place_of_flatcars(every: Cluster, tmp_path: Path) -> None:
    ours = list(yaml.safe_load_all((TEMPLATES / "variants/kata/nodes.yaml").read_text()))
    names = [(one["kind"], one["metadata"]["name"]) for one in ours]
    flatcar = list(yaml.safe_load_all((TEMPLATES / "variants/flatcar/cluster.yaml").read_text()))
    rest = [one for one in flatcar if (one["kind"], one["metadata"]["name"]) not in names]
    assert len(rest) == len(flatcar) - len(ours)
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump_all([*rest, *ours]))
    for one in rendered(tmp_path, "default"):
        post(every, one, dry_run=True)


def test_the_api_server_takes_the_class(every: Cluster) -> None:
    found = class_of_ours()
    assert {one["kind"] for one in found} >= {"ClusterClass", "KubeadmControlPlaneTemplate", "KubeadmConfigTemplate"}
    for one in found:
        one["metadata"]["namespace"] = "default"
        post(every, one, dry_run=True)


def test_what_the_class_refers_to_is_in_it_and_what_the_topology_asks_for_too() -> None:
    found = class_of_ours()
    names = {(one["kind"], one["metadata"]["name"]) for one in found}
    spec = next(one["spec"] for one in found if one["kind"] == "ClusterClass")
    wanted = list(_refs(spec))
    assert len(wanted) == 5
    assert set(wanted) == names - {("ClusterClass", "blastdoor")}
    topology = read_topology(TEMPLATES / "topology")[-1]["spec"]["topology"]
    assert topology["classRef"]["name"] == "blastdoor"
    classes = {one["class"] for one in spec["workers"]["machineDeployments"]}
    assert {one["class"] for one in topology["workers"]["machineDeployments"]} == classes


def _refs(node: Any) -> Iterator[tuple[str, str]]:
    if isinstance(node, dict):
        if "templateRef" in node:
            yield node["templateRef"]["kind"], node["templateRef"]["name"]
        for value in node.values():
            yield from _refs(value)
    elif isinstance(node, list):
        for value in node:
            yield from _refs(value)


@pytest.mark.parametrize("folder", ["plain", "variants/bottlerocket", "variants/cos", "variants/flatcar"])
def test_what_plain_objects_refer_to_is_there(folder: str) -> None:
    found = read_topology(TEMPLATES / folder)
    names = {(one["kind"], one["metadata"]["name"]) for one in found}
    wanted = {(one["kind"], one["name"]) for one in _plain_refs([one["spec"] for one in found if "spec" in one])}
    assert len(wanted) >= 3
    assert wanted <= names


def _plain_refs(node: Any) -> Iterator[dict[str, str]]:
    if isinstance(node, dict):
        yield from (value for key, value in node.items() if key.endswith("Ref") and "kind" in value)
        for value in node.values():
            yield from _plain_refs(value)
    elif isinstance(node, list):
        for value in node:
            yield from _plain_refs(value)


# --- A cluster of plain objects ---------------------------------------------------------------------------------------


def test_plain_objects_are_made_and_taken_away_with_their_own_rights(
    management: Cluster, kubeconfig: Path, tmp_path: Path
) -> None:
    """The provider of these tests knows nothing of the control plane and the nodes, so they stay when the Cluster goes:
    they are ours to delete."""
    with sites(management, kubeconfig, tmp_path, rights=("engine", "plain")) as one:
        plain = one.another(topology=TEMPLATES / "plain")
        assert eventually(lambda: plain.lacks() == ())
        ref = one.ref()
        plain.create(ref, cancelled=Never(), tell=one.told.append)
        left = [found["metadata"]["name"] for found in of_plain(management, one)]
        assert sorted(left) == sorted([ref.name] * 3 + [f"{ref.name}-sandbox"] * 2 + [f"{ref.name}-infra"])
        plain.destroy(ref)
        assert of_plain(management, one) == []
        assert one.provider.left() == []
        plain.close()


def of_plain(admin: Cluster, one: Site) -> list[Manifest]:
    kinds = {
        "controlplane": ("kubeadmcontrolplanes",), "bootstrap": ("kubeadmconfigtemplates",),
        "infrastructure": ("devclusters", "devmachinetemplates"),
    }  # fmt: skip
    paths = [f"{group}.cluster.x-k8s.io/v1beta2/{{}}/{kind}" for group in kinds for kind in kinds[group]]
    paths.append("cluster.x-k8s.io/v1beta2/{}/machinedeployments")
    where = f"namespaces/{one.provider.namespace}"
    found = [item for path in paths for item in admin.raw("GET", f"/apis/{path.format(where)}").body["items"]]
    return [item for item in found if item["metadata"]["name"].startswith("bd-")]


# --- What is missing --------------------------------------------------------------------------------------------------


def test_with_everything_there_nothing_is_missing_and_versions_are_told(site: Site) -> None:
    assert eventually(lambda: site.provisioner.lacks() == ())
    said = site.provisioner.versions()
    assert set(said) == {"cluster_api", "topology", "kubernetes", "management_cluster"}
    assert said["cluster_api"] == "v1beta2"
    assert said["kubernetes"] == "v1.36.2"


def changed(folder: Path, **change: Any) -> Path:
    (cluster,) = yaml.safe_load_all((TEMPLATES / "topology" / "cluster.yaml").read_text())
    cluster |= change
    folder.mkdir()
    (folder / "cluster.yaml").write_text(yaml.safe_dump(cluster))
    return folder


def test_each_thing_that_is_missing_is_named_with_its_remedy(site: Site, tmp_path: Path) -> None:
    assert eventually(lambda: site.provisioner.lacks() == ())  # the control
    topology = yaml.safe_load((TEMPLATES / "topology" / "cluster.yaml").read_text())
    topology["spec"]["topology"]["classRef"] = {"name": "other"}
    more = tmp_path / "more"
    changed(more)
    foreign = {"apiVersion": "infrastructure.cluster.x-k8s.io/v1beta2", "kind": "NoSuchCluster",
               "metadata": {"name": "{{name}}"}}  # fmt: skip
    (more / "infrastructure.yaml").write_text(yaml.safe_dump(foreign))
    (tmp_path / "elsewhere").write_text(site.provisioner.host.kubeconfig.read_text().replace("127.0.0.1", "127.0.0.9"))
    for change, says in (
        ({"kubeconfig": tmp_path / "none"}, f"there is no file {tmp_path / 'none'}"),
        ({"kubeconfig": tmp_path / "elsewhere"}, "a management cluster that answers"),
        ({"topology": tmp_path / "none"}, "a topology that a cluster can be made from"),
        ({"topology": changed(tmp_path / "class", **topology)}, "the ClusterClass .*/other: cluster_templates/capi"),
        ({"topology": more}, "NoSuchCluster of infrastructure.cluster.x-k8s.io/v1beta2.*has .*v1beta2.*up to date"),
        ({"namespace": "default"}, "the right to .* in default.*: cluster_templates/capi/rbac"),
        ({"max_clusters": 0}, "at least one cluster"),
        ({"development": False}, "machines of the cluster's own: DevClusterTemplate, DevMachineTemplate are"),
        ({"development": False, "topology": TEMPLATES / "plain"}, "machines of the cluster's own: DevCluster, Dev"),
    ):  # fmt: skip
        other = site.another(**change)
        (said,) = other.lacks()
        assert re.search(says, said), said
        other.close()


def test_a_run_gets_no_nodes_that_are_containers_of_one_host(site: Site) -> None:
    """Also where the class was written anew after it was looked at."""
    real, ref = site.another(development=False), site.ref()
    with pytest.raises(ProvisionFailed, match="machines of the cluster's own: DevClusterTemplate"):
        real.create(ref, cancelled=Never(), tell=site.told.append)
    assert site.provider.left() == []
    site.create(ref)  # the control: where nobody is promised machines
    site.gone(ref)
    real.close()


def test_a_management_cluster_without_cluster_api_is_told_how_to_get_it(site: Site) -> None:
    """With what its API server says of itself replaced: the definitions of other tests are not to be taken away."""
    provisioner = site.another()
    real = provisioner._management(0.5)
    real.groups = lambda: {"apps": ["apps/v1"]}  # type: ignore[method-assign]
    (said,) = provisioner.lacks()
    assert "`clusterctl init" in said
    provisioner.close()


@pytest.mark.parametrize("verb", ["create", "patch", "get", "list", "delete"])
def test_each_verb_that_is_taken_away_from_the_engine_is_missed(
    management: Cluster, kubeconfig: Path, tmp_path: Path, verb: str
) -> None:
    with sites(management, kubeconfig, tmp_path) as one:
        assert eventually(lambda: one.provisioner.lacks() == ())
        namespace = one.provider.namespace
        role = management.get("Role", "blastdoor-engine", namespace)
        assert role is not None
        for rule in role["rules"]:
            if "clusters" in rule["resources"] or (verb == "list" and "*" in rule["resources"]):
                rule["verbs"] = [each for each in rule["verbs"] if each != verb] or ["watch"]
        management.apply({key: role[key] for key in ("apiVersion", "kind", "rules")}
                         | {"metadata": {"name": "blastdoor-engine", "namespace": namespace}})  # fmt: skip
        (said,) = eventually(one.provisioner.lacks)
        assert f"{verb} clusters.cluster.x-k8s.io in {namespace}" in said


def test_the_engine_can_do_nothing_else_in_a_management_cluster(site: Site) -> None:
    here = Cluster.from_kubeconfig(site.provisioner.host.kubeconfig)
    namespace = site.provider.namespace
    core = "cluster.x-k8s.io/v1beta2"
    for method, where in (
        ("GET", "/api/v1/namespaces/kube-system/secrets"),
        ("GET", "/api/v1/secrets"),
        ("GET", f"/apis/{core}/clusters"),
        ("GET", f"/apis/{core}/namespaces/default/clusters"),
        ("GET", "/api/v1/nodes"),
        ("GET", f"/api/v1/namespaces/{namespace}/pods"),
        ("POST", f"/api/v1/namespaces/{namespace}/secrets"),
        ("POST", f"/api/v1/namespaces/{namespace}/pods"),
        ("POST", f"/apis/{core}/namespaces/{namespace}/clusterclasses"),
        ("POST", f"/apis/{core}/namespaces/{namespace}/machines"),
        ("DELETE", f"/apis/{core}/namespaces/{namespace}/machines/x"),
        ("DELETE", f"/apis/{core}/namespaces/{namespace}/clusters"),
        ("POST", f"/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}/roles"),
        ("POST", f"/api/v1/namespaces/{namespace}/serviceaccounts/engine/token"),
    ):
        with pytest.raises(ClusterError) as refused:
            here.raw(method, where, body={} if method == "POST" else None)
        assert refused.value.status == 403, (method, where, str(refused.value))
    assert here.raw("GET", f"/apis/{core}/namespaces/{namespace}/clusters").body["items"] == []  # the control
    here.close()
