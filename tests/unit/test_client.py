"""The client against a service that answers by table: what it sends, and what becomes of each kind of answer."""

import base64
import gzip
import hashlib
import io
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from service.client import (
    CannotPack,
    CannotSave,
    Client,
    NotFinishedInTime,
    NotFound,
    Problem,
    Refused,
    ServiceFailed,
    Unreachable,
)

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
    assert isinstance(raised.value, ServiceFailed)


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
    assert isinstance(problem, Refused)
    assert (problem.status, problem.code) == (422, "scenario_invalid")
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


def test_waiting_asks_the_service_to_hold_the_answer_until_the_run_is_finished() -> None:
    phases, asked = ["queued", "running", "finished"], []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url.params))
        return httpx.Response(200, json={**RUN, "phase": phases.pop(0)})

    with _client(answer) as client:
        assert client.wait("run_1")["phase"] == "finished"
    assert asked == ["wait=30.0"] * 3


def test_waiting_has_an_end_when_one_is_asked_for() -> None:
    with _client(lambda _: httpx.Response(200, json=RUN)) as client, pytest.raises(NotFinishedInTime) as raised:
        client.wait("run_1", timeout=0)
    assert raised.value.run == RUN


def test_waiting_sits_out_a_restart_and_nothing_else() -> None:
    down = httpx.ConnectError("connection refused")
    script: list[httpx.Response | Exception] = [*[down] * 9, _problem(503, "unavailable")]
    script.append(httpx.Response(200, json={**RUN, "phase": "finished"}))
    with _client(_scripted(script)) as client:
        assert client.wait("run_1")["phase"] == "finished"
    for answer in (_problem(404, "not_found"), _problem(500, "internal"), httpx.Response(200, text="a portal")):
        with _client(_scripted([answer])) as client, pytest.raises((Problem, Unreachable)):
            client.wait("run_1")


def test_a_submission_that_is_still_being_judged_is_asked_for_again() -> None:
    """The first answer was lost on its way; the service has not forgotten the request."""
    lost = httpx.ReadError("connection reset")
    script = [lost, _problem(409, "idempotency_in_flight"), httpx.Response(202, json=RUN)]
    with _client(_scripted(script)) as client:
        assert client.submit(b"PK")["id"] == "run_1"
    assert script == []


@pytest.mark.parametrize("retries", [0, 3])
def test_it_is_given_up_after_as_many_tries_as_were_allowed(retries: int) -> None:
    tries: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        tries.append(request.headers["Idempotency-Key"])
        raise httpx.ReadError("reset")

    client = Client(
        "http://127.0.0.1:1", KEY, transport=httpx.MockTransport(answer), retries=retries, sleep=lambda _: None
    )
    with client, pytest.raises(Unreachable):
        client.submit(b"PK")
    assert len(tries) == retries + 1
    assert len(set(tries)) == 1


def test_what_may_not_happen_twice_is_repeated_only_when_it_was_never_sent() -> None:
    made = httpx.Response(201, json={"id": "wh_1"})
    with _client(_scripted([httpx.ConnectError("refused"), made])) as client:
        assert client.webhooks.create("https://example.com") == {"id": "wh_1"}
    for lost in (httpx.ReadError("reset"), _problem(503, "unavailable", headers={"Retry-After": "0"})):
        with _client(_scripted([lost, made])) as client, pytest.raises((Unreachable, ServiceFailed)):
            client.webhooks.create("https://example.com")


def test_an_own_idempotency_key_is_used_as_it_is() -> None:
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["Idempotency-Key"])
        return httpx.Response(202, json=RUN)

    with _client(answer) as client:
        client.submit(b"PK", idempotency_key="order-7")
        client.submit(b"PK")
        client.submit(b"PK")
    assert seen[0] == "order-7"
    assert len(set(seen)) == 3


