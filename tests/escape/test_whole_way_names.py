"""D39, as far as this host goes: what a tenant writes reaches no name of a directory, control group, mount or process,
and no OCI configuration. The names there are made of hexadecimal digits of ours."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from service.core.boundary import boundary_name
from tests.escape.whole_way import work_of
from tests.stack import Stack, finished, post, submit
from tests.sweep import sweep

pytestmark = pytest.mark.timeout(240)
LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", re.ASCII)
"""A DNS label (RFC 1123): what every platform takes for a name."""
TEXT = "d39-tenants-own-text"
NAMES = [
    "a\nb",
    "${HOME}",
    "$(reboot)",
    "a" * 64,
    "_canary",
    "-x",
    "x-",
    "UPPER",
    "a/b",
    "..",
    "",
    "a b",
    "é",
    "a\x00b",
]
WAITING = "touch plays; while [ ! -e go ]; do sleep 0.02; done"


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_d39_a_tenants_name_that_is_no_label_is_refused(stack: Stack, name: str) -> None:
    for client, path in ((stack.admin, "/v1/admin/tenants"), (stack.service, "/v1/tenants")):
        answer = client.post(path, json={"name": name})
        assert (answer.status_code, answer.json()["code"]) == (422, "request_invalid")
        assert answer.json()["errors"][0]["path"] == "name"


def test_d39_control_a_name_of_63_characters_is_a_label_and_is_accepted(stack: Stack) -> None:
    name = "d39-" + "x" * 59
    assert LABEL.fullmatch(name)
    assert stack.admin.post("/v1/admin/tenants", json={"name": name}).status_code == 201
    assert not [name for name in NAMES if LABEL.fullmatch(name)]


@pytest.mark.parametrize("text", ["a\nb", "x\x1b[0m", "\u202ex", "x" * 201])
def test_d39_a_scenarios_or_steps_name_with_controls_in_it_is_refused(stack: Stack, text: str) -> None:
    for asked in ({"name": text}, {"steps": [{"name": text, "run": "true"}]}):
        answer = post(stack.tenant, "true", **asked)
        assert (answer.status_code, answer.json()["code"]) == (422, "scenario_invalid")


def test_d39_a_tenants_text_stands_in_no_name_and_no_configuration_of_this_host(stack: Stack) -> None:
    text = f"{TEXT} ${{IFS}} $(x) `y` ; | & %s {{{{z}}}}" + " long" * 20
    run_id = submit(
        stack.tenant, {"run": WAITING, "name": text}, name=text, metadata={"note": f"{TEXT}\n: {text}"},
    )  # fmt: skip
    stack.wait_for_file(run_id, "plays")
    place = stack.runtime_dir / stack.installation / boundary_name(run_id, 1)
    configuration = (place / "bundle/config.json").read_text()
    everywhere = [str(path) for path in place.rglob("*")]
    label = json.loads((place / "ref.json").read_text())
    found, named = sweep(TEXT), [found.what for found in sweep(stack.mark(run_id)) if found.kind == "cgroup"]
    (work_of(stack, run_id) / "go").touch()
    run = finished(stack.tenant, run_id)

    kept = (run["scenario"]["name"], run["steps"][0]["name"], run["metadata"]["note"])
    assert kept == (text, text, f"{TEXT}\n: {text}"), "control: it is kept where it belongs"
    assert found == []
    assert TEXT not in configuration + json.dumps(label) + "".join(everywhere)
    assert "demo" not in configuration
    assert json.loads(configuration)["hostname"] == "sandbox"
    assert (label["tenant"], label["run_id"]) == ("demo", run_id)
    assert LABEL.fullmatch(place.name)
    assert place.name == boundary_name(run_id, 1)
    assert named
    assert {Path(group) for group in named} == set(stack.group(run_id).directories)


def test_d39_control_text_in_a_process_on_this_host_is_found(stack: Stack) -> None:
    with subprocess.Popen(["sleep", "60"], env={"NOTE": TEXT}) as process:
        try:
            assert [found.kind for found in sweep(TEXT)] == ["process"]
        finally:
            process.kill()
