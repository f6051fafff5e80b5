"""Every code of the contract, as it comes over the wire; and that nothing else ever does."""

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from service.api.errors import TABLE
from service.core.errors import BlastdoorError, StorageFull, Unavailable
from service.core.ids import new_run_id
from tests.factories import make_capabilities
from tests.integration.api.conftest import SCENARIO, Served, make_settings, serve
from tests.integration.api.test_runs import make_tar_gz, make_zip
from tests.servers import RedisServer

MEMBERS = ["type", "title", "status", "detail", "instance", "code", "request_id"]


def check_problem(answer: httpx.Response, *, status: int, code: str) -> dict[str, Any]:
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), answer.text
    problem: dict[str, Any] = answer.json()
    assert problem["code"] == code, problem
    assert problem["type"] == f"urn:blastdoor:problem:{code}"
    assert problem["status"] == status
    assert problem["title"] == TABLE[code].title
    assert problem["detail"]
    assert problem["instance"] == answer.request.url.path
    assert problem["request_id"] == answer.headers["x-request-id"]
    assert set(MEMBERS) <= set(problem)
    if code.endswith("_invalid"):
        assert all(set(row) == {"path", "message"} for row in problem["errors"])
        assert problem["errors"]
    return problem


def submit(served: Served, **parts: Any) -> httpx.Response:
    files = {name: (None, part) if isinstance(part, str) else part for name, part in parts.items()}
    return served.client("acme").post("/v1/runs", files={"scenario": (None, SCENARIO)} | files)


def test_an_unknown_path_and_a_wrong_method_are_problems(served: Served) -> None:
    nobody = served.client("nobody")
    for path in ("/", "/v1", "/v1/runs/", "/v1/runs/x/y/z", "/v2/runs", "/docs/oauth2-redirect", "/redoc", "/%00"):
        check_problem(nobody.get(path), status=404, code="not_found")
    wrong = nobody.put("/healthz")
    check_problem(wrong, status=405, code="method_not_allowed")
    assert "GET" in wrong.headers["allow"]


def test_a_body_that_is_not_what_it_should_be_says_where(served: Served) -> None:
    operator = served.client("operator")
    bodies: dict[str, list[str]] = {
        "{}": ["name"],
        '{"name": "UPPER", "quota": {"queued": 0, "nope": 1}}': ["name", "quota.queued", "quota.nope"],
        '{"name": "good", "trust": "maybe"}': ["trust"],
        '{"name": "good", "ceilings": {"limits": {"memory": "1MiB"}}}': ["ceilings.limits.memory"],
        "[]": [""],
        "{": ["1"],
        "[" * 60_000: [""],
        '"\\ud800"': [""],
    }
    for body, paths in bodies.items():
        answer = operator.post("/v1/admin/tenants", content=body, headers={"Content-Type": "application/json"})
        problem = check_problem(answer, status=422, code="request_invalid")
        assert [row["path"] for row in problem["errors"]] == paths, body
    secret = operator.post("/v1/admin/tenants", json={"name": "bd_t_secret", "trust": "s3cret"})
    assert "s3cret" not in secret.text


def test_a_wait_or_a_list_that_cannot_be_is_422(served: Served) -> None:
    acme = served.client("acme")
    for wait in ("61", "-1", "nan", "inf", "x"):
        answer = acme.get(f"/v1/runs/{new_run_id()}?wait={wait}")
        assert check_problem(answer, status=422, code="request_invalid")["errors"][0]["path"] == "query.wait"
    for query in ("limit=0", "limit=101", "phase=sleeping", "outcome=fine"):
        check_problem(acme.get(f"/v1/runs?{query}"), status=422, code="request_invalid")


def test_an_idempotency_key_that_cannot_be_is_422(served: Served) -> None:
    for key in ("", "x" * 256, "tab\there", "caf\xe9"):
        headers = {"Idempotency-Key": key.encode("latin-1")}
        answer = served.client("acme").post("/v1/runs", files={"scenario": (None, SCENARIO)}, headers=headers)

        problem = check_problem(answer, status=422, code="request_invalid")
        assert problem["errors"][0]["path"] == "header.Idempotency-Key"


def test_documents_that_are_not_valid_say_where(served: Served) -> None:
    missing = check_problem(
        served.client("acme").post("/v1/runs", files={"metadata": (None, "{}")}), status=422, code="scenario_invalid"
    )
    assert "scenario.yaml" in missing["errors"][0]["message"]
    wrong = check_problem(submit(served, scenario="name: x\nsteps: [{name: a}]"), status=422, code="scenario_invalid")
    assert "run" in wrong["errors"][0]["path"]
    check_problem(submit(served, controls="limits: {cpu: 99999}"), status=422, code="controls_invalid")
    check_problem(submit(served, controls="code: trusted"), status=422, code="controls_invalid")
    check_problem(submit(served, metadata='{"a": 1}'), status=422, code="metadata_invalid")
    inside = make_zip({"scenario.yaml": "steps: ["})
    answer = served.client("acme").post("/v1/runs", files={"bundle": inside})
    check_problem(answer, status=422, code="scenario_invalid")


