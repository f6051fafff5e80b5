"""One scenario, three tenants, three walls: from POST to result, with a real stack and a real worker on the lab.

The lab has one node, which cannot be shared by all and kept for one tenant at the same time. So it is shared first, and
kept for the tenant with affinity afterwards: what the worker offers follows by itself.
"""

import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.core.boundary import tenant_hash
from tests.cluster.engines import CHOICES
from tests.cluster.namespaces import Site
from tests.cluster.test_namespace_placement import node_of
from tests.cluster.whole_way import remains
from tests.stack import Document, NoStack, Stack, eventually, finished, post, run_stack
from tests.summary import ran
from workers.kube.install import wanted

EXAMPLE = Path(__file__).parents[2] / "examples/tenants"
"""What users read: the tenants, and the one scenario of all of them."""


@pytest.fixture(scope="module")
def stack(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Its worker builds nothing but pods, and looks at the cluster again every second."""
    given = {
        "BLASTDOOR_BOUNDARIES": '["namespace"]', "BLASTDOOR_KUBECONFIG": str(site.ready.engine_kubeconfig),
        "BLASTDOOR_KUBE_IMAGE": site.image, "BLASTDOOR_PROBE_S": "1",
    }  # fmt: skip
    try:
        with run_stack(tmp_path_factory.mktemp("walls"), **given) as stack:
            yield stack
    except NoStack as missing:
        pytest.skip(str(missing))
    assert remains(site, stack.installation) == []


def tenant(stack: Stack, name: str, **words: Any) -> httpx.Client:
    answer = stack.admin.post("/v1/admin/tenants", json={"name": name} | words)
    assert answer.status_code == 201, answer.text
    return stack.client(answer.json()["key"])


def of_the_example(stack: Stack, name: str) -> httpx.Client:
    bodies = {body["name"]: body for body in json.loads((EXAMPLE / "tenants.json").read_text())}
    return tenant(stack, **bodies[name])


def submitted(client: httpx.Client) -> httpx.Response:
    """The answer to the example's scenario."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.add(EXAMPLE / "scenario", arcname=".")
    return post(client, bundle=packed.getvalue())


def refusal(client: httpx.Client) -> Document | None:
    """None when the scenario is accepted; that run is not waited for."""
    answer = submitted(client)
    if answer.status_code == 202:
        client.post(f"/v1/runs/{answer.json()['id']}/cancel")
        return None
    assert answer.status_code == 422, answer.text
    said: Document = answer.json()
    assert said["code"] == "placement_refused", said
    return said


def played(client: httpx.Client) -> Document:
    """The finished run of the scenario, which can be placed now or in a moment."""
    answer = eventually(lambda: accepted if (accepted := submitted(client)).status_code == 202 else None)
    assert answer is not None, submitted(client).text
    run = finished(client, answer.json()["id"], within_s=120)
    assert run["outcome"] == "passed", run
    ran("boundary", run["placement"]["boundary"])
    return run


def lacking(refused: Document) -> dict[str, str]:
    return {row["boundary"]: row["missing"] for row in refused["candidates"]}


def rejected(run: Document) -> dict[str, str]:
    return {row["boundary"]: row["missing"] for row in run["placement"]["rejected"]}


@contextmanager
def without_gvisor(site: Site) -> Iterator[None]:
    site.ready.admin.delete("RuntimeClass", "gvisor")
    try:
        yield
    finally:
        for manifest in wanted(CHOICES):
            if (manifest["kind"], manifest["metadata"]["name"]) == ("RuntimeClass", "gvisor"):
                site.ready.admin.apply(manifest)


def test_the_same_scenario_lands_behind_three_walls_and_each_says_why(stack: Stack, site: Site) -> None:
    soft = played(of_the_example(stack, "house"))
    hard = played(of_the_example(stack, "stranger"))
    own = of_the_example(stack, "acme")
    not_yet = refusal(own)
    with node_of(site.ready, "acme") as node:
        near = played(own)

    assert not_yet is not None, "no node is kept for it"
    assert "nodes >= dedicated" in not_yet["detail"]
    assert lacking(not_yet)["namespace/runc"] == "nodes >= dedicated"
    assert lacking(not_yet)["namespace/runc+affinity"] == "no live worker has a node in group acme that is kept for it"

    walls = {name: run["placement"]["boundary"] for name, run in (("soft", soft), ("near", near), ("hard", hard))}
    assert walls == {"soft": "namespace/runc", "near": "namespace/runc+affinity", "hard": "namespace/gvisor"}
    assert soft["placement"]["why"] == ["tenant house is trusted and nothing more was asked"]
    assert near["placement"]["why"] == ["tenant acme has affinity to node group acme: nodes >= dedicated"]
    assert hard["placement"]["why"] == ["tenant stranger is untrusted: kernel >= sandboxed"]
    assert rejected(soft)["namespace/gvisor"] == "nothing; namespace/runc ranks before it (10 < 40)"
    assert rejected(near)["namespace/runc"] == "nodes >= dedicated"
    assert rejected(hard)["namespace/runc"] == "kernel >= sandboxed"
    guarantees = [run["placement"]["guarantees"] for run in (soft, near, hard)]
    assert [(one["kernel"], one["nodes"]) for one in guarantees] == [
        ("shared", "shared"), ("shared", "dedicated"), ("sandboxed", "shared")
    ]  # fmt: skip
    assert [run["placement"]["node_group"] for run in (soft, near, hard)] == [None, "acme", None]

    seen = {run["tenant"]: run["evidence"] for run in (soft, near, hard)}
    assert [seen[name]["runtime"] for name in ("house", "acme", "stranger")] == [
        "node default",
        "node default",
        "runsc",
    ]
    assert [seen[name]["node"]["group"] for name in ("house", "acme", "stranger")] == [None, "acme", None]
    assert {evidence["node"]["name"] for evidence in seen.values()} == {node}
    assert {evidence["network"] for evidence in seen.values()} == {"none"}
    installation = stack.installation
    assert seen["house"]["namespace"]["name"] == f"bd-t-{tenant_hash(installation, 'house')}"
    assert seen["acme"]["namespace"]["name"] == f"bd-t-{tenant_hash(installation, 'acme')}"
    assert seen["stranger"]["namespace"]["name"] == f"bd-{hard['id'].removeprefix('run_')}-f1", "of this run alone"
    kernels = {run["tenant"]: run["steps"][0]["stdout"]["text"].split()[1] for run in (soft, near, hard)}
    assert kernels["house"] == kernels["acme"] == seen["house"]["node"]["kernel"], "the guest agrees; it was not asked"
    assert kernels["stranger"] != kernels["house"]
    assert len({evidence["uid"] for evidence in seen.values()}) == 3


def test_an_untrusted_tenant_of_a_cluster_without_gvisor_is_refused_and_runs_nowhere(stack: Stack, site: Site) -> None:
    stranger = tenant(stack, "nobody", trust="untrusted")
    with without_gvisor(site):
        refused = eventually(lambda: refusal(stranger))
        assert refused is not None, "it is still accepted"
        assert refused["requirements"] == {"kernel": "sandboxed"}
        assert "kernel >= sandboxed" in refused["detail"]
        assert lacking(refused)["namespace/runc"] == "kernel >= sandboxed", "that it can be built is no reason"
        assert "RuntimeClass gvisor" in lacking(refused)["namespace/gvisor"]
        rows = {row["boundary"]: row for row in stranger.get("/v1/capabilities").json()["boundaries"]}
        assert not rows["namespace/gvisor"]["available"]
        assert "RuntimeClass gvisor" in rows["namespace/gvisor"]["missing"][0]
        assert rows["namespace/runc"]["available"]
        ceilings = {"limits": {"memory": "512MiB"}}
        soft = played(tenant(stack, "soft", trust="trusted", quota={"concurrent": 3}, ceilings=ceilings))
        assert soft["placement"]["boundary"] == "namespace/runc", "the control: there is a worker, and it can build"
    quota = site.ready.admin.get("ResourceQuota", "blastdoor", soft["evidence"]["namespace"]["name"])
    assert quota is not None
    assert (quota["spec"]["hard"]["pods"], int(quota["spec"]["hard"]["limits.memory"])) == ("3", 3 * 512 * 2**20)
    assert played(stranger)["placement"]["boundary"] == "namespace/gvisor"
    mine = {"blastdoor.dev/tenant-hash": tenant_hash(stack.installation, "nobody"), "blastdoor.dev/variant": "runc"}
    assert site.ready.admin.list("Pod", labels=mine) == site.ready.admin.list("Namespace", labels=mine) == []
