"""One trace from the request to the event that the application reads, and to the log lines on the way."""

import json
import re
from collections.abc import Iterator

import pytest

from tests.e2e.consumer import Consumer, Event
from tests.stack import Stack, finished

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
GIVEN = f"00-{TRACE}-00f067aa0ba902b7-01"
SCENARIO = {"scenario": ("scenario.json", json.dumps({"name": "t", "steps": [{"name": "s", "run": "true"}]}).encode())}


@pytest.fixture
def consumer(stack: Stack) -> Iterator[Consumer]:
    consumer = Consumer(stack.ready["redis_url"], group="tracing")
    yield consumer
    consumer.close()


def told(stack: Stack, consumer: Consumer, headers: dict[str, str]) -> tuple[str, list[Event]]:
    answer = stack.tenant.post("/v1/runs", files=SCENARIO, headers=headers)
    assert answer.status_code == 202, answer.text
    run_id = answer.json()["id"]
    finished(stack.tenant, run_id)
    return run_id, consumer.events(run_id, until="run.finished")


def test_the_callers_trace_goes_with_every_event_and_every_log_line_of_the_run(
    stack: Stack, consumer: Consumer
) -> None:
    run_id, events = told(stack, consumer, {"traceparent": GIVEN})

    for event in events:
        version, trace, span, flags = event["traceparent"].split("-")
        assert (version, trace, flags) == ("00", TRACE, "01")
        assert re.fullmatch(r"[0-9a-f]{16}", span)
        assert span != GIVEN.split("-")[2], "a span of ours, in the caller's trace"
    lines = [json.loads(line) for line in (stack.state / "logs" / "worker.log").read_text().splitlines()]
    of_run = [line for line in lines if line.get("run_id") == run_id and "trace_id" in line]
    assert of_run
    assert {line["trace_id"] for line in of_run} == {TRACE}


@pytest.mark.parametrize("given", [None, "00-" + "0" * 32 + "-00f067aa0ba902b7-01", "nonsense"])
def test_without_a_valid_one_a_trace_begins_here(stack: Stack, consumer: Consumer, given: str | None) -> None:
    _, events = told(stack, consumer, {} if given is None else {"traceparent": given})

    traces = {event["traceparent"].split("-")[1] for event in events}
    assert len(traces) == 1
    (trace,) = traces
    assert re.fullmatch(r"[0-9a-f]{32}", trace)
    assert trace not in (TRACE, "0" * 32)


def test_an_answer_that_is_given_again_keeps_the_first_ones_trace(stack: Stack, consumer: Consumer) -> None:
    key = {"Idempotency-Key": "the-same"}
    run_id, events = told(stack, consumer, key | {"traceparent": GIVEN})
    again = stack.tenant.post("/v1/runs", files=SCENARIO, headers=key | {"traceparent": GIVEN.replace(TRACE, "a" * 32)})

    assert (again.status_code, again.json()["id"]) == (202, run_id)
    assert {event["traceparent"].split("-")[1] for event in events} == {TRACE}
