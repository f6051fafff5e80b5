"""The client against a service that answers by table: what it sends, and what becomes of each kind of answer."""

import gzip
import io
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from service.cli.client import Client, Problem, Unreachable
from service.cli.packing import CannotPack

KEY = "bd_t_" + "x" * 43
RUN = {"id": "run_1", "phase": "queued", "outcome": None}
Answer = Callable[[httpx.Request], httpx.Response]


def test_a_submission_carries_the_bundle_the_documents_and_the_key(tmp_path: Path) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "main.py").write_text("print()")
    scenario = tmp_path / "other.yaml"
    scenario.write_text("name: other")
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        request.read()
        seen.append(request)
        return httpx.Response(202, json=RUN)

    with _client(answer) as client:
        assert client.submit(code, scenario=scenario, metadata={"build": "7"}) == RUN
    (request,) = seen
    assert (request.method, request.url.path) == ("POST", "/v1/runs")
    assert request.headers["Authorization"] == f"Bearer {KEY}"
    parts = _parts(request)
    assert parts["scenario"] == b"name: other"
    assert parts["metadata"] == b'{"build": "7"}'
    assert "controls" not in parts
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(parts["bundle"]))) as archive:
        assert archive.getnames() == ["main.py"]


def test_an_upload_whose_answer_was_lost_is_repeated_under_the_same_key(tmp_path: Path) -> None:
    keys: list[str] = []
    bodies: list[bytes] = []

    def answer(request: httpx.Request) -> httpx.Response:
        bodies.append(_parts(request)["bundle"])
        keys.append(request.headers["Idempotency-Key"])
        if len(keys) == 1:
            raise httpx.ReadError("connection reset", request=request)
        return httpx.Response(202, json=RUN)

    with _client(answer) as client:
        assert client.submit(tmp_path)["id"] == "run_1"
    assert len(keys) == 2
    assert len(set(keys)) == 1
    assert len(set(bodies)) == 1


def test_a_service_that_is_busy_is_asked_again_when_it_said(tmp_path: Path) -> None:
    answers = [_problem(503, "unavailable", headers={"Retry-After": "0"}), httpx.Response(202, json=RUN)]
    with _client(lambda request: answers.pop(0)) as client:
        assert client.submit(tmp_path)["id"] == "run_1"


def test_a_service_that_is_busy_for_long_is_not_waited_for(tmp_path: Path) -> None:
    busy = _problem(503, "unavailable", headers={"Retry-After": "3600"})
    with _client(lambda request: busy) as client, pytest.raises(Problem) as raised:
        client.submit(tmp_path)
    assert not raised.value.refused


def test_nothing_is_sent_of_a_directory_that_cannot_be_packed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/passwd")
    with _client(lambda request: pytest.fail("something was sent")) as client, pytest.raises(CannotPack):
        client.submit(tmp_path)


def test_a_refusal_is_its_problem_document() -> None:
    errors = [{"path": "steps", "message": "should not be empty"}]
    refusal = _problem(422, "scenario_invalid", errors=errors)
    with _client(lambda request: refusal) as client, pytest.raises(Problem) as raised:
        client.get("run_1")
    problem = raised.value
    assert (problem.status, problem.code, problem.refused) == (422, "scenario_invalid", True)
    assert problem.document["errors"] == errors
    assert str(problem) == "the detail"


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, text="<html>a captive portal</html>"),
        httpx.Response(502, text="bad gateway"),
        httpx.Response(404, json={"detail": "Not Found"}),
        httpx.Response(307, headers={"Location": "http://elsewhere/"}),
    ],
    ids=["a page", "a gateway", "another service", "a redirect"],
)
def test_what_does_not_answer_like_blastdoor_is_not_taken_for_it(answer: httpx.Response) -> None:
    with _client(lambda request: answer) as client, pytest.raises(Unreachable, match="not as Blastdoor does"):
        client.get("run_1")


def test_a_refused_connection_is_unreachable_and_names_the_place() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("connection refused", request=request)

    with _client(answer) as client:
        assert client.healthy() is False
        with pytest.raises(Unreachable, match=r"http://127\.0\.0\.1:1 does not answer: connection refused"):
            client.capabilities()


def test_watching_ends_with_the_finished_run() -> None:
    phases = ["queued", "running", "running", "finished"]
    with _client(lambda request: httpx.Response(200, json={**RUN, "phase": phases.pop(0)})) as client:
        assert [run["phase"] for run in client.watch("run_1")] == ["queued", "running", "running", "finished"]


def test_waiting_asks_the_service_to_hold_the_answer() -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url.params))
        return httpx.Response(200, json={**RUN, "phase": "finished"})

    with _client(answer) as client:
        client.wait("run_1")
    assert asked == ["wait=30"]


@pytest.mark.parametrize("run_id", ["../admin/tenants", "run_1?x=", "run_1#", "run_1/cancel", "%2e%2e"])
def test_an_id_cannot_lead_to_another_route(run_id: str) -> None:
    paths: list[bytes] = []

    def answer(request: httpx.Request) -> httpx.Response:
        paths.append(request.url.raw_path)
        return _problem(404, "not_found")

    with _client(answer) as client, pytest.raises(Problem):
        client.get(run_id)
    (path,) = paths
    assert re.fullmatch(rb"/v1/runs/[A-Za-z0-9_.%-]+", path)


def test_a_service_key_manages_its_own_tenants_and_names_whom_it_acts_for() -> None:
    seen: list[tuple[str, str | None]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append((request.url.path, request.headers.get("Blastdoor-Tenant")))
        return httpx.Response(200, json={"items": [], "next_cursor": None})

    transport = httpx.MockTransport(answer)
    with Client("http://127.0.0.1:1", key="bd_s_x", tenant="acme", transport=transport) as client:
        client.list_tenants()
        client.list_runs()
    with Client("http://127.0.0.1:1", key="bd_a_x", transport=transport) as client:
        client.list_tenants()
    assert seen == [("/v1/tenants", "acme"), ("/v1/runs", "acme"), ("/v1/admin/tenants", None)]


def _client(answer: Answer) -> Client:
    return Client("http://127.0.0.1:1", key=KEY, transport=httpx.MockTransport(answer))


def _problem(status: int, code: str, headers: dict[str, str] | None = None, **more: object) -> httpx.Response:
    document = {"type": "about:blank", "title": "t", "status": status, "detail": "the detail", "code": code, **more}
    return httpx.Response(status, json=document, headers=headers)


def _parts(request: httpx.Request) -> dict[str, bytes]:
    """The multipart body, by name."""
    boundary = request.headers["Content-Type"].partition("boundary=")[2].encode()
    parts = {}
    for part in request.read().split(b"--" + boundary)[1:-1]:
        head, _, body = part.partition(b"\r\n\r\n")
        match = re.search(rb'name="([^"]+)"', head)
        assert match is not None
        parts[match[1].decode()] = body.removesuffix(b"\r\n")
    return parts
