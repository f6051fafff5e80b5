"""D38 and D39 in a cluster, the whole way: what a tenant writes reaches no object of the API server.

What it may not say is refused (422); what it may is kept in its run's record, and each object of the run is read back
and looked through.
"""

import json
import re
from typing import Any

import pytest

from service.core.boundary import boundary_name, tenant_hash
from tests.cluster.whole_way import VARIANTS, WAIT, Ground, landed
from tests.stack import finished, post, submit
from workers.kube import ClusterError, Manifest

SETTINGS = {
    "io.katacontainers.config_path": "/tmp/x.toml",
    "io.katacontainers.config.hypervisor.virtio_fs_extra_args": "[]",
    "dev.gvisor.flag.network": "host",
    "dev.gvisor.spec.mount.scratch.options": "rw,exec",
    "container.apparmor.security.beta.kubernetes.io/run": "unconfined",
}
"""What shims and kubelets take from annotations (CVE-2026-44210, CVE-2026-50540)."""
TEXT = "d39-tenants-own-text"
LABEL = re.compile(r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?", re.ASCII)
NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", re.ASCII)
KINDS = ("Pod", "NetworkPolicy", "ResourceQuota", "LimitRange", "ServiceAccount")
OWN = {"installation", "variant", "managed", "tenant-hash", "run", "fence", "expires-at", "kind", "site", "opened"}


@pytest.mark.parametrize("key", ["annotations", "labels", "runtimeClassName", "nodeSelector", "securityContext"])
def test_d38_controls_and_scenario_know_no_word_of_a_pods(ground: Ground, key: str) -> None:
    value: Any = SETTINGS if key in ("annotations", "labels") else "x"
    for asked, code in (({"controls": {key: value}}, "controls_invalid"), ({key: value}, "scenario_invalid")):
        answer = post(ground.stack.tenant, "true", **asked)
        assert (answer.status_code, answer.json()["code"]) == (422, code)
    for step in ({"run": "true", key: value},):
        assert post(ground.stack.tenant, step).status_code == 422
    assert post(ground.stack.tenant, "true").status_code == 202, "control: without it the same is accepted"


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture(scope="module")
def read_back(ground: Ground, variant: str) -> dict[str, list[Manifest]]:
    """All objects of a run that says as much as it may, as the API server has them while it plays."""
    text = f"{TEXT} ${{IFS}} $(x) `y` {{{{namespace}}}} : - & *x %s ' \" pod-security.kubernetes.io/enforce" + "x" * 40
    client = ground.tenant(variant)
    metadata = {"note": f"{TEXT}\n: {text}", "dev.gvisor.flag.network": TEXT}
    run_id = submit(
        client, {"run": WAIT, "name": text, "env": {"X": text}}, name=text, metadata=metadata, bundle=None,
    )  # fmt: skip
    ground.wait_for_file(run_id, "plays")
    pod = ground.pod(run_id)
    room = pod["metadata"]["namespace"]
    admin = ground.site.ready.admin
    found = {kind: admin.list(kind, room) for kind in KINDS}
    found["Namespace"] = [one for one in admin.list("Namespace") if one["metadata"]["name"] == room]
    found["Pod"] = [pod]
    ground.let_go(run_id)
    run = landed(finished(client, run_id, within_s=120), variant)
    kept = (run["scenario"]["name"], run["steps"][0]["name"], run["metadata"])
    assert kept == (text, text, metadata), "control: it is kept where it belongs"
    assert pod["metadata"]["name"] == boundary_name(run_id, 1)
    return found


def test_d39_a_tenants_text_stands_in_no_object(ground: Ground, read_back: dict[str, list[Manifest]]) -> None:
    assert {kind for kind, rows in read_back.items() if rows} == {*KINDS, "Namespace"}, "control: all were found"
    said = json.dumps(read_back)
    assert TEXT not in said
    for name in ("demo", "soft", "IFS", "{{"):
        assert not re.search(rf'"[^"]*{re.escape(name)}[^"]*"', said), name


def test_d38_no_annotation_but_the_clusters_own_is_on_any(read_back: dict[str, list[Manifest]]) -> None:
    pod, namespace = read_back["Pod"][0]["metadata"], read_back["Namespace"][0]["metadata"]
    assert pod.get("annotations", {}) == {}
    assert namespace.get("annotations", {}) == {}


def test_d39_every_label_is_one_of_ours_well_formed_and_what_it_should_be(
    ground: Ground, variant: str, read_back: dict[str, list[Manifest]]
) -> None:
    tenant = "demo" if variant == "gvisor" else "soft"
    for kind in ("Pod", "Namespace"):
        (found,) = read_back[kind]
        labels = found["metadata"]["labels"]
        ours = {key.removeprefix("blastdoor.dev/"): value for key, value in labels.items() if "blastdoor" in key}
        assert set(ours) <= OWN
        assert ours["tenant-hash"] == tenant_hash(ground.stack.installation, tenant)
        assert ours["variant"] == variant
        assert all(LABEL.fullmatch(value) for value in labels.values()), labels
        assert NAME.fullmatch(found["metadata"]["name"])
        theirs = {key for key in labels if "blastdoor" not in key}
        allowed = {"kubernetes.io/metadata.name"} if kind == "Namespace" else set()
        assert {key for key in theirs if not key.startswith("pod-security.kubernetes.io/")} == allowed


def test_control_such_an_annotation_is_refused_even_when_the_engine_says_it(
    ground: Ground, variant: str, read_back: dict[str, list[Manifest]]
) -> None:
    """By admission, which is asked after us: in the namespace of the listener, which stands."""
    (pod,) = read_back["Pod"]
    engine = ground.site.ready.engine
    room = f"bd-listener-{ground.stack.installation}"
    listener = engine.list("Pod", room)[0]
    for key, value in SETTINGS.items():
        copy = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "mine", "namespace": room, "labels": listener["metadata"]["labels"]},
            "spec": {key_: value_ for key_, value_ in listener["spec"].items() if key_ not in ("nodeName", "priority")},
        }
        engine.create(copy, dry_run=True)
        copy["metadata"] = {**copy["metadata"], "annotations": {key: value}}
        with pytest.raises(ClusterError, match=r"(annotations: |violates PodSecurity)"):
            engine.create(copy, dry_run=True)
    assert pod["spec"].get("runtimeClassName", "runc") == variant
