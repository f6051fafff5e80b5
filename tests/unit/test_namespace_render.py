"""The isolation policy of the namespace boundary, as whole documents: read golden/namespace_*.json in review."""

import json
from copy import deepcopy
from datetime import UTC, datetime, timedelta

import pytest

from service.core.boundary import BoundaryKind, BoundaryRef, BoundarySpec, Share, tenant_hash
from service.core.controls import Limits, Network
from service.core.errors import ProvisionFailed
from tests.unit.test_gvisor_render import assert_golden
from workers.kube import Admission, Manifest, pod_faults
from workers.pods.render import (
    MAX_SECONDS,
    VARIANTS,
    labels,
    namespace_name,
    read_labels,
    render_listener_namespace,
    render_listener_pod,
    render_namespace,
    render_pod,
)

IMAGE = "registry.example/blastdoor/runtime@sha256:" + "a" * 64
SPEC = BoundarySpec(limits=Limits(), network=Network())
WORDS = ["first", "10.0.0.7", "4711"]
HOSTILE = "acme\n  ${x}: {{namespace}} blastdoor.dev/run=1 kubernetes.io/x " + "a" * 80


def ref_of(variant: str, *, tenant: str = "acme", site: str = "here", run: str = "0" * 31 + "1") -> BoundaryRef:
    return BoundaryRef(
        installation="inst0", kind=BoundaryKind.NAMESPACE, variant=variant, site=site, tenant=tenant,
        run_id=f"run_{run}", fence=2, expires_at=datetime(2026, 1, 2, 3, 4, 5, 600, tzinfo=UTC),
    )  # fmt: skip


def pod_of(variant: str, **more: object) -> Manifest:
    spec = SPEC.model_copy(update=more)
    return render_pod(ref_of(variant), spec, image=IMAGE, words=WORDS, seconds=210)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_pod_of_each_variant(variant: str) -> None:
    assert_golden(f"namespace_pod_{variant}.json", pod_of(variant))


def test_the_pod_on_its_tenants_own_nodes() -> None:
    assert_golden("namespace_pod_affinity.json", pod_of("runc", node_group="blue"))


def test_the_namespace_of_a_run_and_the_one_that_a_tenants_runs_share() -> None:
    assert_golden("namespace_gvisor.json", render_namespace(ref_of("gvisor"), SPEC))
    assert_golden("namespace_runc.json", render_namespace(ref_of("runc"), SPEC))


def test_the_listener_and_its_namespace() -> None:
    pod = render_listener_pod("listener-1", "inst0", "here", image=IMAGE, words=["listen", "4711"])
    assert_golden("namespace_listener.json", [*render_listener_namespace("inst0", "here"), pod])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_pod_keeps_the_rules_that_admission_has(variant: str) -> None:
    admission = Admission(image_prefix="registry.example/", max_s=MAX_SECONDS)
    pod, namespace = (
        pod_of(variant, node_group="blue"),
        render_namespace(ref_of(variant), SPEC)[0]["metadata"]["labels"],
    )
    assert pod_faults(pod, namespace, admission) == []
    weaker = deepcopy(pod)  # the check can fire
    weaker["spec"]["containers"][0]["securityContext"]["readOnlyRootFilesystem"] = False
    assert pod_faults(weaker, namespace, admission) != []


def test_the_pod_fits_its_own_quota_and_limit_range() -> None:
    for variant in VARIANTS:
        pod, walls = pod_of(variant), {one["kind"]: one for one in render_namespace(ref_of(variant), SPEC)}
        most = pod["spec"]["containers"][0]["resources"]["limits"]
        quota = walls["ResourceQuota"]["spec"]["hard"]
        range_ = walls["LimitRange"]["spec"]["limits"][0]["max"]
        overhead = (0, 0) if variant == "runc" else (160 * 2**20, 250)  # kata's, the largest, counts too
        assert int(quota["limits.memory"]) >= int(most["memory"]) + overhead[0]
        assert int(quota["limits.cpu"].removesuffix("m")) >= int(most["cpu"].removesuffix("m")) + overhead[1]
        assert int(range_["memory"]) >= int(most["memory"])
        assert int(range_["cpu"].removesuffix("m")) >= int(most["cpu"].removesuffix("m"))


