"""What the probe says of a cluster that is as it must be, and of one where a single thing is amiss: each is planted in
a real cluster, and named in the row of what it takes away."""

import json
import os
import signal
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import pytest
from typer.testing import CliRunner

from service.core.boundary import BoundaryRef, BoundarySpec, Capabilities
from tests.cluster.namespaces import Site, sweep
from tests.cluster.pods import eventually
from workers.boundaries.namespace import driver, probe
from workers.boundaries.namespace.driver import NamespaceBoundary
from workers.cli import commands
from workers.kube import Cluster, Manifest
from workers.pods import checks, opening, render
from workers.pods.nodes import is_ready


class Probed(Protocol):
    def __call__(self, *variants: str) -> dict[str, Capabilities]: ...


@pytest.fixture(scope="module")
def boundaries(site: Site) -> Iterator[dict[tuple[str, ...], NamespaceBoundary]]:
    """One installation for all: its listener takes a second to start. Each is asked for what it is about alone."""
    installation = f"probe{uuid.uuid4().hex[:12]}"
    every = [("runc", "gvisor"), ("runc",), ("gvisor",)]
    made = {variants: NamespaceBoundary(site.host(*variants, installation=installation)) for variants in every}
    yield made
    left = [sweep(boundary, site.ready) for boundary in made.values()]
    assert left == [[], [], []]


@pytest.fixture
def probed(boundaries: dict[tuple[str, ...], NamespaceBoundary], monkeypatch: pytest.MonkeyPatch) -> Probed:
    """Measures anew each time."""

    def measure(*variants: str) -> dict[str, Capabilities]:
        monkeypatch.setattr(probe, "_passed", {})
        return {row.boundary.removeprefix("namespace/"): row for row in boundaries[variants].probe()}

    return measure


@contextmanager
def without(site: Site, kind: str, name: str, *, instead: Manifest | None = None) -> Iterator[None]:
    """One object of the cluster's is away for a while, or another has its name."""
    admin = site.ready.admin
    before = admin.get(kind, name)
    assert before is not None
    kept = {key: value for key, value in before.items() if key != "status"} | {
        "metadata": {"name": name, "labels": before["metadata"].get("labels") or {}}
    }
    admin.delete(kind, name)
    try:
        if instead is not None:
            admin.create(kept | instead)
        yield
    finally:
        admin.delete(kind, name)
        admin.create(kept)


def missing(rows: dict[str, Capabilities], variant: str) -> str:
    """What is said of it, which then cannot be had."""
    assert rows[variant].available is not bool(rows[variant].missing)
    return "; ".join(rows[variant].missing)


def test_a_cluster_that_is_as_it_must_be_offers_both_and_says_what_builds_them(site: Site, probed: Probed) -> None:
    rows = probed("runc", "gvisor")
    assert {variant: (row.available, row.missing) for variant, row in rows.items()} == {
        "runc": (True, ()), "gvisor": (True, ()),
    }  # fmt: skip
    assert all({"kubelet", "engine", "kernel"} <= row.versions.keys() for row in rows.values())
    assert rows["gvisor"].runtimes == {"default": site.image.rpartition("@")[2]}


# --- That `gvisor` is gVisor ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("handler", "said"),
    [
        ("runc", "RuntimeClass gvisor that isolates: its handler 'runc' shares the node's kernel"),
        ("runsc-of-another", "handler runsc-of-another, which RuntimeClass gvisor names, on every node for it: "),
    ],
)
def test_a_class_whose_handler_is_another_is_caught_from_the_nodes_side(
    site: Site, probed: Probed, handler: str, said: str
) -> None:
    with without(site, "RuntimeClass", "gvisor", instead={"handler": handler}):
        rows = probed("gvisor")
    assert said in missing(rows, "gvisor")


