"""What a run with an API of its own is given, before any cluster sees it."""

import json
from typing import Any

import pytest

from service.core.boundary import BoundaryKind, BoundaryRef
from tests.sandboxes import MIB, make_ref, make_spec
from workers.kube import Manifest
from workers.kube.lint import Admission, pod_faults
from workers.kube.manifests import placeholders
from workers.pods.evidence import network
from workers.pods.own_api import (
    FOLDER,
    KUBECONFIG,
    network_with_own_api,
    own_api_cluster,
    own_api_environment,
    render_own_api,
    render_way_to_api,
    with_own_api,
)
from workers.pods.render import labels, render_namespace, render_pod

pytestmark = pytest.mark.unit
IMAGE = f"registry.example/run@sha256:{'0' * 64}"
AT = [("10.30.0.1", 6443), ("10.30.0.2", 6443)]
SPEC = make_spec(cpu=1, memory=512 * MIB)


def ref() -> BoundaryRef:
    made = make_ref(installation="0123456789abcdef0123456789abcdef")
    return made.model_copy(update={"kind": BoundaryKind.NAMESPACE, "variant": "gvisor"})


def pod(ref_: BoundaryRef) -> Manifest:
    return render_pod(ref_, SPEC, image=IMAGE, words=["first"], seconds=60)


def cluster_wide(**more: Any) -> list[Manifest]:
    values = {"images": [IMAGE], "runtime_class": "gvisor", "api_endpoints": AT} | more
    return list(own_api_cluster(values.pop("groups", ["apps", "plugin.example.net"]), **values))


def test_nothing_is_left_to_be_filled_in() -> None:
    made = [*cluster_wide(), *render_own_api(ref(), SPEC, api_endpoints=AT)]
    made += render_way_to_api(ref(), api_endpoints=AT)
    assert [one["metadata"]["name"] for one in made if placeholders(one)] == []


def policies(**egress: Any) -> list[Manifest]:
    """As a namespace of a run with an API has them; of the way out, `egress` is what is written instead."""
    (way,) = render_way_to_api(ref(), api_endpoints=AT)
    (deny,) = (one for one in render_namespace(ref(), SPEC) if one["kind"] == "NetworkPolicy")
    return [way | {"spec": way["spec"] | egress}, deny]


EVERYTHING = {"metadata": {"name": "control"}, "spec": {"podSelector": {}, "policyTypes": ["Egress"], "egress": [{}]}}


def test_only_the_way_to_the_api_server_beside_the_default_is_called_so() -> None:
    at, backwards = AT, AT[::-1]
    way, deny = policies()
    elsewhere = [way["spec"]["egress"][0], {"to": [{"ipBlock": {"cidr": "10.30.0.3/32"}}]}]
    for found, endpoints, word in [
        ([way, deny], at, "own-api"),
        ([deny, way], backwards, "own-api"),
        ([deny], at, "none"),
        ([], at, "open"),
        ([way], at, "open"),
        ([way, deny, EVERYTHING], at, "open"),
        ([deny, EVERYTHING], at, "open"),
        ([way, deny], at[:1], "open"),
        ([way, deny | {"spec": deny["spec"] | {"policyTypes": ["Ingress"]}}], at, "open"),
        (policies(egress=[{}]), at, "open"),
        (policies(egress=elsewhere), at, "open"),
        (policies(egress=None), at, "open"),
        (policies(ingress=[{}], policyTypes=["Ingress", "Egress"]), at, "open"),
        (policies(podSelector={"matchLabels": {"a": "b"}}), at, "open"),
    ]:
        assert network_with_own_api(found, ref(), api_endpoints=endpoints) == word, found


def test_the_pods_of_a_scenario_have_the_very_images_that_are_offered() -> None:
    another = IMAGE.replace("/run@", "/other@")
    made = [one for one in cluster_wide(images=[IMAGE, another]) if one["kind"] == "ValidatingAdmissionPolicy"]
    rules = [rule for one in made for rule in one["spec"]["validations"]]
    (rule,) = (one["expression"] for one in rules if one["message"].startswith("image: "))
    assert f"'{another},{IMAGE}'.split(',')" in rule


def test_a_pod_without_an_api_has_no_network_while_its_namespace_has_the_default_alone() -> None:
    way, deny = policies()
    assert [network(found) for found in ([deny], [], [way], [deny, way], [deny, EVERYTHING])] == [
        "none", "open", "open", "open", "open"
    ]  # fmt: skip


