"""The commands as a shell sees them: what they print, on which stream, and with which exit code they end."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer.main
from typer.testing import CliRunner, Result

from service.cli.main import make_app

NASTY_OUTPUT = "first\n" * 40 + '{"total": 200}\n\x1b]0;owned\x07passed\n'
ID = "run_0192f0c1d2e37a4b8c9d0e1f2a3b4c5d"
FAILED: dict[str, Any] = {
    "id": ID,
    "tenant": "demo",
    "metadata": {},
    "scenario": {"name": "discount rules", "digest": "sha256:0"},
    "bundle": {"digest": "sha256:1", "bytes": 1234, "files": 4},
    "controls": {},
    "phase": "finished",
    "outcome": "failed",
    "reason": "expectation",
    "message": "step 2: stdout.json.total: expected 180, got 200",
    "attempt": 1,
    "queue_position": None,
    "created_at": "2026-01-02T03:04:05Z",
    "started_at": "2026-01-02T03:04:05Z",
    "finished_at": "2026-01-02T03:04:06Z",
    "boundary_destroyed_at": "2026-01-02T03:04:06Z",
    "placement": {
        "boundary": "gvisor",
        "guarantees": {"kernel": "sandboxed", "nodes": "shared", "control_plane": "isolated"},
        "requirements": {"kernel": "sandboxed"},
        "why": ["tenant demo is untrusted: kernel >= sandboxed"],
        "rejected": [],
        "policy": "sha256:2",
    },
    "steps": [
        {
            "n": 1, "name": "build", "outcome": "passed", "exit_code": 0, "signal": None, "duration_s": 0.41,
            "cpu_s": 0.3,
            "stdout": {"text": "made", "bytes": 4, "truncated": False},
            "stderr": {"text": "", "bytes": 0, "truncated": False}, "failures": [],
        },
        {
            "n": 2, "name": "vip", "outcome": "failed", "exit_code": None, "signal": 11, "duration_s": 1.5,
            "cpu_s": 0.3, "stdout": {"text": NASTY_OUTPUT, "bytes": 270, "truncated": False},
            "stderr": {"text": "", "bytes": 0, "truncated": False},
            "failures": [{"expectation": "stdout.json.total", "expected": 180, "actual": 200}],
        },
    ],
    "usage": {"wall_s": 1.9, "cpu_s": 0.5, "peak_memory_bytes": 31457280},
    "artifacts": [{"path": "out/report.json", "bytes": 88, "sha256": "0"}],
    "skipped_artifacts": [{"path": "out/l", "why": "symlink"}],
    "evidence": {
        "runtime": "runsc", "runtime_version": "20240729.0", "runtime_sha256": "0", "platform": "systrap",
        "network": "none",
        "limits": {"memory_bytes": 268435456, "pids": 128}, "uid": 65532, "observed_at": "2026-01-02T03:04:06Z",
    },
}  # fmt: skip
PASSED = {**FAILED, "outcome": "passed", "reason": None, "message": None, "steps": FAILED["steps"][:1]}
Answer = Callable[[httpx.Request], httpx.Response]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "scenario.yaml").write_text("name: x")
    return tmp_path / "code"


@pytest.mark.parametrize(
    ("outcome", "code"),
    [("passed", 0), ("failed", 1), ("timed_out", 1), ("limit_exceeded", 1), ("cancelled", 1), ("errored", 3)],
)
def test_the_outcome_is_the_exit_code(bundle: Path, outcome: str, code: int) -> None:
    result = _invoke("run", str(bundle), answer=_service({**FAILED, "outcome": outcome}))
    assert result.exit_code == code


def test_a_run_is_summed_up_with_what_failed_and_the_wall_it_ran_in(bundle: Path) -> None:
    shown = _invoke("run", str(bundle), answer=_service(FAILED)).stdout
    for words in (
        "failed discount rules", ID, "expectation: step 2: stdout.json.total: expected 180, got 200", "signal 11",
        "1.50 s", "expected 180", "got 200", "gvisor: kernel sandboxed", "control plane isolated",
        "tenant demo is untrusted: kernel >= sandboxed", "runsc 20240729.0", "memory <= 256.0 MiB", "uid 65532",
        "out/report.json (88 B)", "out/l: symlink",
    ):  # fmt: skip
        assert words in " ".join(shown.split()), words
    assert all(line == line.rstrip() for line in shown.splitlines())
    assert max(map(len, shown.splitlines())) <= 80


def test_of_a_pod_it_is_said_which_versions_are_the_nodes(bundle: Path) -> None:
    node = {"name": "n", "engine": "containerd://2.1.4", "kernel": "6.18.0", "os": "x", "kubelet": "v1.36.0"}
    evidence = FAILED["evidence"] | {"runtime_version": None, "platform": None, "node": node}
    shown = " ".join(_invoke("run", str(bundle), answer=_service({**FAILED, "evidence": evidence})).stdout.split())
    assert "evidence runsc, network none, uid 65532" in shown, "a runtime's version that nobody knows is not shown"
    assert "on a node with engine containerd://2.1.4, kubelet v1.36.0, kernel 6.18.0" in shown


def test_what_the_guest_printed_neither_moves_the_cursor_nor_looks_like_ours(bundle: Path) -> None:
    shown = _invoke("runs", "show", ID, answer=_service(FAILED)).stdout
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert r"  | \x1b]0;owned\x07passed" in shown
    assert shown.count("| first") < 12


@pytest.mark.parametrize(
    ("message", "line"), [(None, "waits 3 in the queue"), ("no worker", "waits 3 in the queue: no worker")]
)
def test_a_queued_run_is_shown_with_its_place_and_why_it_waits(message: str | None, line: str) -> None:
    queued = FAILED | {
        "phase": "queued", "outcome": None, "reason": None, "message": message, "queue_position": 3, "steps": [],
    }  # fmt: skip
    shown = _invoke("runs", "show", ID, answer=_service(queued)).stdout
    assert line in [" ".join(each.split()) for each in shown.splitlines()]
    assert "in the queue" not in _invoke("runs", "show", ID, answer=_service(FAILED)).stdout


def test_phases_are_on_stderr_and_the_steps_and_what_they_print_on_stdout(bundle: Path) -> None:
    before: tuple[Row, ...] = (
        ("phase", {"phase": "queued", "queue_position": 3}),
        ("phase", {"phase": "running"}),
        ("progress", {"stage": "step", "step": 1, "steps": 2, "name": "build", "state": "started"}),
        ("output", {"step": 1, "stream": "stdout", "seq": 0, "text": "made"}),
        ("output", {"step": 1, "stream": "stderr", "seq": 0, "text": "warned\n"}),
        ("progress", {"stage": "step", "step": 1, "steps": 2, "name": "build", "state": "passed"}),
        ("progress", {"stage": "step", "step": 2, "steps": 2, "name": "vip", "state": "started"}),
        ("progress", {"stage": "step", "step": 2, "steps": 2, "name": "vip", "state": "passed", "text": "0.1 s"}),
    )
    result = _invoke("run", str(bundle), answer=_service(PASSED, before=before))
    assert result.exit_code == 0
    assert [line.partition(": ")[2] for line in result.stderr.splitlines()] == [
        "waiting for a worker, 1 in the queue", "waiting for a worker, 3 in the queue", "playing the scenario",
    ]  # fmt: skip
    live, _, summary = result.stdout.partition("\n\n")
    assert live.splitlines() == [
        "step 1/2  build", "  | made", "  ! warned", "  passed", "step 2/2  vip  passed  0.1 s",
    ]  # fmt: skip
    assert summary.startswith("passed  discount rules")


def test_the_end_of_what_was_printed_is_repeated_only_when_not_all_of_it_was_shown(bundle: Path) -> None:
    whole: tuple[Row, ...] = (("output", {"step": 2, "stream": "stdout", "seq": 0, "text": NASTY_OUTPUT}),)
    cut: tuple[Row, ...] = (("output", {"step": 2, "stream": "stdout", "seq": 0, "text": "x", "omitted": True}),)
    once = _invoke("run", str(bundle), answer=_service(FAILED, before=whole)).stdout
    again = _invoke("run", str(bundle), answer=_service(FAILED, before=cut)).stdout
    assert once.count('| {"total": 200}') == again.count('| {"total": 200}') == 1
    assert "\x1b" not in once + again
    assert "more than is shown live" in again


def test_a_detached_run_is_its_id(bundle: Path) -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.method)
        return httpx.Response(202, json=PASSED)

    result = _invoke("run", str(bundle), "--detach", answer=answer)
    assert (result.stdout, result.exit_code, asked) == (f"{ID}\n", 0, ["POST"])


def test_a_report_and_the_artifacts_can_be_kept_and_room_for_them_is_looked_for_first(
    bundle: Path, tmp_path: Path
) -> None:
    run = {**FAILED, "artifacts": [{"path": "out/a", "bytes": 1, "sha256": hashlib.sha256(b"1").hexdigest()}]}

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("junit.xml"):
            return httpx.Response(200, text="<testsuites/>", headers={"Content-Type": "application/xml"})
        if "/artifacts/" in request.url.path:
            return httpx.Response(200, content=b"1")
        return _service(run)(request)

    report, kept = tmp_path / "report.xml", tmp_path / "kept"
    arguments = ("run", str(bundle), "--junit", str(report), "--artifacts", str(kept))
    assert _invoke(*arguments, answer=answer).exit_code == 1
    assert report.read_text() == "<testsuites/>"
    assert (kept / "out" / "a").read_bytes() == b"1"
    again = _invoke(*arguments, answer=lambda _: pytest.fail("something was sent"))
    assert again.exit_code == 2


def test_json_is_the_finished_run_on_one_line_and_nothing_else(bundle: Path) -> None:
    result = _invoke("run", str(bundle), "--json", answer=_service(FAILED))
    assert json.loads(result.stdout) == FAILED
    assert result.stdout.count("\n") == 1
    assert (result.stderr, result.exit_code) == ("", 1)


def test_a_refusal_says_every_place_that_is_wrong(bundle: Path) -> None:
    errors = [{"path": "steps.0.run", "message": "should name a program"}, {"path": "name", "message": "is required"}]
    refusal = _problem(422, "scenario_invalid", errors=errors)
    result = _invoke("run", str(bundle), answer=lambda request: refusal)
    assert result.exit_code == 2
    assert "steps.0.run: should name a program" in result.stderr
    assert "name: is required" in result.stderr
    as_json = _invoke("run", str(bundle), "--json", answer=lambda request: refusal)
    assert json.loads(as_json.stdout)["code"] == "scenario_invalid"


def test_a_wall_that_cannot_be_built_is_a_refusal_that_names_what_is_missing(bundle: Path) -> None:
    candidates = [{"boundary": "gvisor", "missing": "control plane >= dedicated"}]
    result = _invoke("run", str(bundle), answer=lambda _: _problem(422, "placement_refused", candidates=candidates))
    assert result.exit_code == 2
    assert "gvisor - missing: control plane >= dedicated" in result.stderr


@pytest.mark.parametrize("status", [500, 503, 507])
def test_the_platform_s_own_failure_is_3(bundle: Path, status: int) -> None:
    assert _invoke("run", str(bundle), answer=lambda _: _problem(status, "internal")).exit_code == 3


def test_a_service_that_does_not_answer_is_3(bundle: Path) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("connection refused", request=request)

    result = _invoke("run", str(bundle), answer=refuse)
    assert result.exit_code == 3
    assert "does not answer: connection refused" in result.stderr


def test_without_any_service_known_it_says_how_to_start_one(bundle: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(make_app(), ["run", str(bundle), "--state", str(tmp_path)], env=_NO_SERVICE)
    assert result.exit_code == 3
    assert "blastdoor up" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [["run"], ["run", "/nonexistent"], ["run", ".", "--metadata", "x"], ["runs", "--limit", "0"], ["nonsense"],
     ["tenants", "add", "acme", "--storage", "lots"], ["tenants", "update", "acme"], ["runs", "show"],
     ["runs", "--json", "show", ID], ["tenants", "--key", "x", "list"]],
)  # fmt: skip
def test_bad_usage_is_2(arguments: list[str]) -> None:
    assert _invoke(*arguments, answer=lambda _: pytest.fail("something was sent")).exit_code == 2


@pytest.mark.parametrize("mode", [(), ("--json",)])
def test_an_interrupt_cancels_the_run_and_says_how_it_ended(bundle: Path, mode: tuple[str, ...]) -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(f"{request.method} {request.url.path.removeprefix('/v1/runs')}")
        if len(asked) == 2:
            raise KeyboardInterrupt
        finished = len(asked) > 3
        return httpx.Response(
            200, json={**FAILED, "outcome": "cancelled"} if finished else {**FAILED, "phase": "running"}
        )

    result = _invoke("run", str(bundle), *mode, answer=answer)
    assert asked == ["POST ", f"GET /{ID}" + ("" if mode else "/events"), f"POST /{ID}/cancel", f"GET /{ID}"]
    assert result.exit_code == 1
    assert "cancelled" in result.stdout


def test_a_second_interrupt_leaves_without_waiting(bundle: Path) -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.method)
        if len(asked) in (2, 4):
            raise KeyboardInterrupt
        return httpx.Response(200, json={**FAILED, "phase": "running"})

    result = _invoke("run", str(bundle), answer=answer)
    assert asked == ["POST", "GET", "POST", "GET"]
    assert (result.exit_code, result.stdout.strip()) == (1, "")
    assert "blastdoor runs show" in result.stderr


def test_a_service_that_is_lost_is_said_and_where_the_run_can_be_seen(bundle: Path) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(202, json=PASSED) if request.method == "POST" else _problem(500, "internal")

    result = _invoke("run", str(bundle), answer=answer)
    assert result.exit_code == 3
    assert f"blastdoor runs show {ID}" in " ".join(result.stderr.split())


# --- logs, junit, webhooks, operators ---------------------------------------------------------------------------------


def test_the_logs_of_a_finished_run_are_what_was_stored_and_of_another_what_is_told() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if "/steps/2/" in request.url.path:
            return httpx.Response(200, content=b"all\x1b[2J of it\n")
        return _problem(404, "not_found") if "/steps/" in request.url.path else httpx.Response(200, json=FAILED)

    stored = _invoke("runs", "logs", ID, answer=answer)
    assert stored.stdout.splitlines() == [
        "step 1  build  passed", "  | made", "step 2  vip  failed", r"  | all\x1b[2J of it",
    ]  # fmt: skip

    told: Row = ("output", {"step": 1, "stream": "stdout", "seq": 0, "text": "so far"})

    def running(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/events"):
            return _events(told, ("result", FAILED))
        return httpx.Response(200, json={**FAILED, "phase": "running", "outcome": None})

    for option in ((), ("--follow",)):
        shown = _invoke("runs", "logs", ID, *option, answer=running)
        assert shown.stdout.splitlines()[:2] == ["step 1", "  | so far"]
        assert "failed  expectation" in shown.stdout
        lines = _invoke("runs", "logs", ID, *option, "--json", answer=running).stdout.splitlines()
        assert [json.loads(line)["event"] for line in lines] == ["output", "result"]


def test_a_report_is_printed_or_written(tmp_path: Path) -> None:
    report = httpx.Response(200, content=b"<testsuites/>\n", headers={"Content-Type": "application/xml"})
    assert _invoke("runs", "junit", ID, answer=lambda _: report).stdout == "<testsuites/>\n"
    assert _invoke("runs", "junit", ID, "-o", str(tmp_path / "r"), answer=lambda _: report).stdout == ""
    assert (tmp_path / "r").read_text() == "<testsuites/>\n"
    unfinished = _problem(409, "not_finished")
    assert _invoke("runs", "junit", ID, answer=lambda _: unfinished).exit_code == 2


WEBHOOK = {
    "id": "whk_0192",
    "url": "https://shop.example/\x1b[2J",
    "types": ["*"],
    "enabled": False,
    "disabled_reason": "it answered 410",
}
ATTEMPT = {
    "id": "dlv_1", "event_id": "evt_1", "attempt": 2, "at": "2026-01-02T03:04:05Z", "status": 500,
    "error": "\x1b]0;owned\x07 said the receiver", "next_at": "2026-01-02T03:09:05Z",
}  # fmt: skip


def test_webhooks_are_added_listed_rotated_and_removed() -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(f"{request.method} {request.url.path}")
        if request.method == "DELETE":
            return httpx.Response(204)
        if request.method == "POST" and request.url.path.endswith("webhooks"):
            assert json.loads(request.content) == {"url": "https://shop.example", "types": ["*"]}
        listed = request.method == "GET" and request.url.path.endswith("webhooks")
        return httpx.Response(200, json={"items": [WEBHOOK]} if listed else {**WEBHOOK, "secret": "whsec_x"})

    assert "whsec_x" in _invoke("webhooks", "add", "https://shop.example", answer=answer).stdout.splitlines()
    for command in (("webhooks",), ("webhooks", "list"), ("webhooks", "show", "whk_0192")):
        shown = _invoke(*command, answer=answer).stdout
        assert r"https://shop.example/\x1b[2J" in shown
    assert "whsec_x" in _invoke("webhooks", "rotate", "whk_0192", answer=answer).stdout.splitlines()
    assert _invoke("webhooks", "remove", "whk_0192", "--yes", answer=answer).stdout == "removed whk_0192\n"
    assert asked == [
        "POST /v1/webhooks", "GET /v1/webhooks", "GET /v1/webhooks", "GET /v1/webhooks/whk_0192",
        "POST /v1/webhooks/whk_0192/rotate", "DELETE /v1/webhooks/whk_0192",
    ]  # fmt: skip
    assert _invoke("webhooks", "remove", "whk_0192", answer=lambda _: pytest.fail("sent")).exit_code != 0
    both = _invoke("webhooks", "--service", "--tenant", "acme", answer=lambda _: pytest.fail("sent"))
    assert both.exit_code == 2


LETTER = {
    "id": "dlv_1", "webhook_id": "whk_0192", "url": "https://shop.example", "tenant": "acme", "event_id": "evt_1",
    "type": "dev.blastdoor.run.finished", "attempts": 10, "at": "2026-01-02T03:04:05Z", "status": 500,
    "error": ATTEMPT["error"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("command", "row", "attempt"),
    [
        (("webhooks", "deliveries", "whk_0192"), ATTEMPT, "2 at 2026-01-02T03:04:05Z"),
        (("admin", "dead-letters"), LETTER, "10, given up at 2026-01-02T03:04:05Z"),
    ],
)  # fmt: skip
def test_deliveries_are_shown_without_obeying_what_a_receiver_said(
    command: tuple[str, ...], row: dict[str, Any], attempt: str
) -> None:
    page = httpx.Response(200, json={"items": [row], "next_cursor": "abc", "pending": 3})
    shown = _invoke(*command, answer=lambda _: page).stdout
    assert "\x1b" not in shown
    for words in (r"\x1b]0;owned\x07 said the receiver", attempt, "500", "3 wait", "--cursor abc"):
        assert words in shown
    empty = httpx.Response(200, json={"items": [], "next_cursor": None})
    assert _invoke(*command, answer=lambda _: empty).stdout == "no deliveries\n"


def test_an_operator_sees_workers_kills_runs_and_replays() -> None:
    worker = {"id": "wrk_1", "site": "here", "capabilities": [{"boundary": "gvisor", "available": True}]}
    workers = httpx.Response(200, json={"items": [worker]})
    assert "gvisor" in _invoke("admin", "workers", answer=lambda _: workers).stdout
    running = httpx.Response(202, json={**FAILED, "phase": "running", "outcome": None})
    assert _invoke("admin", "kill", ID, answer=lambda _: running).stdout == f"{ID} is being cancelled\n"
    replayed = httpx.Response(202)
    assert "dlv_1" in _invoke("admin", "dead-letters", "replay", "dlv_1", answer=lambda _: replayed).stdout


def test_every_command_has_json_and_an_example() -> None:
    seen = 0
    for path, command in _commands(typer.main.get_command(make_app())):
        seen += 1
        if path != ["blastdoor"]:
            assert "blastdoor " in (command.help or ""), path
        if not hasattr(command, "commands") or getattr(command, "invoke_without_command", False):
            assert "--json" in [option for each in command.params for option in each.opts], path
    assert seen > 25


def _commands(command: Any, path: tuple[str, ...] = ("blastdoor",)) -> Iterator[tuple[list[str], Any]]:
    yield list(path), command
    for name, child in getattr(command, "commands", {}).items():
        yield from _commands(child, (*path, name))


def test_runs_are_a_table_within_eighty_columns() -> None:
    name = "a scenario with a rather long name, in which [bold]markup[/bold] and \x1b[31mcolour\x1b[0m are text"
    items = [{**FAILED, "scenario": {"name": name, "digest": ""}}, {**FAILED, "phase": "running", "outcome": None}]
    result = _invoke("runs", answer=lambda _: httpx.Response(200, json={"items": items, "next_cursor": "abc"}))
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert ID in result.stdout
    assert "running" in result.stdout
    assert "--cursor abc" in result.stdout
    assert "[bold]" in result.stdout
    assert "\x1b" not in result.stdout


def test_what_is_asked_of_the_list_reaches_the_service() -> None:
    asked: list[httpx.QueryParams] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.params)
        return httpx.Response(200, json={"items": [], "next_cursor": None})

    result = _invoke("runs", "--outcome", "failed", "--limit", "5", answer=answer)
    assert dict(asked[0]) == {"outcome": "failed", "limit": "5"}
    assert result.stdout == "no runs\n"


def test_one_run_can_be_shown_and_cancelled() -> None:
    assert "discount rules" in _invoke("runs", "show", ID, answer=_service(FAILED)).stdout
    running = {**FAILED, "phase": "running", "outcome": None}
    shown = _invoke("runs", "cancel", ID, answer=lambda _: httpx.Response(202, json=running))
    assert shown.stdout == f"{ID} is being cancelled\n"
    assert _invoke("runs", "show", ID, answer=lambda _: _problem(404, "not_found")).exit_code == 2


def test_a_tenant_is_added_with_its_quota_and_ceilings_and_its_key_stands_alone_on_a_line() -> None:
    sent: list[Any] = []
    key = "bd_t_" + "k" * 43

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content))
        return httpx.Response(201, json={"tenant": _tenant("acme"), "key": key})

    result = _invoke(
        "tenants", "add", "acme", "--concurrent", "4", "--storage", "2GiB", "--ceiling", "memory=512MiB",
        "--ceiling", "cpu=1.5", "--ceiling", "pids=64", answer=answer,
    )  # fmt: skip
    assert sent == [
        {
            "name": "acme",
            "trust": "untrusted",
            "quota": {"concurrent": 4, "storage_bytes": 2**31},
            "ceilings": {"limits": {"memory": "512MiB", "cpu": 1.5, "pids": 64}},
        }
    ]
    assert key in result.stdout.splitlines()


def test_tenants_are_listed_changed_and_deleted() -> None:
    asked: list[tuple[str, str]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append((request.method, request.url.path))
        if request.method == "DELETE":
            return httpx.Response(204)
        page = {"items": [_tenant("acme")], "next_cursor": None}
        return httpx.Response(200, json=page if request.url.path.endswith("tenants") else _tenant("acme"))

    assert "acme" in _invoke("tenants", answer=answer).stdout
    assert "acme" in _invoke("tenants", "list", answer=answer).stdout
    assert "2 at once" in _invoke("tenants", "show", "acme", answer=answer).stdout
    assert _invoke("tenants", "update", "acme", "--trust", "trusted", answer=answer).exit_code == 0
    assert _invoke("tenants", "delete", "acme", "--yes", answer=answer).stdout == "deleted acme\n"
    assert _invoke("tenants", "keys", "revoke", "acme", "key_1", answer=answer).stdout == "revoked key_1\n"
    base = "/v1/admin/tenants"
    assert asked == [
        ("GET", base), ("GET", base), ("GET", f"{base}/acme"), ("PATCH", f"{base}/acme"), ("DELETE", f"{base}/acme"),
        ("DELETE", f"{base}/acme/keys/key_1"),
    ]  # fmt: skip


def test_deleting_asks_first() -> None:
    result = _invoke("tenants", "delete", "acme", answer=lambda _: pytest.fail("something was sent"))
    assert result.exit_code != 0


def test_keys_and_services_are_made() -> None:
    made = httpx.Response(201, json={"id": "svc_1", "key": "bd_s_1", "key_id": "key_1", "name": "shop"})
    assert "bd_s_1" in _invoke("services", "add", "shop", answer=lambda _: made).stdout.splitlines()
    assert (
        json.loads(_invoke("tenants", "keys", "add", "acme", "--json", answer=lambda _: made).stdout)["id"] == "svc_1"
    )


@pytest.mark.parametrize(
    "arguments",
    [[], ["run"], ["runs"], ["tenants"], ["tenants", "add"], ["services"], ["services", "add"], ["up"], ["admin"]],
)
def test_every_command_explains_itself(arguments: list[str]) -> None:
    result = CliRunner().invoke(make_app(), [*arguments, "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.stdout


_NO_SERVICE = {"BLASTDOOR_URL": "", "BLASTDOOR_KEY": "", "BLASTDOOR_STATE_DIR": ""}
_AT = {"BLASTDOOR_URL": "http://127.0.0.1:1", "BLASTDOOR_KEY": "bd_a_x"}


def _invoke(*arguments: str, answer: Answer) -> Result:
    return CliRunner().invoke(make_app(), list(arguments), obj=httpx.MockTransport(answer), env=_AT)


Row = tuple[str, dict[str, Any]]


def _service(finished: dict[str, Any], *, before: tuple[Row, ...] = ()) -> Answer:
    """Accepts a submission, tells of it with these events and its end, and has it."""

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            return httpx.Response(202, json={**finished, "phase": "queued", "outcome": None, "queue_position": 1})
        if request.url.path.endswith("/events"):
            return _events(*before, ("result", finished))
        return httpx.Response(200, json=finished)

    return answer


def _events(*rows: Row) -> httpx.Response:
    body = "".join(
        f"id: 1.{n}\nevent: {kind}\ndata: {json.dumps(data)}\n\n" for n, (kind, data) in enumerate(rows, start=1)
    )
    return httpx.Response(200, headers={"Content-Type": "text/event-stream"}, content=body.encode())


def _problem(status: int, code: str, **more: object) -> httpx.Response:
    document = {"type": "about:blank", "title": "t", "status": status, "detail": "the detail", "code": code, **more}
    return httpx.Response(status, json=document)


def _tenant(name: str) -> dict[str, Any]:
    quota = {"concurrent": 2, "queued": 100, "storage_bytes": 2**30}
    ceilings = {"limits": {"memory": 2**29, "cpu": None}}
    return {
        "name": name,
        "trust": "untrusted",
        "affinity": None,
        "quota": quota,
        "ceilings": ceilings,
        "service_id": None,
    }
