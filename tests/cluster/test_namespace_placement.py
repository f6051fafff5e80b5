"""Where a pod may run and how many there may be, on a real cluster: a tenant's own nodes, and a tenant's own quota."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import pytest

from service.core.boundary import BoundaryRef, BoundarySpec, Share
from service.core.controls import Limits
from service.core.errors import ProvisionFailed
from tests.cluster.engines import Ready
from tests.cluster.namespaces import NamespaceKind, Site, sweep
from tests.sandboxes import MIB, Never, make_spec, shell
from workers.boundaries.namespace.driver import NamespaceBoundary
from workers.boundaries.namespace.probe import probe
from workers.kube import Manifest
from workers.pods import opening
from workers.pods.nodes import GROUP_KEY, TAINT_KEY
from workers.pods.render import namespace_name


@pytest.fixture(scope="module")
def boundary(site: Site) -> Iterator[NamespaceBoundary]:
    boundary = NamespaceBoundary(site.host())
    boundary.listener.address()
    yield boundary
    assert sweep(boundary, site.ready) == []


@pytest.fixture
def kind(boundary: NamespaceBoundary) -> Iterator[NamespaceKind]:
    kind = NamespaceKind(boundary, "runc")
    yield kind
    for ref in boundary.discover():
        boundary.destroy(ref)


def shared_by(runs: int, **limits: Any) -> BoundarySpec:
    small: dict[str, Any] = {"memory": 64 * MIB, "cpu": 0.2} | limits
    return make_spec(**small).model_copy(update={"share": Share(runs=runs, limits=Limits(**small))})


@contextmanager
def node_of(ready: Ready, group: str, *, taint: bool = True) -> Iterator[str]:
    """The cluster's one node given to a group; what runs there already goes on. -> its name."""
    name = str(ready.admin.list("Node")[0]["metadata"]["name"])
    taints = [{"key": TAINT_KEY, "value": group, "effect": "NoSchedule"}] if taint else []
    node: Manifest = {
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {GROUP_KEY: group}},
        "spec": {"taints": taints},
    }  # fmt: skip
    ready.admin.apply(node, owner="test-of-groups")
    try:
        yield name
    finally:
        ready.admin.apply({**node, "metadata": {"name": name, "labels": {}}, "spec": {}}, owner="test-of-groups")


def quota_of(ready: Ready, ref: BoundaryRef) -> dict[str, str]:
    found = ready.admin.get("ResourceQuota", "blastdoor", namespace_name(ref))
    assert found is not None
    hard: dict[str, str] = found["spec"]["hard"]
    return hard


def refused(kind: NamespaceKind, spec: BoundarySpec, why: str) -> None:
    """It does not open, and leaves nothing."""
    wanted = kind.boundary.open(spec, kind.ref(), cancelled=Never())
    with pytest.raises(ProvisionFailed, match=why), wanted:
        pytest.fail("it runs")
    assert list(kind.boundary.discover()) == []


# --- a tenant's own quota ---------------------------------------------------------------------------------------------


def test_a_tenants_namespace_has_the_tenants_quota_and_has_it_anew_when_it_changes(
    kind: NamespaceKind, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "_ROOM_S", 1.0)
    one, other, third = kind.ref(), kind.ref(), kind.ref()
    with ExitStack() as runs:
        runs.enter_context(kind.boundary.open(shared_by(1), one, cancelled=Never()))
        assert {key: quota_of(site.ready, one)[key] for key in ("pods", "limits.memory", "limits.cpu")} == {
            "pods": "1", "limits.memory": str(64 * MIB), "limits.cpu": "200m"
        }  # fmt: skip
        with pytest.raises(ProvisionFailed, match=r"tenant's quota has no room .*exceeded quota"):
            runs.enter_context(kind.boundary.open(shared_by(1), other, cancelled=Never()))
        assert [ref.run_id for ref in kind.boundary.discover()] == [one.run_id], "what was refused left nothing"
        monkeypatch.setattr(opening, "_ROOM_S", 15.0)
        runs.enter_context(kind.boundary.open(shared_by(2), other, cancelled=Never()))
        assert quota_of(site.ready, one)["pods"] == "2"
        monkeypatch.setattr(opening, "_ROOM_S", 1.0)
        with pytest.raises(ProvisionFailed, match="exceeded quota"):
            runs.enter_context(kind.boundary.open(shared_by(1), third, cancelled=Never()))
        assert quota_of(site.ready, one)["pods"] == "1", "lowered while two run: neither is ended, none is added"


def test_a_run_above_its_tenants_quota_waits_until_one_has_gone(kind: NamespaceKind) -> None:
    one, other = kind.ref(), kind.ref()
    ended_at: list[float] = []

    def end() -> None:
        kind.another_process().destroy(one)
        ended_at.append(time.monotonic())

    with kind.boundary.open(shared_by(1), one, cancelled=Never()):
        ending = threading.Timer(1.0, end)
        ending.start()
        with kind.boundary.open(shared_by(1), other, cancelled=Never()) as sandbox:
            begun_at = time.monotonic()
            assert sandbox.execute(shell("exit 4")).exit_code == 4
        ending.join()
    assert begun_at > ended_at[0] - 1.0, "the node may free the place a moment before it is seen to be gone"


def test_a_limit_above_what_the_tenant_may_have_is_refused_by_the_cluster_too(kind: NamespaceKind) -> None:
    share = Share(runs=2, limits=Limits(memory=64 * MIB))
    refused(kind, make_spec(memory=96 * MIB).model_copy(update={"share": share}), "maximum memory")


# --- a tenant's own nodes ---------------------------------------------------------------------------------------------


def on(group: str) -> BoundarySpec:
    return make_spec().model_copy(update={"node_group": group, "lifetime": timedelta(seconds=60)})


def test_a_pod_runs_on_its_groups_node_and_its_evidence_says_so(boundary: NamespaceBoundary, site: Site) -> None:
    for variant in ("runc", "gvisor"):
        ref = NamespaceKind(boundary, variant).ref()
        with node_of(site.ready, "blue") as node, boundary.open(on("blue"), ref, cancelled=Never()) as sandbox:
            evidence = sandbox.evidence().model_dump()
        boundary.destroy(ref)
        assert (evidence["node"]["name"], evidence["node"]["group"]) == (node, "blue")


def test_a_pod_without_a_node_of_its_group_never_runs(
    kind: NamespaceKind, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "_READY_S", 2.0)
    refused(kind, on("blue"), "nodes are available")
    with node_of(site.ready, "red"):
        refused(kind, on("blue"), "nodes are available")
        refused(kind, make_spec(), "nodes are available")  # nor does who is of no group, on a node that is kept


def test_a_pod_that_runs_on_a_node_that_is_not_kept_for_its_group_is_no_run(kind: NamespaceKind, site: Site) -> None:
    """The scheduler goes by the label, and so takes a node that others share: one with the label and no taint."""
    with node_of(site.ready, "blue", taint=False):
        refused(kind, on("blue"), "not kept for group blue")


def test_the_probe_offers_a_group_whose_nodes_nobody_shares(boundary: NamespaceBoundary, site: Site) -> None:
    soft = NamespaceBoundary(site.host("runc", installation=boundary.host.installation))

    def offered() -> set[str]:
        (row,) = probe(soft)
        assert row.available, row.missing
        return set(row.node_groups)

    assert offered() == set()
    with node_of(site.ready, "blue", taint=False):
        assert offered() == set(), "others might land there"
    with node_of(site.ready, "blue"):
        assert offered() == {"blue"}
    assert offered() == set()
