"""A real sandbox, watched over HTTP while it runs: output as it comes, and nothing that a guest prints is an event."""

import base64
import json
from typing import Any

import httpx
import pytest

from tests.sse import Event, watch, watching
from tests.stack import Stack, finished, python, read, submit

pytestmark = pytest.mark.timeout(180)


def said(events: list[Event], *, step: int, stream: str = "stdout") -> str:
    told = [event.json for event in events if event.event == "output"]
    mine = [one for one in told if (one["step"], one["stream"]) == (step, stream)]
    assert [one["seq"] for one in mine] == list(range(len(mine)))
    return "".join(one["text"] for one in mine)


def stages(events: list[Event]) -> list[tuple[str, int | None, str]]:
    told = [event.json for event in events if event.event == "progress"]
    return [(one["stage"], one["step"], one["state"]) for one in told]


def test_output_is_there_while_the_step_still_runs(stack: Stack) -> None:
    """The step waits for a file that is made only after its first line was seen on the stream."""
    wait = "echo first; until [ -e /work/go ]; do sleep 0.05; done; echo second >&2"
    run_id = submit(stack.tenant, {"run": wait, "timeout": "60s"})
    seen: list[Event] = []
    with watching(stack.tenant, run_id) as events:
        for event in events:
            seen.append(event)
            if event.event == "output" and event.json["stream"] == "stdout":
                assert event.json == {"step": 1, "stream": "stdout", "seq": 0, "text": "first\n"}
                assert read(stack.tenant, run_id)["phase"] == "running"
                stack.work_of(run_id).joinpath("go").touch()

    assert (said(seen, step=1), said(seen, step=1, stream="stderr")) == ("first\n", "second\n")
    assert stages(seen) == [
        ("boundary", None, "started"), ("boundary", None, "done"), ("step", 1, "started"), ("step", 1, "passed"),
        ("collect", None, "started"), ("collect", None, "done"),
    ]  # fmt: skip
    assert [event.json["phase"] for event in seen if event.event == "phase"] == [
        "queued", "provisioning", "running", "collecting", "finished"
    ]  # fmt: skip
    assert seen[-1].json["outcome"] == "passed"
    for start, event in enumerate(seen, start=1):
        rest = watch(stack.tenant, run_id, after=event.id)
        assert [e.id for e in rest] == [e.id for e in seen[start:]]


FORGED = (
    b'\n\nid: 99.1\nevent: result\ndata: {"outcome": "passed"}\n\n\r\r\nid: 99.2\r\nevent: result\r\n\r\n'
    b"\0\x1b[2J\x1b]0;t\x07\x1b]52;c;eA==\x07\xe2\x80\xa8event: result\xe2\x80\xa9\xc2\x85\x0b\x0c\x1c\x1d\x1e"
    b'\xff\xfe\xf0\x9d\x84\x9e\xe2\x80\xae{"type":"dev.blastdoor.run.finished"}\n::set-env name=A::b\n'
)


def test_what_a_guest_prints_is_text_and_never_an_event(stack: Stack) -> None:
    """In two writes, so that a character and a frame are cut in the middle."""
    encoded, half = base64.b64encode(FORGED).decode(), FORGED.index(b"\x9d\x84")
    program = (
        "import base64, os, sys, time\n"
        f"data = base64.b64decode('{encoded}')\n"
        f"os.write(1, data[:{half}]); time.sleep(0.4); os.write(1, data[{half}:]); os.write(2, data)\n"
        "sys.exit(1)\n"
    )
    run_id = submit(stack.tenant, python(program))
    answer = _raw(stack.tenant, run_id)
    seen = watch(stack.tenant, run_id)

    text = FORGED.decode("utf-8", "replace")
    assert (said(seen, step=1), said(seen, step=1, stream="stderr")) == (text, text)
    assert [(event.id, event.json["outcome"]) for event in seen if event.event == "result"] == [("5.1", "failed")]
    assert answer.isascii()
    assert not set(answer) & (set(range(32)) - {10})
    assert len([line for line in answer.decode().splitlines() if line.startswith("event: result")]) == 1


def test_a_flood_is_told_up_to_its_head_and_does_not_slow_the_run(stack: Stack) -> None:
    flood = "head -c 8000000 /dev/zero | tr '\\0' x; echo the end >&2"
    run_id = submit(stack.tenant, flood, limits={"output": "256KiB"})
    seen = watch(stack.tenant, run_id)

    assert said(seen, step=1) == "x" * 128 * 1024
    assert said(seen, step=1, stream="stderr") == "the end\n"
    cut: list[dict[str, Any]] = [event.json for event in seen if event.json.get("omitted")]
    assert [(one["stream"], one["text"]) for one in cut] == [("stdout", "")]
    run = finished(stack.tenant, run_id)
    assert (run["outcome"], run["steps"][0]["stdout"]["bytes"]) == ("passed", 8_000_000)
    assert json.loads(seen[-1].data)["id"] == run_id


def test_a_stranger_cannot_watch(stack: Stack) -> None:
    run_id = submit(stack.tenant, "echo secret")
    theirs = stack.stranger.get(f"/v1/runs/{run_id}/events")
    never = stack.stranger.get(f"/v1/runs/run_{'0' * 32}/events")

    assert (theirs.status_code, never.status_code) == (404, 404)
    assert {**theirs.json(), "request_id": "", "instance": ""} == {**never.json(), "request_id": "", "instance": ""}
    assert said(watch(stack.tenant, run_id), step=1) == "secret\n"


def _raw(client: httpx.Client, run_id: str) -> bytes:
    with client.stream("GET", f"/v1/runs/{run_id}/events", timeout=60) as answer:
        return b"".join(answer.iter_raw())
