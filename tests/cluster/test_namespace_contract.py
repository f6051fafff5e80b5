"""What every boundary kind promises, kept by `namespace` on a real cluster; and what its probe says of that cluster."""

from collections.abc import Iterator

import pytest

from tests.cluster.namespaces import NamespaceKind, Site, sweep
from tests.contract.test_boundary_contract import TestCollecting, TestLife, TestSteps
from workers.boundaries.namespace.driver import NamespaceBoundary

__all__ = ["TestCollecting", "TestLife", "TestSteps"]


@pytest.fixture(scope="module")
def boundary(site: Site) -> Iterator[NamespaceBoundary]:
    boundary = NamespaceBoundary(site.host())
    boundary.listener.address()
    yield boundary
    assert sweep(boundary, site.ready) == []


@pytest.fixture(params=["runc", "gvisor"])
def kind(request: pytest.FixtureRequest, boundary: NamespaceBoundary) -> Iterator[NamespaceKind]:
    kind = NamespaceKind(boundary, request.param)
    yield kind
    for ref in boundary.discover():
        boundary.destroy(ref)


def test_the_probe_says_what_can_be_built(boundary: NamespaceBoundary) -> None:
    rows = {row.boundary: row for row in boundary.probe()}
    assert {name: row.missing for name, row in rows.items()} == {"namespace/runc": (), "namespace/gvisor": ()}
    assert all(row.runtimes["default"].startswith("sha256:") for row in rows.values())
    assert rows["namespace/gvisor"].versions.keys() == {"kubelet", "engine", "kernel"}
    assert list(boundary.discover()) == []