def test_a_bundle_may_be_an_archive_its_bytes_or_nothing_and_documents_may_be_mappings(tmp_path: Path) -> None:
    archive = tmp_path / "code.zip"
    archive.write_bytes(b"PK archive")
    seen: list[dict[str, bytes]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(_parts(request))
        return httpx.Response(202, json=RUN)

    with _client(answer) as client:
        client.submit(archive)
        client.submit(str(archive), controls=b"isolation: hard")
        client.submit(b"PK bytes")
        client.submit(scenario={"name": "x"})
    assert [parts.get("bundle") for parts in seen] == [b"PK archive", b"PK archive", b"PK bytes", None]
    assert seen[1]["controls"] == b"isolation: hard"
    assert seen[3]["scenario"] == b'{"name": "x"}'


def test_a_list_is_read_page_after_page() -> None:
    pages = {None: ([1, 2], "abc"), "abc": ([3], None)}

    def answer(request: httpx.Request) -> httpx.Response:
        assert request.url.params["outcome"] == "failed"
        items, cursor = pages[request.url.params.get("cursor")]
        return httpx.Response(200, json={"items": [{"id": n} for n in items], "next_cursor": cursor})

    with _client(answer) as client:
        assert [run["id"] for run in client.list(outcome="failed")] == [1, 2, 3]


def test_a_download_that_is_not_what_its_digest_says_is_an_error() -> None:
    right = f"sha-256=:{base64.b64encode(hashlib.sha256(b'bytes').digest()).decode()}:"
    for header, harmed in ((right, False), (right.replace("=:", "=:AAAA", 1), False), (right, True)):
        data = b"other" if harmed else b"bytes"
        answer = httpx.Response(200, content=data, headers={"Repr-Digest": header})
        with _client(lambda _, answer=answer: answer) as client:  # type: ignore[misc]
            if harmed:
                with pytest.raises(CannotSave):
                    client.artifact("run_1", "a")
            else:
                assert client.artifact("run_1", "a") == b"bytes"


def test_webhooks_dead_letters_and_workers_are_asked_for_where_they_are() -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(f"{request.method} {request.url.raw_path.decode()}")
        return httpx.Response(204) if request.method == "DELETE" else httpx.Response(200, json={"items": []})

    with _client(answer) as client:
        client.webhooks.list()
        client.webhooks.get("wh_1")
        client.webhooks.delete("wh_1")
        client.webhooks.rotate("wh_1")
        client.webhooks.deliveries("wh_1", limit=5, cursor="abc")
        client.webhooks.replay("wh_1", "../x")
        client.admin.dead_letters()
        client.admin.replay_dead_letter("dl_1")
        client.admin.workers()
        client.admin.kill("run_1")
        client.delete("run_1")
    assert asked == [
        "GET /v1/webhooks", "GET /v1/webhooks/wh_1", "DELETE /v1/webhooks/wh_1", "POST /v1/webhooks/wh_1/rotate",
        "GET /v1/webhooks/wh_1/deliveries?limit=5&cursor=abc", "POST /v1/webhooks/wh_1/deliveries/%2E%2E%2Fx/replay",
        "GET /v1/admin/dead-letters", "POST /v1/admin/dead-letters/dl_1/replay", "GET /v1/admin/workers",
        "POST /v1/admin/runs/run_1/kill", "DELETE /v1/runs/run_1",
    ]  # fmt: skip


def test_what_is_absent_has_a_class_of_its_own() -> None:
    with _client(lambda _: _problem(404, "not_found")) as client, pytest.raises(NotFound):
        client.get("run_1")


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
        client.tenants.list()
        client.page()
    with Client("http://127.0.0.1:1", key="bd_a_x", transport=transport) as client:
        client.tenants.list()
    assert seen == [("/v1/tenants", "acme"), ("/v1/runs", "acme"), ("/v1/admin/tenants", None)]


def _client(answer: Answer) -> Client:
    return Client("http://127.0.0.1:1", KEY, transport=httpx.MockTransport(answer), sleep=lambda _: None)


def _scripted(script: "list[httpx.Response | Exception]") -> Answer:
    """One after the other; what is an exception is what happens to the request."""

    def answer(request: httpx.Request) -> httpx.Response:
        request.read()
        next_ = script.pop(0)
        if isinstance(next_, Exception):
            raise next_
        return next_

    return answer


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
