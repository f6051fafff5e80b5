"""Templates are filled strictly, and what a cluster is given is compared with what it has."""

from typing import Any

import pytest

from workers.kube import filled, placeholders, templates
from workers.kube.exec_ import ExecEnded, read_status
from workers.kube.install import ENGINE, Choices, differences, wanted

TEMPLATE: dict[str, Any] = {
    "kind": "Thing",
    "metadata": {"name": "{{name}}", "labels": {"a": "{{number}}", "b": "x-{{name}}"}},
    "spec": {"count": "{{number}}", "list": [{"of": "{{mapping}}"}], "text": "is {{number}}!", "plain": 3},
}
VALUES = {"name": "one", "number": 7, "mapping": {"k": "v"}}
NAMESPACE = ["Namespace", "LimitRange", "NetworkPolicy", "ResourceQuota", "ServiceAccount", "ServiceAccount"]


def test_a_placeholder_is_a_whole_value_or_a_part_of_a_text_and_labels_are_text() -> None:
    assert filled(TEMPLATE, VALUES) == {
        "kind": "Thing",
        "metadata": {"name": "one", "labels": {"a": "7", "b": "x-one"}},
        "spec": {"count": 7, "list": [{"of": {"k": "v"}}], "text": "is 7!", "plain": 3},
    }
    assert placeholders(TEMPLATE) == set(VALUES)


def test_a_placeholder_without_a_value_and_a_value_without_a_place_are_errors() -> None:
    with pytest.raises(ValueError, match="no value for mapping, number"):
        filled(TEMPLATE, {"name": "one"})
    with pytest.raises(ValueError, match="no place for more"):
        filled(TEMPLATE, VALUES | {"more": 1})


def test_what_a_value_says_is_not_read_as_a_template() -> None:
    assert filled({"kind": "Thing", "metadata": {"name": "{{name}}"}}, {"name": "{{number}}"})["metadata"] == {
        "name": "{{number}}"
    }


def test_a_folder_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="has no nothing"):
        templates("nothing")


def test_a_namespace_comes_before_what_lies_in_it_and_parameters_before_policies() -> None:
    assert [one["kind"] for one in templates("namespace")] == NAMESPACE
    assert templates("admission")[0]["kind"] == "ConfigMap"


def test_what_is_installed_has_no_placeholder_left_and_names_the_engine() -> None:
    manifests = wanted(Choices(image_prefix="registry.example/blastdoor/"))
    assert not any(placeholders(manifest) for manifest in manifests)
    assert sum(ENGINE in str(manifest) for manifest in manifests) == 5


def test_sandboxes_go_to_nodes_of_their_pool_unless_there_is_none() -> None:
    def scheduling(**choice: Any) -> Any:
        manifests = wanted(Choices(image_prefix="x/", **choice))
        return next(one for one in manifests if one["metadata"]["name"] == "gvisor")["scheduling"]

    assert "pool" in str(scheduling())
    assert scheduling(pool={}) == {}


@pytest.mark.parametrize("engine", ["", "it's", 'a"b', "a b", "a\nb", "x" * 300])
def test_a_name_that_could_end_an_expression_is_no_engine(engine: str) -> None:
    with pytest.raises(ValueError, match="no name for a user"):
        Choices(image_prefix="x/", engine=engine)


@pytest.mark.parametrize("prefix", ["", "registry.example", "registry.example/blastdoor"])
def test_an_image_prefix_that_others_could_begin_with_is_none(prefix: str) -> None:
    with pytest.raises(ValueError, match="does not end in"):
        Choices(image_prefix=prefix)


@pytest.mark.parametrize(
    ("live", "found"),
    [
        ({"a": 1, "b": {"c": [1, {"d": 2}]}, "more": 1}, []),
        ({"a": 2, "b": {"c": [1, {"d": 2}]}}, ["a"]),
        ({"a": 1, "b": {"c": [1, {"d": 3}]}}, ["b.c[1].d"]),
        ({"a": 1, "b": {"c": [1]}}, ["b.c"]),
        ({"b": {}}, ["a", "b.c"]),
    ],
)
def test_a_difference_is_named_by_its_place(live: dict[str, Any], found: list[str]) -> None:
    assert differences({"a": 1, "b": {"c": [1, {"d": 2}]}}, live) == found


def test_what_we_say_as_nothing_is_not_missing() -> None:
    assert differences({"scheduling": {}, "rules": []}, {}) == []


@pytest.mark.parametrize(
    ("said", "ended"),
    [
        (b'{"status":"Success"}', ExecEnded("exited", 0)),
        (
            b'{"status":"Failure","reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"7"}]}}',
            ExecEnded("exited", 7),
        ),
        (b'{"status":"Failure","message":"no such program"}', ExecEnded("failed", message="no such program")),
        (b'{"status":', ExecEnded("lost", message="the connection ended in the middle of the status")),
    ],
)
def test_how_a_command_ended_is_what_the_engine_says(said: bytes, ended: ExecEnded) -> None:
    assert read_status(said) == ended
