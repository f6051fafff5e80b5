"""Scenario, controls and metadata as their authors see them refused: the place, what is there, what would be right."""

import json
from datetime import timedelta
from typing import Any

import pytest

from service.core.errors import DocumentInvalid
from service.core.events import MAX_DATA_BYTES, json_size
from service.intake.documents import parse_controls, parse_metadata, parse_scenario

pytestmark = pytest.mark.unit

SCENARIO = b"""
name: discount rules
runtime: default
env: {MODE: test, PORT: 8080}
steps:
  - name: build
    run: make all
    timeout: 20s
  - name: vip gets ten percent
    run: [python3, rules.py]
    stdin: '{"customer": "vip", "total": 200}'
    env: {LOG: debug}
    expect:
      exit_code: 0
      stdout: {json: {total: 180, on: no}}
      files: {out/report.json: {exists: true}}
      max_seconds: 2
  - name: tidy
    run: ./tidy.sh
    always: true
    continue_on_failure: true
artifacts: ["out/**", "report.xml"]
"""
CONTROLS = b"""
isolation: hard
code: untrusted
needs: []
limits: {cpu: 1, memory: 256MiB, pids: 128, disk: 128MiB, files: 4096, open_files: 1024, output: 1MiB, wall: 60s}
network: {mode: none}
"""


def _rows(document: bytes | dict[str, Any], parse: Any) -> dict[str, str]:
    data = document if isinstance(document, bytes) else json.dumps(document).encode()
    with pytest.raises(DocumentInvalid) as refused:
        parse(data)
    return {row["path"]: row["message"] for row in refused.value.errors}


def _scenario(**changes: Any) -> dict[str, Any]:
    return {"name": "n", "steps": [{"name": "s", "run": "true"}]} | changes


def _step(**changes: Any) -> dict[str, Any]:
    return _scenario(steps=[{"name": "s", "run": "true"}, {"name": "s", "run": "true"} | changes])


def test_the_example_of_the_contract_is_read() -> None:
    scenario = parse_scenario(SCENARIO)
    assert scenario.env == {"MODE": "test", "PORT": "8080"}
    assert scenario.steps[0].timeout == timedelta(seconds=20)
    assert scenario.steps[1].argv == ("python3", "rules.py")
    stdout = scenario.steps[1].expect.stdout
    assert stdout is not None
    assert stdout.json_ == {"total": 180, "on": "no"}
    assert parse_controls(CONTROLS).limits.memory == 256 * 2**20


def test_json_and_yaml_of_one_scenario_have_one_digest() -> None:
    as_json = {"name": "n", "steps": [{"name": "s", "run": ["a", "b"], "timeout": "1s"}]}
    as_yaml = b"steps:\n- {timeout: 1s, run: [a, b], name: s}\nname: n\n"
    assert parse_scenario(json.dumps(as_json).encode()).digest == parse_scenario(as_yaml).digest