def test_a_bundle_that_is_not_accepted_names_member_and_rule(served: Served) -> None:
    up = check_problem(submit(served, bundle=make_zip({"../up": "x"})), status=422, code="bundle_rejected")
    assert (up["rule"], up["member"]) == ("path", "../up")
    assert "../up" in up["detail"]
    text = check_problem(submit(served, bundle=b"just text"), status=422, code="bundle_rejected")
    assert text["rule"] == "format"


def test_a_bundle_beyond_the_controls_is_not_accepted(served: Served) -> None:
    big = submit(served, bundle=make_tar_gz({"a": bytes(3 * 2**20)}), controls="limits: {disk: 2MiB}")
    assert check_problem(big, status=422, code="bundle_rejected")["rule"] == "disk"
    many = submit(served, bundle=make_zip({f"f{n}": "" for n in range(40)}), controls="limits: {files: 32}")
    assert check_problem(many, status=422, code="bundle_rejected")["rule"] == "files"


def test_what_no_live_worker_can_build_is_refused_with_the_candidates(served: Served) -> None:
    problem = check_problem(submit(served, controls="needs: [privileged]"), status=422, code="placement_refused")
    assert problem["requirements"] == {
        "kernel": "dedicated", "control_plane": "isolated", "abilities": ["privileged"]
    }  # fmt: skip
    missing = {row["boundary"]: row["missing"] for row in problem["candidates"]}
    assert missing["gvisor"] == "kernel >= dedicated"
    assert missing["microvm"] == "no live worker offers microvm"