def test_a_way_leads_to_each_address_of_the_api_server_at_its_port_and_nowhere_else() -> None:
    policies = [
        one for one in [*render_way_to_api(ref(), api_endpoints=AT), *render_own_api(ref(), SPEC, api_endpoints=AT)]
        if one["kind"] == "NetworkPolicy" and one["metadata"]["name"] == "allow-api"
    ]  # fmt: skip
    assert [one["metadata"]["namespace"] for one in policies] == [ref_name(policies), "scenario"]
    for one in policies:
        assert one["spec"]["policyTypes"] == ["Egress"]
        assert one["spec"]["egress"] == [
            {"to": [{"ipBlock": {"cidr": f"{address}/32"}}], "ports": [{"protocol": "TCP", "port": port}]}
            for address, port in AT
        ]


def ref_name(policies: list[Manifest]) -> str:
    name: str = policies[0]["metadata"]["namespace"]
    assert name.startswith("bd-")
    return name


@pytest.mark.parametrize("endpoints", [[], [("kubernetes.default.svc", 443)]])
def test_no_way_leads_to_a_name_or_nowhere(endpoints: list[tuple[str, int]]) -> None:
    with pytest.raises(ValueError):
        render_way_to_api(ref(), api_endpoints=endpoints)


@pytest.mark.parametrize(
    "wrong",
    [{"groups": []}, {"groups": ["a' || true || '"]}, {"images": []}, {"images": [IMAGE, "registry.example/"]},
     {"images": ["registry.example/run:1"]}, {"images": [f"x' || '{IMAGE}"]}, {"images": [f"{IMAGE},registry"]},
     {"runtime_class": ""}, {"runtime_class": "x' || 'x"}, {"api_endpoints": []}],
)  # fmt: skip
def test_what_could_end_an_expression_early_or_match_too_much_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        cluster_wide(**wrong)


def test_the_pod_is_as_it_was_but_for_a_volume_and_a_note() -> None:
    mine = ref()
    before, after = pod(mine), with_own_api(pod(mine), api_endpoints=AT)
    assert after["spec"]["volumes"][:-1] == before["spec"]["volumes"]
    assert after["spec"]["containers"][0]["volumeMounts"].pop() == {
        "name": "kubernetes-api", "mountPath": FOLDER, "readOnly": True
    }  # fmt: skip
    (token, authority, note) = after["spec"]["volumes"].pop()["projected"]["sources"]
    assert token == {"serviceAccountToken": {"path": "token", "expirationSeconds": 600}}
    assert authority["configMap"]["name"] == "kube-root-ca.crt"
    assert note["downwardAPI"]["items"][0]["path"] == KUBECONFIG.rpartition("/")[2]
    kubeconfig = json.loads(after["metadata"].pop("annotations")["blastdoor.dev/kubeconfig"])
    assert kubeconfig["clusters"][0]["cluster"]["server"] == "https://10.30.0.1:6443"
    assert after == before


def test_an_address_of_ipv6_is_written_as_one() -> None:
    made = with_own_api(pod(ref()), api_endpoints=[("fd00::1", 6443)])
    assert "https://[fd00::1]:6443" in made["metadata"]["annotations"]["blastdoor.dev/kubeconfig"]
    (policy,) = render_way_to_api(ref(), api_endpoints=[("fd00::1", 6443)])
    assert policy["spec"]["egress"][0]["to"] == [{"ipBlock": {"cidr": "fd00::1/128"}}]


def test_our_own_check_takes_the_pod_in_a_cluster_of_its_own_and_in_no_other() -> None:
    mine = ref()
    made, said = with_own_api(pod(mine), api_endpoints=AT), labels(mine)
    own = Admission(image_prefix="registry.example/", max_s=1200, own_api=True)
    shared = Admission(image_prefix="registry.example/", max_s=1200)
    assert pod_faults(made, said, own) == []
    assert pod_faults(made, said, shared) == ["volumes"]
    for source in ({"secret": {"name": "x"}}, {"configMap": {"name": "x"}}, {"clusterTrustBundle": {"path": "x"}}):
        worse = with_own_api(pod(mine), api_endpoints=AT)
        worse["spec"]["volumes"][-1]["projected"]["sources"].append(source)
        assert pod_faults(worse, said, own) == ["volumes"]
    worse = with_own_api(pod(mine), api_endpoints=AT)
    worse["spec"]["volumes"][-1]["name"] = "another"
    assert pod_faults(worse, said, own) == ["volumes"]


def test_a_step_is_told_where_the_api_server_is_and_which_image_its_pods_can_have() -> None:
    assert own_api_environment(pod(ref()), api_endpoints=AT) == {
        "KUBECONFIG": f"{FOLDER}/kubeconfig",
        "KUBERNETES_SERVICE_HOST": "10.30.0.1",
        "KUBERNETES_SERVICE_PORT": "6443",
        "BLASTDOOR_IMAGE": IMAGE,
    }