SENTENCES: list[tuple[dict[str, Any], str, str]] = [
    (
        _step(expect={"stdout": {"jsn": {}}}),
        "steps.2.expect.stdout.jsn",
        "unknown key; did you mean json? (known keys: contains, equals, json, matches)",
    ),
    (_step(expect={"stdout": {"json_": 1}}), "steps.2.expect.stdout.json_",
     "unknown key; did you mean json? (known keys: contains, equals, json, matches)"),
    (_scenario(nmae="x"), "nmae", "unknown key; did you mean name? (known keys: artifacts, env, name, runtime, steps)"),
    (_scenario(zzz="x"), "zzz", "unknown key (known keys: artifacts, env, name, runtime, steps)"),
    ({"steps": [{"name": "s", "run": "true"}]}, "name", "is required"),
    (_scenario(name=180), "name", "should be text; found the number 180; put it in quotes"),
    (_scenario(name=None), "name", "should be text; found nothing (null)"),
    (_scenario(name=""), "name", "should have at least 1 character; it has 0"),
    (_scenario(name="x" * 201), "name", "should have at most 200 characters; it has 201"),
    (_scenario(steps=[]), "steps", "should have at least 1 element; it has 0"),
    (_scenario(steps="x"), "steps", "should be a list; found the text 'x'"),
    (_scenario(steps=[7]), "steps.1", "should be a mapping; found the number 7"),
    (_scenario(runtime="Up"), "runtime", "should be a runtime's name: small letters, digits, '.', '_' and '-', "
     "at most 63 characters; found the text 'Up'"),
    (_step(run=5), "steps.2.run", "should be text (for sh -c) or a list of arguments; found the number 5"),
    (_step(run=[]), "steps.2.run", "should have at least 1 element; it has 0"),
    (_step(run=["a", 2]), "steps.2.run.2", "should be text; found the number 2; put it in quotes"),
    (_step(run=""), "steps.2.run", "should have at least 1 character; it has 0"),
    (_step(run="a\0"), "steps.2.run", "should not contain a NUL character"),
    (_step(run=[""]), "steps.2", "run: the first word should name a program"),
    (_step(timeout=5), "steps.2.timeout", "should be a duration such as 500ms, 20s or 2m"),
    (_step(always="yes"), "steps.2.always", "should be true or false; found the text 'yes'"),
    (_step(env={"A": True}), "steps.2.env", "A should be text; put the value in quotes"),
    (_step(env=[]), "steps.2.env", "should be a mapping; found a list of 0"),
    (_step(expect={"exit_code": 256}), "steps.2.expect.exit_code", "should be at most 255; found the number 256"),
    (_step(expect={"exit_code": 1.5}), "steps.2.expect.exit_code", "should be a whole number; found the number 1.5"),
    (_step(expect={"max_seconds": 0}), "steps.2.expect.max_seconds", "should be above 0.0; found the number 0"),
    (_step(expect={"stdout": {"matches": "("}}), "steps.2.expect.stdout.matches",
     "should be a pattern in RE2 syntax: missing ): ("),
    (_step(expect={"files": {"/abs": {}}}), "steps.2.expect.files./abs",
     "should be a path relative to the working directory, without '..', '.' or empty parts"),
    (_step(expect={"files": {"x": {"exists": False, "equals": ""}}}), "steps.2.expect.files.x",
     "a file that must not exist cannot have expectations of its content"),
    (_scenario(artifacts=["ok", "../x"]), "artifacts.2",
     "should be a path relative to the working directory, without '..', '.' or empty parts"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("document", "path", "message"), SENTENCES, ids=[row[1] + " " + row[2][:30] for row in SENTENCES]
)
def test_a_scenario_that_is_wrong_is_told_where_and_what_would_be_right(
    document: dict[str, Any], path: str, message: str
) -> None:
    assert _rows(document, parse_scenario) == {path: message}


@pytest.mark.parametrize(
    ("document", "path", "message"),
    [
        (b"isolation: firm", "isolation",
         "should be 'auto', 'soft', 'hard' or 'dedicated-cluster'; found the text 'firm'"),
        (b"needs: [root]", "needs.1", "should be 'kubernetes-api' or 'privileged'; found the text 'root'"),
        (b"limits: {memory: 1KiB}", "limits.memory", "should be at least 32MiB; found the text '1KiB'"),
        (b"limits: {memory: lots}", "limits.memory",
         "should be a size such as 64KiB, 256MiB or 1GiB, or a whole number of bytes"),
        (b"limits: {pids: '8'}", "limits.pids", "should be a whole number; found the text '8'"),
        (b"limits: {files: 9999999}", "limits.files", "should be at most 1000000; found the number 9999999"),
        (b"limits: {memroy: 1}", "limits.memroy", "unknown key; did you mean memory? "
         "(known keys: artifacts, cpu, disk, files, memory, open_files, output, pids, wall)"),
        (b"network: {mode: allow}", "network",
         "mode allow needs at least one entry such as api.example.com:443, and mode none takes none"),
        (b"network: {mode: allow, allow: [EXAMPLE]}", "network.allow.1",
         "should be HOST:PORT in small letters, such as api.example.com:443; found the text 'EXAMPLE'"),
        (b"network: {mode: some}", "network.mode", "should be 'none' or 'allow'; found the text 'some'"),
        (b"", "", "should be a mapping; found nothing (null)"),
        (b"[]", "", "should be a mapping; found a list of 0"),
        (b"limits: {files: 0644}", "limits.files",
         "0644 starts with a zero: write 0o... for octal, or put it in quotes for text"),
    ],
)  # fmt: skip
def test_controls_that_are_wrong_are_told_where_and_what_would_be_right(
    document: bytes, path: str, message: str
) -> None:
    assert _rows(document, parse_controls) == {path: message}


def test_every_place_that_is_wrong_is_told_and_at_most_fifty() -> None:
    rows = _rows(_scenario(name=1, steps=[{"name": "s", "run": "x", "nope": 1}, {"run": 3}]), parse_scenario)
    assert set(rows) == {"name", "steps.1.nope", "steps.2.name", "steps.2.run"}
    with pytest.raises(DocumentInvalid) as refused:
        parse_scenario(json.dumps(_scenario(steps=[5] * 80)).encode())
    assert len(refused.value.errors) == 50
    assert refused.value.errors[-1]["message"] == "and 31 more places that are wrong"


def test_the_author_s_text_is_repeated_cut_and_with_controls_escaped() -> None:
    long = "\x1b]0;evil\x07" + "\u202e" + "x" * 5000
    documents: list[dict[str, Any]] = [
        _scenario(**{long: 1}),
        _scenario(runtime=long),
        _step(env={long: "x"}),
        _step(always=long),
        _step(expect={"stdout": {"matches": "(" + long}}),
        _step(expect={"files": {"/" + long: {}}}),
    ]
    for document in documents:
        for path, message in _rows(document, parse_scenario).items():
            assert path.isprintable()
            assert message.isprintable()
            assert len(path) <= 220
            assert len(message) <= 400
            assert message.count("x") <= 320
            assert "pydantic" not in message.lower()


def test_a_long_message_keeps_the_end_that_says_what_would_be_right() -> None:
    rows = _rows(_step(env={"-" * 5000: "x"}), parse_scenario)
    assert rows["steps.2.env"].endswith("letters, digits and _, not starting with a digit")


def test_a_scenario_may_hold_its_largest_stdin_and_controls_are_small() -> None:
    assert len(parse_scenario(json.dumps(_step(stdin="x" * 2**20)).encode()).steps[1].stdin) == 2**20
    assert "at most 1048576 characters" in _rows(_step(stdin="x" * (2**20 + 1)), parse_scenario)["steps.2.stdin"]
    assert "at most 262144 bytes" in _rows(b"#" * 262145, parse_controls)[""]


def test_metadata_is_text_to_text() -> None:
    most = {f"key-{n}": "v" * 400 for n in range(16)}
    assert parse_metadata(json.dumps(most).encode()) == most
    assert parse_metadata(b"{}") == {}
    assert json_size(most) * 2 < MAX_DATA_BYTES
    assert _rows(b'{"a": 1}', parse_metadata) == {"a": "should be text; found the number 1"}
    assert _rows(b'{"a": {}}', parse_metadata) == {"a": "should be text; found a mapping of 0"}
    assert _rows(b"[1]", parse_metadata) == {"": "should be a mapping of text to text; found a list of 1"}
    assert _rows(b'{"": "x"}', parse_metadata) == {"": "a key should be 1 to 128 printable characters"}
    assert _rows(b'{"a\\u001b": "x"}', parse_metadata) == {"a\\x1b": "a key should be 1 to 128 printable characters"}
    assert _rows(b'{"a": "\\u0000"}', parse_metadata) == {"a": "should not contain a NUL character"}
    assert "at most 1024" in _rows({"a": "x" * 1025}, parse_metadata)["a"]
    assert "at most 16 pairs" in _rows({str(n): "" for n in range(17)}, parse_metadata)[""]
    assert "at most 8192 bytes" in _rows({str(n): "é" * 300 for n in range(15)}, parse_metadata)[""]
    assert "surrogates" in _rows(b'{"a": "\\ud800"}', parse_metadata)["a"]
    assert "should be JSON" in _rows(b"a: b", parse_metadata)[""]
