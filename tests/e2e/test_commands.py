"""The commands as a user types them, against a real `blastdoor up` and a real sandbox: what they print, what they
leave, how they end."""

import json
import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from service.client import Client, ResultEvent
from tests.stack import Stack, eventually, read

pytestmark = pytest.mark.timeout(180)
BLASTDOOR = [sys.executable, "-I", "-m", "service.cli.main"]
CONTROLS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
D34 = r"\033[2J\033]52;c;cm0=\007\033]8;;http://x\033\\y\rpassed\342\200\256gnp\007"


def start(stack: Stack, *arguments: str) -> "subprocess.Popen[str]":
    environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "BLASTDOOR_STATE_DIR": str(stack.state)}
    return subprocess.Popen(
        [*BLASTDOOR, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip


def blastdoor(stack: Stack, *arguments: str) -> tuple[int, str, str]:
    """-> exit code, stdout, stderr."""
    with start(stack, *arguments) as process:
        out, errors = process.communicate(timeout=120)
    return process.returncode, out, errors


def code(directory: Path, *steps: str, artifacts: str = "") -> str:
    """A directory with a scenario of these commands. -> its path."""
    directory.mkdir()
    rows = [{"name": f"number {n}", "run": run} for n, run in enumerate(steps, start=1)]
    scenario = {"name": "typed by hand", "steps": rows, "artifacts": [artifacts] if artifacts else []}
    (directory / "scenario.yaml").write_text(json.dumps(scenario))
    return str(directory)


def newest(stack: Stack) -> str:
    _, out, _ = blastdoor(stack, "runs", "--limit", "1", "--json")
    return str(json.loads(out)["items"][0]["id"])


def test_a_run_is_watched_reported_and_its_files_are_kept(stack: Stack, tmp_path: Path) -> None:
    directory = code(
        tmp_path / "code", "echo one; echo two >&2; mkdir out; echo x > out/r", "exit 3", artifacts="out/**"
    )
    report, kept = tmp_path / "report.xml", tmp_path / "kept"
    status, out, errors = blastdoor(stack, "run", directory, "--junit", str(report), "--artifacts", str(kept))

    assert status == 1, errors
    live, _, summary = out.partition("\n\n")
    lines = live.splitlines()
    assert lines[0] == "step 1/2  number 1"
    assert sorted(lines[1:3]) == ["  ! two", "  | one"]
    assert lines[3:] == ["  passed", "step 2/2  number 2  failed  exit_code: expected 0, got 3"]
    assert summary.startswith("failed  typed by hand")
    assert "playing the scenario" in errors
    assert (kept / "out" / "r").read_text() == "x\n"
    assert ElementTree.parse(report).getroot().attrib["failures"] == "1"
    run_id = newest(stack)
    assert blastdoor(stack, "runs", "junit", run_id)[1] == report.read_text()
    assert blastdoor(stack, "runs", "logs", run_id)[1].splitlines() == [
        "step 1  number 1  passed", "  | one", "  ! two", "step 2  number 2  failed",
    ]  # fmt: skip
    assert blastdoor(stack, "runs", "delete", run_id)[:2] == (0, f"deleted {run_id}\n")
    assert blastdoor(stack, "runs", "show", run_id)[0] == 2


def test_what_a_guest_prints_is_shown_and_not_obeyed(stack: Stack, tmp_path: Path) -> None:
    """D34, also in pieces that the guest flushes one by one."""
    pieces = "for c in '\\033' ']52;c;cm0=' '\\007' '\\342' '\\200\\256'; do printf \"$c\"; sleep 0.05; done"
    directory = code(tmp_path / "code", f"printf '{D34}\\n'", pieces)
    status, out, errors = blastdoor(stack, "run", directory)

    assert status == 0, errors
    assert not CONTROLS.search(out + errors)
    assert out.count(r"\x1b]52;c;cm0=\x07") == 2
    assert r"\rpassed\u202egnp\x07" in out
    run_id = newest(stack)
    for command in (("show",), ("logs",), ("logs", "--follow")):
        assert not CONTROLS.search("".join(blastdoor(stack, "runs", command[0], run_id, *command[1:])[1:]))
    raw = read(stack.tenant, run_id)["steps"][0]["stdout"]["text"]
    assert CONTROLS.search(raw), "it is stored as it was printed"


def test_a_running_run_is_followed_by_another_terminal_and_cancelled_by_ctrl_c(stack: Stack, tmp_path: Path) -> None:
    directory = code(tmp_path / "code", "echo begun; sleep 60")
    with start(stack, "run", directory) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "begun" in line:
                break
        run_id = newest(stack)
        so_far = blastdoor(stack, "runs", "logs", run_id)[1]
        assert so_far.splitlines() == ["step 1/1  number 1", "  | begun"]
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert f"cancelling {run_id}" in errors
    assert "cancelled  typed by hand" in out
    assert read(stack.tenant, run_id)["reason"] == "cancelled_by_tenant"


def test_a_detached_run_is_followed_to_its_end_as_lines_of_json(stack: Stack, tmp_path: Path) -> None:
    status, out, errors = blastdoor(stack, "run", code(tmp_path / "code", "echo x"), "--detach")
    assert status == 0, errors
    run_id = out.strip()
    lines = [
        json.loads(line) for line in blastdoor(stack, "runs", "logs", run_id, "--follow", "--json")[1].splitlines()
    ]
    assert [line["phase"] for line in lines if line["event"] == "phase"][-1] == "finished"
    assert "".join(line["text"] for line in lines if line["event"] == "output") == "x\n"
    assert lines[-1]["run"]["outcome"] == "passed"


def test_a_stream_survives_a_restart_of_the_api(stack: Stack) -> None:
    """The process is killed while two streams are open; `up` starts another one, on the same port."""
    with Client(stack.ready["url"], stack.ready["tenant_key"]) as blastdoor:
        wait = "echo begun; until [ -e /work/go ]; do sleep 0.05; done; echo ended"
        scenario = {"name": "x", "steps": [{"name": "y", "run": wait, "timeout": "60s"}]}
        run_id = blastdoor.submit(scenario=scenario)["id"]
        lost: list[Exception] = []
        ids, said = [], ""
        for event in blastdoor.stream(run_id, on_lost=lost.append):
            ids.append(event.id)
            if text := getattr(event, "text", None):
                said += text if hasattr(event, "stream") else ""
            if said == "begun\n" and not lost and len(ids) == len(set(ids)):
                before = stack.children["api"]
                os.kill(before, signal.SIGKILL)
                assert eventually(lambda before=before: stack.children["api"] != before)  # type: ignore[misc]
                stack.work_of(run_id).joinpath("go").touch()
                said += "|"
    assert lost, "the connection was never lost"
    assert said == "begun\n|ended\n"
    assert isinstance(event, ResultEvent)
    assert event.run["outcome"] == "passed"
    assert ids == sorted(set(ids), key=lambda id_: tuple(map(int, id_.split("."))))