def test_a_tenants_own_namespace_has_what_its_runs_may_have_together_and_no_more() -> None:
    limits = Limits(cpu=0.5, memory=64 * 2**20)
    spec = SPEC.model_copy(update={"share": Share(runs=3, limits=limits)})
    walls = {one["kind"]: one.get("spec", {}) for one in render_namespace(ref_of("runc"), spec)}
    hard = walls["ResourceQuota"]["hard"]
    assert (hard["pods"], hard["limits.cpu"], hard["limits.memory"]) == ("3", "1500m", str(3 * 64 * 2**20))
    assert walls["LimitRange"]["limits"][0]["max"]["memory"] == str(64 * 2**20)
    own = {one["kind"]: one.get("spec", {}) for one in render_namespace(ref_of("gvisor"), spec)}
    assert own["ResourceQuota"]["hard"]["pods"] == "1", "a run's own namespace is for that run"


def test_soft_runs_share_their_tenants_namespace_and_all_others_have_their_own() -> None:
    one, other = ref_of("runc"), ref_of("runc", run="f" * 32)
    assert namespace_name(one) == namespace_name(other) != namespace_name(ref_of("runc", tenant="bolt"))
    assert namespace_name(ref_of("gvisor")) == ref_of("gvisor").name
    assert render_namespace(one, SPEC) == render_namespace(other, SPEC), "it must not depend on the run"


def test_pods_of_different_runs_have_different_users_and_none_is_a_systems() -> None:
    uids = {
        render_pod(ref_of("runc", run=f"{n:032x}"), SPEC, image=IMAGE, words=WORDS, seconds=9)["spec"][
            "securityContext"
        ]["runAsUser"]
        for n in range(200)
    }
    assert len(uids) == 200
    assert min(uids) >= 100_000
    assert max(uids) < 2**31


@pytest.mark.parametrize("site", ["here", "a site\nwith: more", "x" * 64])
def test_text_of_others_is_nowhere_but_as_a_hash_and_labels_read_back(site: str) -> None:
    ref = ref_of("gvisor", tenant=HOSTILE, site=site)
    manifests = [*render_namespace(ref, SPEC), render_pod(ref, SPEC, image=IMAGE, words=WORDS, seconds=9)]
    text = json.dumps(manifests)
    assert "acme" not in text
    assert "${x}" not in text
    for manifest in manifests:
        for value in manifest["metadata"].get("labels", {}).values():
            assert len(value) <= 63
            assert "\n" not in value
    read = read_labels(labels(ref), site=site)
    assert read is not None
    assert (read.name, read.site, read.variant, read.fence) == (ref.name, site, "gvisor", 2)
    assert read.tenant == tenant_hash("inst0", HOSTILE)
    assert timedelta(0) <= read.expires_at - ref.expires_at < timedelta(seconds=1)


def test_what_is_not_a_runs_is_no_reference() -> None:
    good = labels(ref_of("gvisor"))
    assert read_labels(good, site="here") is not None
    for key, value in (("run", ""), ("run", "run_1"), ("variant", "x"), ("fence", "one"), ("kind", "y")):
        assert read_labels(good | {f"blastdoor.dev/{key}": value}, site="here") is None
    assert read_labels({}, site="here") is None


def test_no_pod_lives_longer_than_admission_allows() -> None:
    for seconds in (0, MAX_SECONDS + 1):
        with pytest.raises(ProvisionFailed):
            render_pod(ref_of("gvisor"), SPEC, image=IMAGE, words=WORDS, seconds=seconds)
