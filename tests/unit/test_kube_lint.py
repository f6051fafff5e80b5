"""Our own check of a pod, before anything is sent: each rule has pods that break it and nothing else."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.mutants import FIXTURES, MUTANTS, mutants, of_the_standard
from workers.kube import Admission, pod_faults, templates
from workers.kube.canary import any_image, namespace_manifests, plain_pod
from workers.kube.lint import RULES, VARIANTS

ADMISSION = Admission(image_prefix="blastdoor.test/", max_s=1200)


def room(variant: str) -> dict[str, Any]:
    return namespace_manifests("bd-check", variant=variant)[0]


def pod(variant: str = "gvisor") -> dict[str, Any]:
    return plain_pod(room(variant), any_image(ADMISSION.image_prefix))


def faults(of: dict[str, Any], variant: str = "gvisor") -> list[str]:
    return pod_faults(of, room(variant)["metadata"]["labels"], ADMISSION)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_plain_pod_of_each_variant_breaks_no_rule(variant: str) -> None:
    assert faults(pod(variant), variant) == []


@pytest.mark.parametrize("name", mutants(pod()))
def test_a_mutant_breaks_its_rule_and_no_other(name: str) -> None:
    rule, mutant = mutants(pod())[name]
    assert faults(mutant) == [rule]


def test_every_rule_has_a_mutant() -> None:
    assert {rule for rule, _ in mutants(pod()).values()} == set(RULES)
    assert len(MUTANTS) > len(RULES)


def test_a_pod_of_one_variant_is_refused_in_the_namespace_of_another() -> None:
    for mine in VARIANTS:
        for other in set(VARIANTS) - {mine}:
            assert "runtime-class" in faults(pod(mine), other)
    assert "runtime-class" in pod_faults(pod("runc"), {}, ADMISSION)


@pytest.mark.parametrize("name", FIXTURES)
def test_what_must_fail_by_the_standard_fails_here(name: str) -> None:
    assert faults(of_the_standard(pod(), name))


def test_all_that_must_fail_by_the_standard_is_there() -> None:
    assert len(FIXTURES) == 74


def test_the_api_server_is_given_the_same_rules_by_the_same_names() -> None:
    policy = next(one for one in templates("admission") if one["metadata"]["name"] == "blastdoor-pods")
    messages = [one["message"] for one in policy["spec"]["validations"]]
    assert [re.match(r"[a-z-]+(?=: )", message)[0] for message in messages] == list(RULES)  # type: ignore[index]


def test_every_rule_of_the_other_policies_is_broken_by_a_test_too() -> None:
    """A rule is known by the first word of its message; a test that sees it refuse has that word in its pattern."""
    policies = [one for one in templates("admission") if one["kind"] == "ValidatingAdmissionPolicy"]
    messages = [row["message"] for one in policies for row in one["spec"]["validations"]]
    others = {message.partition(":")[0] for message in messages} - set(RULES)
    assert others == {"contents", "tokens", "engine", "interactive", "own", "complete", "lasting"}, (
        "labels is a rule of pods too"
    )
    tests = "".join(path.read_text() for path in (Path(__file__).parents[1] / "cluster").glob("test_*.py"))
    broken = set(re.findall(r"match=r?\"\(?([a-z|]+)\)?: ", tests)) | set(re.findall(r"\"(interactive): ", tests))
    assert {word for words in broken for word in words.split("|")} >= others