def test_a_full_disk_a_busy_database_and_a_defect_are_told_apart_and_leak_nothing(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing_with(error: Exception) -> httpx.Response:
        def fail(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(served.app.state.context.deps.runs, "submit", fail)
        return submit(served)

    check_problem(failing_with(StorageFull("there is no room left")), status=507, code="storage_full")
    busy = failing_with(Unavailable("later", retry_after_s=7))
    check_problem(busy, status=503, code="unavailable")
    assert busy.headers["retry-after"] == "7"
    for error in (KeyError("s3cret"), BlastdoorError("s3cret"), BlastdoorError("s3cret", extra={"s3cret": 1})):
        answer = failing_with(error)
        problem = check_problem(answer, status=500, code="internal")
        assert set(problem) == set(MEMBERS)
        assert "s3cret" not in answer.text
        assert problem["request_id"] in served.log.getvalue()


def test_every_answer_has_an_id_and_the_headers_that_browsers_heed(served: Served) -> None:
    for who, path in (("nobody", "/healthz"), ("nobody", "/nowhere"), ("acme", "/v1/runs"), ("nobody", "/docs")):
        headers = served.client(who).get(path).headers
        assert headers["x-request-id"].startswith("req_")
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert "server" not in headers


def test_an_incoming_request_id_is_kept_only_when_it_is_harmless(served: Served) -> None:
    harmless = ("trace-0123456789", "a" * 128)
    for sent in (*harmless, "a" * 129, "short", "has space 123", "x" * 8 + "<script>", "-starts-with-dash", ""):
        answer = served.client("nobody").get("/healthz", headers={"X-Request-ID": sent})

        assert (answer.headers["x-request-id"] == sent) is (sent in harmless), sent


# --- bounds -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path, sqlite_database: str, redis_server: RedisServer) -> Iterator[Served]:
    """Takes 64 KiB in all, for a second and a half, two at a time."""
    bounds = {"upload_max_bytes": 65536, "upload_deadline_s": 1.5, "uploads_at_once": 2}
    yield from serve(make_settings(tmp_path, sqlite_database, redis_server.url, **bounds))


class Raw:
    """A connection on which a test says exactly which bytes come when."""

    def __init__(self, served: Served, *, path: str = "/v1/runs", who: str = "acme", **headers: str) -> None:
        address = urlsplit(served.url)
        self._socket = socket.create_connection((address.hostname, address.port), timeout=10)
        lines = {"Host": "x", "Authorization": f"Bearer {served.keys.get(who, '')}"} | headers
        head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in lines.items())
        self.send(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode())

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def answer(self) -> tuple[int, dict[str, Any], bytes]:
        """-> status, problem, all that came until the server hung up."""
        received = b""
        with self._socket:
            while chunk := self._socket.recv(65536):
                received += chunk
        head, _, body = received.partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(body), received

    def close(self) -> None:
        self._socket.close()


FORM = "multipart/form-data; boundary=b"


def test_a_declared_length_beyond_the_cap_is_refused_before_a_byte_is_read(small: Served) -> None:
    raw = Raw(small, Content_Type=FORM, Content_Length="65537", Expect="100-continue")

    status, problem, received = raw.answer()

    assert (status, problem["code"]) == (413, "too_large")
    assert b"100 Continue" not in received


def test_an_undeclared_length_beyond_the_cap_is_refused_while_it_comes(small: Served) -> None:
    def endless() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="bundle"; filename="x"\r\n\r\n'
        for _ in range(1000):
            yield bytes(16384)

    headers = {"Content-Type": FORM}
    answer = small.client("acme").post("/v1/runs", content=endless(), headers=headers)

    check_problem(answer, status=413, code="too_large")
    assert list((small.app.state.context.deps.blobs._staging).iterdir()) == []


def test_parts_that_each_fit_are_counted_together(small: Served) -> None:
    def two_parts() -> Iterator[bytes]:
        for name in ("scenario", "controls"):
            yield f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode()
            yield b" " * 40_000 + b"\r\n"
        yield b"--b--\r\n"

    answer = small.client("acme").post("/v1/runs", content=two_parts(), headers={"Content-Type": FORM})

    assert check_problem(answer, status=413, code="too_large")["max_bytes"] == 65536


def test_an_upload_that_does_not_end_in_time_is_dropped(small: Served) -> None:
    raw = Raw(small, Content_Type=FORM, Content_Length="1000", Idempotency_Key="k")
    began = time.monotonic()

    status, problem, _ = raw.answer()

    assert (status, problem["code"]) == (408, "upload_timed_out")
    assert 1.4 < time.monotonic() - began < 6
    answer = small.client("acme").post(
        "/v1/runs", files={"scenario": (None, SCENARIO)}, headers={"Idempotency-Key": "k"}
    )
    assert answer.status_code == 202


def test_slow_uploads_of_one_tenant_leave_room_for_another(small: Served) -> None:
    slow = [Raw(small, Content_Type=FORM, Content_Length="1000") for _ in range(6)]
    time.sleep(0.2)

    began = time.monotonic()
    run = small.submit("globex")

    assert run["tenant"] == "globex"
    assert time.monotonic() - began < 1.0
    for raw in slow:
        raw.close()


def test_more_uploads_than_fit_are_told_to_come_again(
    tmp_path: Path, sqlite_database: str, redis_server: RedisServer
) -> None:
    bounds = {"uploads_at_once": 1}
    for small in serve(make_settings(tmp_path, sqlite_database, redis_server.url, **bounds)):
        slow = Raw(small, Content_Type=FORM, Content_Length="1000")
        time.sleep(0.2)

        answer = submit(small)

        check_problem(answer, status=503, code="unavailable")
        assert int(answer.headers["retry-after"]) >= 1
        slow.close()
        small.submit()


def test_a_json_body_is_bounded_in_bytes_also_without_a_key(served: Served) -> None:
    nobody = served.client("nobody")
    declared = nobody.post("/v1/admin/tenants", content=b" " * 70_000)
    check_problem(declared, status=413, code="too_large")

    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield bytes(4096)

    check_problem(nobody.post("/v1/admin/tenants", content=chunks()), status=413, code="too_large")


def test_a_submission_without_a_key_is_refused_before_its_body_is_read(served: Served) -> None:
    raw = Raw(served, who="nobody", Content_Type=FORM, Content_Length="50000", Expect="100-continue")

    status, problem, received = raw.answer()

    assert (status, problem["code"]) == (401, "unauthenticated")
    assert b"100 Continue" not in received


# --- without Redis, without workers -----------------------------------------------------------------------------------


def test_a_run_is_accepted_while_redis_is_away(tmp_path: Path, sqlite_database: str) -> None:
    for alone in serve(make_settings(tmp_path, sqlite_database, "redis://127.0.0.1:1/0")):
        run = alone.submit()

        assert alone.claim().run.id == run["id"]
        readiness = check_problem(alone.client("nobody").get("/readyz"), status=503, code="unavailable")
        assert readiness["checks"] == {"database": "ok", "redis": "failing", "worker": "ok", "canary": "failing"}
        assert alone.client("nobody").get("/healthz").status_code == 200


def test_ready_means_database_redis_a_worker_and_a_canary_that_passed(served: Served) -> None:
    nobody = served.client("nobody")
    problem = check_problem(nobody.get("/readyz"), status=503, code="unavailable")
    assert problem["checks"] == {"database": "ok", "redis": "ok", "worker": "ok", "canary": "failing"}
    served.pass_canary()
    time.sleep(1.1)  # the last answer is kept for a second
    assert nobody.get("/readyz").json()["status"] == "ready"
    served.store.forget_worker("wrk_1")
    time.sleep(1.1)  # the last answer is kept for a second
    problem = check_problem(nobody.get("/readyz"), status=503, code="unavailable")
    assert problem["checks"]["worker"] == "failing"
    served.show_worker(make_capabilities())
    refused = submit(served)
    assert refused.status_code == 202