def test_a_class_that_says_nothing_wrong_and_starts_the_nodes_own_processes_is_caught_from_inside(
    site: Site, probed: Probed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a node's `runsc` is runc by another name: no name says so, only the kernel that a pod sees."""
    monkeypatch.setattr(checks, "_SHARES_KERNEL", frozenset())
    with without(site, "RuntimeClass", "gvisor", instead={"handler": "runc"}):
        rows = probed("gvisor")
    assert "its pods see the node's own kernel" in missing(rows, "gvisor")


def test_a_pool_without_a_node_is_named(site: Site, probed: Probed) -> None:
    pool = {"nodeSelector": {"blastdoor.node-restriction.kubernetes.io/pool": "nowhere"}}
    with without(site, "RuntimeClass", "gvisor", instead={"scheduling": pool}):
        said = missing(probed("gvisor"), "gvisor")
    assert "a node for RuntimeClass gvisor: no one that is ready has" in said
    assert "pool=nowhere" in said


def test_doctor_names_a_class_that_is_absent_and_how_to_get_it(site: Site) -> None:
    with without(site, "RuntimeClass", "gvisor"):
        asked = ["doctor", "--kubeconfig", str(site.ready.engine_kubeconfig), "--kube-image", site.image, "--json"]
        doctor = CliRunner().invoke(commands, asked)
    found = {row["boundary"]: row for row in json.loads(doctor.stdout)["boundaries"]}
    assert not found["namespace/gvisor"]["available"]
    assert any(
        "RuntimeClass gvisor (run `blastdoor cluster install`" in why for why in found["namespace/gvisor"]["missing"]
    )
    assert found["namespace/runc"]["available"], doctor.output  # control: it is this cluster that was asked


# --- What is to be refused --------------------------------------------------------------------------------------------


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Manifest], Manifest | None]], None]:
    """Has the namespaces of runs made with one thing changed, or left out."""

    def plant(change: Callable[[Manifest], Manifest | None]) -> None:
        def changed(ref: BoundaryRef, spec: BoundarySpec) -> Sequence[Manifest]:
            return [one for each in render.render_namespace(ref, spec) if (one := change(each)) is not None]

        monkeypatch.setattr(opening, "render_namespace", changed)

    return plant


@pytest.mark.parametrize("variant", ["gvisor", "runc"])
def test_a_namespace_without_quota_is_caught(site: Site, rendered: Callable[[Any], None], variant: str) -> None:
    rendered(lambda one: None if one["kind"] in ("ResourceQuota", "LimitRange") else one)
    anew = NamespaceBoundary(site.host(variant))  # whose tenants' namespaces are not there yet
    try:
        (row,) = anew.probe()
    finally:
        assert sweep(anew, site.ready) == []
    assert row.missing == ("ResourceQuota and LimitRange: a pod that must be refused was taken",)


def test_a_namespace_where_pod_security_enforces_nothing_is_caught(
    probed: Probed, rendered: Callable[[Any], None]
) -> None:
    """By our own admission, which does not let it be made; and where there is none, by a pod that is taken."""

    def lax(one: Manifest) -> Manifest:
        if one["kind"] == "Namespace":
            one["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] = "privileged"
        return one

    rendered(lax)
    said = missing(probed("gvisor"), "gvisor")
    assert "PodSecurity" in said or "pod-security" in said, said


def test_what_is_not_bound_is_named(site: Site, probed: Probed) -> None:
    with without(site, "ValidatingAdmissionPolicyBinding", "blastdoor-pods"):
        rows = probed("runc", "gvisor")
    for variant in ("runc", "gvisor"):
        assert missing(rows, variant) == "admission policies blastdoor-pods (run `blastdoor cluster install`)"


# --- That network policy is enforced ----------------------------------------------------------------------------------


def test_a_controller_that_is_there_and_does_nothing_is_caught(site: Site, probed: Probed) -> None:
    if site.lab is None:
        pytest.skip("only the lab's controller can be made inert")
    os.kill(site.lab.pid("policy"), signal.SIGUSR1)
    try:
        rows = probed("runc")
    finally:
        os.kill(site.lab.pid("policy"), signal.SIGUSR2)
    assert "network policy did not come into force for the pod" in missing(rows, "runc")


# --- A cluster that cannot take a pod at all --------------------------------------------------------------------------


def test_a_cluster_whose_nodes_take_nothing_is_no_candidate(site: Site, probed: Probed) -> None:
    admin = site.ready.admin
    names = [node["metadata"]["name"] for node in admin.list("Node")]

    def cordon(away: bool) -> None:
        for name in names:
            node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "spec": {"unschedulable": away}}
            admin.apply(node)
        eventually(lambda: all(is_ready(node) is not away for node in admin.list("Node")))

    cordon(True)
    try:
        rows = probed("runc", "gvisor")
    finally:
        cordon(False)
    assert all("a node that is ready" in missing(rows, variant) for variant in ("runc", "gvisor"))


def test_a_cluster_that_does_not_answer_is_said_to_be_away(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = tmp_path / "kubeconfig"
    nobody.write_text(site.ready.engine_kubeconfig.read_text().replace("https://127.0.0.1:", "https://127.0.0.1:1/#"))
    impatient = SimpleNamespace(from_kubeconfig=partial(Cluster.from_kubeconfig, patience_s=0.3))
    monkeypatch.setattr(driver, "Cluster", impatient)
    (row,) = NamespaceBoundary(replace(site.host("gvisor"), kubeconfig=nobody)).probe()
    assert "a cluster that answers" in missing({"gvisor": row}, "gvisor")
