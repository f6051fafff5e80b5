"""What an operator sees of the API: one log line a request, its trace, and what is counted."""

import json
import re
from typing import Any

import httpx
import pytest

from tests.integration.api.conftest import SCENARIO, Served, _until

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
GIVEN = f"00-{TRACE}-00f067aa0ba902b7-01"


def lines(served: Served, *, event: str) -> list[dict[str, Any]]:
    """The client of the test logs into the same stream; what it says is not ours."""
    read = [json.loads(line) for line in served.log.getvalue().splitlines()]
    return [line for line in read if line["event"] == event and line.get("logger") != "httpx"]


def asked(served: Served, request_id: str) -> dict[str, Any]:
    def found() -> list[dict[str, Any]]:
        return [line for line in lines(served, event="request") if line["request_id"] == request_id]

    _until(found)  # it is written after the answer has gone out
    (line,) = found()
    return line


def counted(served: Served, name: str, **labels: str) -> float:
    metrics = vars(served.app.state.context.deps.metrics).values()
    samples = [sample for metric in metrics for family in metric.collect() for sample in family.samples]
    return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())


def test_a_request_is_one_line_with_its_route_and_neither_query_nor_key(served: Served) -> None:
    acme = served.client("acme")
    run_id = served.submit()["id"]
    answer = acme.get(f"/v1/runs/{run_id}", params={"wait": "0", "token": "queryword"}, headers={"traceparent": GIVEN})

    line = asked(served, answer.headers["x-request-id"])

    assert (line["method"], line["route"], line["path"]) == ("GET", "/v1/runs/{run_id}", f"/v1/runs/{run_id}")
    assert (line["status"], line["level"], line["trace_id"]) == (200, "info", TRACE)
    assert 0 <= line["duration_s"] < 60
    assert line["key_id"].startswith("key_")
    said = json.dumps(lines(served, event="request"))
    assert run_id in said, "the search finds what is there"
    assert "queryword" not in said
    assert all(key not in served.log.getvalue() for key in served.keys.values())


def test_a_key_in_a_path_is_hidden_and_a_path_forges_no_line(served: Served) -> None:
    key = served.keys["acme"]
    with httpx.Client(base_url=served.url, trust_env=False) as client:
        pasted = client.get(f"/v1/{key}")
        forged = client.get('/v1/a%0a{"event":"forged","level":"error"}%1b[31m%e2%80%a8' + "b" * 1000)

    assert key[5:] not in served.log.getvalue()
    assert asked(served, pasted.headers["x-request-id"])["path"] == "/v1/bd_t_[hidden]"
    line = asked(served, forged.headers["x-request-id"])
    assert line["path"].startswith('/v1/a\n{"event":"forged"'), "all of it, as a value"
    assert (line["route"], line["event"], line["level"], len(line["path"])) == ("unmatched", "request", "info", 200)
    assert not lines(served, event="forged")
    assert served.log.getvalue().isascii()


def test_what_is_logged_on_the_way_says_whose_request_it_is(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: object) -> None:
        raise RuntimeError("of ours")

    monkeypatch.setattr(served.app.state.context.deps.tenants, "find_key", broken)
    answer = served.client("acme").get("/v1/runs", headers={"traceparent": GIVEN})

    assert answer.status_code == 500
    (failed,) = lines(served, event="request_failed")
    assert (failed["request_id"], failed["trace_id"]) == (answer.headers["x-request-id"], TRACE)


def test_without_a_traceparent_each_request_is_a_trace_of_its_own(served: Served) -> None:
    answers = [served.client("acme").get("/v1/runs", headers=h) for h in ({}, {}, {"traceparent": "nonsense"})]
    traces = {asked(served, answer.headers["x-request-id"])["trace_id"] for answer in answers}

    assert len(traces) == 3
    assert all(re.fullmatch("[0-9a-f]{32}", trace) for trace in traces)


def test_the_trace_is_no_part_of_the_content_that_an_idempotency_key_stands_for(served: Served) -> None:
    files = {"scenario": (None, SCENARIO)}
    answers = [
        served.client("acme").post(
            "/v1/runs", files=files, headers={"Idempotency-Key": "k", "traceparent": GIVEN.replace("4", str(digit))}
        )
        for digit in (1, 2)
    ]

    assert [answer.status_code for answer in answers] == [202, 202]
    assert answers[0].json()["id"] == answers[1].json()["id"]
    assert answers[1].headers["idempotent-replayed"] == "true"
    assert served.claim().traceparent.split("-")[1] == TRACE.replace("4", "1")  # type: ignore[union-attr]
    assert counted(served, "blastdoor_runs_accepted_total") == 1
    assert counted(served, "blastdoor_runs_replayed_total") == 1


def test_requests_are_counted_by_route_method_and_class_of_status(served: Served) -> None:
    run_id = served.submit()["id"]
    for path in (f"/v1/runs/{run_id}", f"/v1/runs/{run_id[:-1]}x", "/v1/runs", "/nowhere", "/nowhere/else"):
        served.client("acme").get(path)
    served.client("acme").request("PROPFIND", "/v1/runs")
    name = "blastdoor_http_requests_total"
    _until(lambda: counted(served, name, method="other") == 1)

    assert counted(served, name, route="/v1/runs", method="POST", status="2xx") == 1
    assert counted(served, name, route="/v1/runs/{run_id}", status="2xx") == 1
    assert counted(served, name, route="/v1/runs/{run_id}", status="4xx") == 1
    assert counted(served, name, route="unmatched", method="GET", status="4xx") == 2
    assert counted(served, "blastdoor_http_request_duration_seconds_count", route="/v1/runs/{run_id}") == 2
    assert counted(served, "blastdoor_http_requests_in_flight") == 0


@pytest.mark.parametrize(
    ("code", "scenario"), [("scenario_invalid", "name: x\nsteps: []\n"), ("request_invalid", None)]
)
def test_a_refused_submission_is_counted_by_its_code(served: Served, code: str, scenario: str | None) -> None:
    files = {"scenario": (None, scenario)} if scenario is not None else {"unknown": (None, "x")}
    assert served.client("acme").post("/v1/runs", files=files).json()["code"] == code

    assert counted(served, "blastdoor_runs_refused_total", code=code) == 1
    assert counted(served, "blastdoor_runs_accepted_total") == 0


def test_open_streams_and_waiters_are_seen_while_they_are_open(served: Served) -> None:
    run_id = served.submit()["id"]
    with served.client("acme").stream("GET", f"/v1/runs/{run_id}/events") as stream:
        told = stream.iter_lines()
        next(told)
        _until(lambda: counted(served, "blastdoor_event_streams") == 1)
        _until(lambda: counted(served, "blastdoor_waiters") == 1)
        assert counted(served, "blastdoor_http_requests_in_flight") == 1
    _until(lambda: counted(served, "blastdoor_event_streams") == 0)
    _until(lambda: counted(served, "blastdoor_http_requests_in_flight") == 0)
