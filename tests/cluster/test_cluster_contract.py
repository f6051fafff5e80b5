"""What every boundary kind promises, kept by `cluster`: its driver, and all that it does inside a cluster."""

import uuid
from collections.abc import Iterator

import pytest

from tests.cluster.engines import CHOICES, make_ready
from tests.cluster.lent import VARIANT, LentKind
from tests.cluster.namespaces import Site
from tests.cluster.own_api_ground import api_endpoints
from tests.contract.test_boundary_contract import TestCollecting, TestLife, TestSteps
from workers.boundaries.cluster.inside import RUNTIME_CLASS
from workers.kube.install import Choices, wanted
from workers.pods.own_api import own_api_cluster
from workers.pods.render import listener_namespace

__all__ = ["TestCollecting", "TestLife", "TestSteps"]
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def lent(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LentKind]:
    """At its end the cluster is one for many again."""
    admin, folder = site.ready.admin, tmp_path_factory.mktemp("lent")
    installation = f"test{uuid.uuid4().hex[:12]}"
    try:
        yield LentKind(installation, site.ready.engine, site.ready.kubeconfig, site.image, folder)
    finally:
        admin.delete("Namespace", listener_namespace(installation))
        only_here = own_api_cluster(
            ["apps"], images=[site.image], runtime_class=RUNTIME_CLASS, api_endpoints=api_endpoints(admin)
        )
        of_both = {(one["kind"], one["metadata"]["name"]) for one in wanted(CHOICES)}
        for one in [*wanted(Choices(image_prefix="x/", pool={}, own_api=True)), *only_here]:
            if (one["kind"], one["metadata"]["name"]) not in of_both:
                admin.delete(one["kind"], one["metadata"]["name"], one["metadata"].get("namespace"))
        again = make_ready(site.ready.kubeconfig, folder)
        again.admin.close()
        again.engine.close()


@pytest.fixture
def kind(lent: LentKind) -> Iterator[LentKind]:
    yield lent
    for ref in lent.boundary.discover():
        lent.boundary.destroy(ref)


def test_the_probe_says_what_can_be_built(lent: LentKind) -> None:
    (row,) = lent.boundary.probe()
    assert (row.boundary, row.available, row.abilities) == (f"cluster/{VARIANT}", True, {"kubernetes-api"})
    assert row.runtimes["default"].startswith("sha256:")
    assert list(lent.boundary.discover()) == []
