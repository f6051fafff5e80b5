"""What the provisioner for Cluster API does where there is no management cluster to ask."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from service.core.boundary import BoundaryKind, BoundaryRef
from service.core.errors import NotYetDestroyed, ProvisionFailed
from service.settings import Settings
from tests.sandboxes import Never
from tests.unit.test_kind_driver import BOTH, Here
from workers.boundaries.cluster.capi import CapiHost, CapiProvisioner
from workers.boundaries.cluster.driver import ClusterBoundary
from workers.environment import cluster_choices
from workers.kube import ClusterError
from workers.kube.manifests import FOLDER

REF = BoundaryRef(
    installation="inst0", kind=BoundaryKind.CLUSTER, variant="capi", site="here", tenant="acme",
    run_id="run_" + "0" * 31 + "1", fence=2, expires_at=datetime(2027, 1, 2, tzinfo=UTC),
)  # fmt: skip


@pytest.fixture
def host(tmp_path: Path) -> CapiHost:
    return CapiHost(
        installation="inst0", site="here", kubeconfig=tmp_path / "kubeconfig", namespace="clusters", topology=None,
        max_clusters=1, state=tmp_path / "state", ready_s=1,
    )  # fmt: skip


def left_behind(host: CapiHost) -> Path:
    folder = host.state / "clusters" / REF.name
    folder.mkdir(parents=True)
    (folder / "kubeconfig").touch()
    return folder


@pytest.mark.parametrize(
    "change", [{"kind": BoundaryKind.NAMESPACE}, {"variant": "kind"}, {"installation": "inst1"}, {"site": "there"}]
)
def test_what_is_another_provisioners_is_not_made(host: CapiHost, change: dict[str, Any]) -> None:
    ref = REF.model_copy(update=change)
    with pytest.raises(ProvisionFailed, match="is not for this"):
        CapiProvisioner(host).create(ref, cancelled=Never(), tell=print)
    with pytest.raises(ProvisionFailed, match="the cluster could not be made"):  # the control: its own is tried
        CapiProvisioner(host).create(REF, cancelled=Never(), tell=print)


def test_without_a_management_cluster_nothing_is_called_absent_and_nothing_gone(host: CapiHost) -> None:
    """But the kubeconfig on this host goes first: nobody shall use it any more."""
    folder = left_behind(host)
    with pytest.raises(ClusterError):
        list(CapiProvisioner(host).discover())
    with pytest.raises(NotYetDestroyed):
        CapiProvisioner(host).destroy(REF)
    assert not folder.exists()


def test_what_another_installation_has_on_this_host_is_left_alone(host: CapiHost) -> None:
    folder = left_behind(host)
    CapiProvisioner(host).destroy(REF.model_copy(update={"installation": "inst1"}))
    assert (folder / "kubeconfig").exists()


def test_what_is_missing_is_said_before_anything_is_asked(host: CapiHost) -> None:
    assert CapiProvisioner(host).lacks() == (
        f"a kubeconfig of the management cluster: there is no file {host.kubeconfig}",
    )
    host.kubeconfig.write_text("{}")
    (said,) = CapiProvisioner(host).lacks()
    assert said.startswith("a management cluster that answers: ")
    (said,) = CapiProvisioner(replace(host, topology=host.state)).lacks()
    assert said.startswith("a topology that a cluster can be made from: ")


def test_where_machines_are_promised_containers_are_none(host: CapiHost) -> None:
    host.kubeconfig.write_text("{}")
    plain = replace(host, topology=FOLDER / "capi" / "plain")
    (said,) = CapiProvisioner(plain).lacks()
    assert said.startswith("machines of the cluster's own: DevCluster, DevMachineTemplate are containers")
    (said,) = CapiProvisioner(replace(plain, development=True)).lacks()
    assert said.startswith("a management cluster that answers: ")


@pytest.mark.parametrize(("environment", "taken"), [("production", False), ("development", False), ("test", True)])
def test_they_are_taken_in_tests_alone(environment: str, taken: bool) -> None:
    settings = Settings.model_validate({"environment": environment})
    assert cluster_choices(settings).development is taken


@pytest.mark.parametrize("development", [True, False])
def test_the_boundary_tells_its_provisioner(tmp_path: Path, development: bool) -> None:
    here = Here(state_dir=tmp_path, clusters=BOTH.model_copy(update={"development": development}))
    made = ClusterBoundary.for_host(here)._provisioners["capi"]
    assert isinstance(made, CapiProvisioner)
    assert made.host.development is development


def test_versions_are_told_as_far_as_they_are_known(host: CapiHost) -> None:
    assert set(CapiProvisioner(host).versions()) == {"cluster_api", "kubernetes", "topology"}
