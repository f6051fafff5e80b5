"""The lab's own network policy controller: what it makes of policies; that it enforces them, test_lab.py shows."""

import subprocess
from typing import Any

import pytest

from tests.cluster.lab.parts import Parts
from tests.cluster.lab.policy import removal, ruleset, selects

LABELS = {"tier": "web", "zone": "a"}


def make_pod(name: str, address: str | None, *, namespace: str = "here", **more: Any) -> dict[str, Any]:
    ports = [{"name": "http", "containerPort": 8080}, {"name": "names", "containerPort": 53, "protocol": "UDP"}]
    return {
        "metadata": {"name": name, "namespace": namespace, "labels": {"name": name}},
        "spec": {"containers": [{"ports": ports}], **more.pop("spec", {})},
        "status": {"phase": "Running", "podIP": address, **more},
    }


def make_policy(*, namespace: str = "here", **spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": "one", "namespace": namespace}, "spec": {"podSelector": {}, **spec}}


def rules_for(*policies: dict[str, Any]) -> str:
    pods = [
        make_pod("a", "10.0.0.1"),
        make_pod("b", "10.0.0.2"),
        make_pod("c", "10.0.0.3", namespace="there"),
        make_pod("ended", "10.0.0.4", phase="Succeeded"),
        make_pod("not-yet", None),
        make_pod("of-the-node", "10.0.0.5", spec={"hostNetwork": True}),
    ]
    namespaces: list[dict[str, Any]] = [
        {"metadata": {"name": "here"}},
        {"metadata": {"name": "there", "labels": {"friendly": "yes"}}},
    ]
    return ruleset(pods, namespaces, policies)


def chain(rules: str, name: str) -> list[str]:
    """The rules of one chain, each with its words one space apart."""
    _, found, after = rules.partition(f"chain {name} {{")
    assert found, f"no chain {name} in:\n{rules}"
    return [" ".join(line.split()) for line in after.partition("\n}")[0].strip().splitlines()]


@pytest.mark.parametrize(
    ("selector", "chosen"),
    [
        ({}, True),
        ({"matchLabels": {"tier": "web"}}, True),
        ({"matchLabels": {"tier": "web", "zone": "b"}}, False),
        ({"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a", "b"]}]}, True),
        ({"matchExpressions": [{"key": "zone", "operator": "NotIn", "values": ["a"]}]}, False),
        ({"matchExpressions": [{"key": "new", "operator": "NotIn", "values": ["a"]}]}, True),
        ({"matchExpressions": [{"key": "tier", "operator": "Exists"}]}, True),
        ({"matchExpressions": [{"key": "tier", "operator": "DoesNotExist"}]}, False),
    ],
)
def test_a_selector_chooses_by_labels(selector: dict[str, Any], chosen: bool) -> None:
    assert selects(selector, LABELS) is chosen


def test_without_a_policy_no_pod_is_in_a_chain() -> None:
    assert "jump" not in rules_for()


def test_a_policy_that_allows_nothing_drops_for_the_pods_of_its_namespace_alone() -> None:
    rules = rules_for(make_policy(policyTypes=["Egress"]))
    assert chain(rules, "egress_10_0_0_1") == chain(rules, "egress_10_0_0_2") == ["drop"]
    assert rules.count("jump") == 2


def test_the_direction_is_in_unless_the_policy_says_otherwise() -> None:
    assert "ingress_10_0_0_1" in rules_for(make_policy())
    assert "egress_10_0_0_1" not in rules_for(make_policy())
    assert "egress_10_0_0_1" in rules_for(make_policy(egress=[]))


@pytest.mark.parametrize(
    ("rule", "lines"),
    [
        ({}, ["return"]),
        ({"to": [{"podSelector": {"matchLabels": {"name": "b"}}}]}, ["ip daddr { 10.0.0.2 } return"]),
        ({"to": [{"podSelector": {"matchLabels": {"name": "c"}}}]}, []),
        (
            {"to": [{"namespaceSelector": {"matchLabels": {"friendly": "yes"}}}]},
            ["ip daddr { 10.0.0.3 } return"],
        ),
        ({"to": [{"namespaceSelector": {}}]}, ["ip daddr { 10.0.0.1, 10.0.0.2, 10.0.0.3 } return"]),
        (
            {"to": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}]},
            ["ip daddr 10.0.0.0/8 ip daddr != 10.1.0.0/16 return"],
        ),
        ({"to": [{"ipBlock": {"cidr": "::/0"}}]}, []),
        ({"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53}]}, ["udp dport 53 return", "tcp dport 53 return"]),
        ({"ports": [{"port": 8000, "endPort": 8010}]}, ["tcp dport 8000-8010 return"]),
        ({"ports": [{"protocol": "SCTP"}]}, ["meta l4proto sctp return"]),
        (
            {"to": [{"podSelector": {"matchLabels": {"name": "b"}}}], "ports": [{"port": "http"}]},
            [f"ip daddr {{ 10.0.0.2 }} ip daddr 10.0.0.{n} tcp dport 8080 return" for n in (1, 2, 3)],
        ),
    ],
)
def test_what_a_rule_lets_out(rule: dict[str, Any], lines: list[str]) -> None:
    rules = rules_for(make_policy(podSelector={"matchLabels": {"name": "a"}}, policyTypes=["Egress"], egress=[rule]))
    assert chain(rules, "egress_10_0_0_1") == [*lines, "drop"]


def test_a_named_port_that_is_let_in_is_one_of_the_pod_itself() -> None:
    rules = rules_for(make_policy(ingress=[{"ports": [{"port": "names", "protocol": "UDP"}, {"port": "names"}]}]))
    assert chain(rules, "ingress_10_0_0_1") == ["udp dport 53 return", "drop"]


def test_the_kernel_takes_every_kind_of_rule(built: Parts) -> None:
    """Two times in a row, in a network namespace that ends with it; and it does refuse what is none."""
    rule = {
        "to": [{"namespaceSelector": {}}, {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}],
        "ports": [{"port": 80}, {"port": 8000, "endPort": 8010}, {"protocol": "SCTP"}, {"port": "http"}],
    }
    rules = rules_for(make_policy(policyTypes=["Ingress", "Egress"], egress=[rule], ingress=[{}]))
    assert load(built, rules + rules + removal()) == ""
    assert "syntax error" in load(built, rules + "nonsense")


def load(have: Parts, rules: str) -> str:
    """-> what nft says against it."""
    done = subprocess.run(
        ["unshare", "--net", have.program("nft"), "-f", "-"],
        env={"PATH": have.path, "LD_LIBRARY_PATH": have.libraries},
        input=rules,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stderr
