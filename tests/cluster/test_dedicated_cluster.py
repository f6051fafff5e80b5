"""A whole cluster for one run, from POST to result: a real worker, real kind on a real engine, gVisor in its node.

Few clusters, since each takes this machine half a minute at best; what the parts do one by one is in test_kind_*.py.
"""

import json

import httpx
import pytest

from tests.cluster.dedicated_ground import Ground, boundary, ground
from tests.cluster.engine.fixture import engine
from tests.sse import watching
from tests.stack import Document, eventually, finished, submit
from tests.summary import ran

__all__ = ["engine", "ground"]
pytestmark = pytest.mark.timeout(1500)
MADE_WITHIN_S = 600.0
"""Beside other tests: idle it takes a tenth of this."""
OWN = {"isolation": "dedicated-cluster"}
LIMITS = {"wall": "300s", "memory": "256MiB"}


def test_two_untrusted_tenants_have_a_cluster_each_and_cannot_see_the_others(ground: Ground) -> None:
    """The first waits in its cluster, with its API; the second, in its own, looks for the first."""
    one, other = ground.stack.tenant, ground.stack.new_tenant("another")
    api = {"needs": ["kubernetes-api"]}
    waiting = submit(one, 'kubectl get configmaps -o name; until kubectl get configmap go; do sleep 1; done',
                     'kubectl create configmap kept --from-literal=x=1 && kubectl get configmap kept -o name',
                     limits=LIMITS, controls=api)  # fmt: skip
    told = _told_until_running(one, waiting)
    assert {"preparing nodes", "getting the cluster ready", "making the pod", "checking its walls"} <= set(told), told
    address = ground.address_of(waiting)

    reach = f"nc -z -w 3 $T {6443}"
    looking = submit(other, {"run": reach, "env": {"T": address}, "continue_on_failure": True},
                     {"run": f"nc -z -w 3 $KUBERNETES_SERVICE_HOST {6443}"},
                     {"run": f"nc -z -w 3 $KUBERNETES_SERVICE_HOST {10250}", "continue_on_failure": True},
                     {"run": "nc -z -w 3 169.254.169.254 80", "continue_on_failure": True},
                     {"run": f"kubectl --server https://{address}:6443 get pods", "continue_on_failure": True},
                     limits=LIMITS, controls=api)  # fmt: skip
    looked = finished(other, looking, within_s=MADE_WITHIN_S)

    passed = [step["outcome"] for step in looked["steps"]]
    assert passed == ["failed", "passed", "failed", "failed", "failed"], looked["steps"]
    assert _landed(looked)["network"] == "own-api"
    _say_go(ground, waiting)
    run = finished(one, waiting, within_s=MADE_WITHIN_S)
    assert run["outcome"] == "passed", run
    assert run["steps"][1]["stdout"]["text"].endswith("configmap/kept\n")
    assert _landed(run)["runtime"] == "runsc"
    assert eventually(lambda: one.get(f"/v1/runs/{waiting}").json()["boundary_destroyed_at"], within_s=90)


def test_a_run_that_wants_a_cluster_and_no_api_has_no_network_and_sees_gvisor(ground: Ground) -> None:
    run_id = submit(ground.stack.tenant, "uname -r > out; cat out; env", limits=LIMITS, controls=OWN, artifacts=["out"])
    run = finished(ground.stack.tenant, run_id, within_s=MADE_WITHIN_S)
    said = run["steps"][0]["stdout"]["text"]
    assert (run["outcome"], _landed(run)["network"]) == ("passed", "none")
    assert "gvisor" in said
    assert "KUBE" not in said, "nothing says where an API server is"
    assert [one["path"] for one in run["artifacts"]] == ["out"]
    assert run["placement"]["guarantees"] == {"kernel": "sandboxed", "nodes": "shared", "control_plane": "dedicated"}


def test_privileges_never_land_on_kind(ground: Ground) -> None:
    body = {"name": "a test", "steps": [{"name": "one", "run": "true"}]}
    files = {"scenario": ("s.json", json.dumps(body)), "controls": ("c.json", json.dumps({"needs": ["privileged"]}))}
    answer = ground.stack.tenant.post("/v1/runs", files=files)
    assert (answer.status_code, answer.json()["code"]) == (422, "placement_refused")
    rows = {row["boundary"]: row["missing"] for row in answer.json()["candidates"]}
    assert rows["cluster/kind"] == "kernel >= dedicated"


def _landed(run: Document) -> Document:
    """Its evidence, once it is seen that it was played in a cluster by kind."""
    assert run["placement"]["boundary"] == "cluster/kind", run["placement"]
    evidence: Document = run["evidence"]
    assert (evidence["cluster"], evidence["runtime_class"]) == ("cluster/kind", "gvisor"), evidence
    ran("boundary", "cluster/kind")
    return evidence


def _told_until_running(client: httpx.Client, run_id: str) -> list[str]:
    """What a watcher is told of the making."""
    told = []
    with watching(client, run_id, timeout_s=MADE_WITHIN_S) as events:
        for event in events:
            if event.event == "progress" and event.json["stage"] == "boundary" and event.json["text"]:
                told.append(str(event.json["text"]))
            if event.event == "progress" and event.json["stage"] == "step":
                return told
    raise AssertionError(f"it never ran; told: {told}")


def _say_go(ground: Ground, run: str) -> None:
    """As the cluster's administrator, by kind's own file in the node: the worker's kubeconfig is nobody else's."""
    asked = ["exec", f"{boundary(run)}-control-plane", "kubectl", "--kubeconfig=/etc/kubernetes/admin.conf"]
    eventually(
        lambda: "go" in ground.docker(*asked, "create", "configmap", "go", "--namespace=scenario")[0], within_s=30
    )
