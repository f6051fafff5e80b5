"""Runs over HTTP, on both databases: submit, read, wait, list, cancel, delete, and the same request sent again."""

import io
import json
import tarfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.integration.api.conftest import DATABASES, SCENARIO, Served

pytestmark = pytest.mark.parametrize("settings", DATABASES, indirect=True)


def make_zip(members: dict[str, str]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return out.getvalue()


def make_tar_gz(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", format=tarfile.GNU_FORMAT) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def test_a_bundle_with_scenario_and_controls_becomes_a_queued_run(served: Served) -> None:
    controls = "limits: {memory: 64MiB, wall: 5s}"
    bundle = make_tar_gz({"scenario.yaml": SCENARIO.encode(), "controls.yaml": controls.encode(), "main.py": b"1"})
    metadata = json.dumps({"order": "17"})

    answer = served.client("acme").post("/v1/runs", files={"bundle": ("code", bundle), "metadata": (None, metadata)})

    run = answer.json()
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"/v1/runs/{run['id']}"
    assert (run["phase"], run["outcome"], run["queue_position"], run["tenant"]) == ("queued", None, 1, "acme")
    assert run["metadata"] == {"order": "17"}
    assert run["scenario"]["name"] == "hello"
    assert run["bundle"]["bytes"] == len(bundle)
    assert run["bundle"]["files"] == 3
    assert run["controls"]["limits"]["memory"] == 64 * 2**20
    assert run["controls"]["limits"]["wall"] == "5s"
    assert run["controls"]["code"] == "untrusted"
    assert run["placement"]["boundary"] == "gvisor"
    assert run["created_at"].endswith("Z")
    assert served.client("acme").get(answer.headers["location"]).json() == run
    claim = served.claim()
    assert claim.bundle is not None
    stored = served.app.state.context.deps.blobs.path("acme", claim.bundle.digest)
    assert stored.read_bytes() == bundle


def test_parts_go_before_what_the_bundle_has(served: Served) -> None:
    bundle = make_zip({"scenario.yaml": "name: inner\nsteps: [{name: a, run: a}]", "controls.yaml": "not: good"})

    run = served.submit(scenario="name: outer\nsteps: [{name: b, run: b}]")
    both = served.client("acme").post(
        "/v1/runs",
        files={"bundle": bundle, "scenario": (None, SCENARIO), "controls": (None, '{"limits": {"pids": 16}}')},
    )

    assert run["scenario"]["name"] == "outer"
    assert run["bundle"] is None
    assert both.status_code == 202, both.text
    assert both.json()["scenario"]["name"] == "hello"
    assert both.json()["controls"]["limits"]["pids"] == 16


def test_waiting_is_answered_when_the_run_is_finished(served: Served) -> None:
    run_id = served.submit()["id"]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(served.client("acme").get, f"/v1/runs/{run_id}?wait=20")
        _until_waited_for(served)
        began = time.monotonic()
        served.play()
        run = waiting.result().json()

    assert time.monotonic() - began < 5
    assert (run["phase"], run["outcome"]) == ("finished", "passed")
    assert run["steps"][0]["outcome"] == "passed"


def test_waiting_needs_no_hint(served: Served) -> None:
    run_id = served.submit()["id"]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(served.client("acme").get, f"/v1/runs/{run_id}?wait=20")
        _until_waited_for(served)
        served.play(hint=False)

        assert waiting.result().json()["phase"] == "finished"


def test_waiting_ends_with_the_seconds(served: Served) -> None:
    run_id = served.submit()["id"]
    began = time.monotonic()

    run = served.client("acme").get(f"/v1/runs/{run_id}?wait=0.3").json()

    assert run["phase"] == "queued"
    assert 0.3 <= time.monotonic() - began < 5


def test_a_waiter_who_hangs_up_is_forgotten(served: Served) -> None:
    run_id = served.submit()["id"]
    notifier = served.app.state.context.notifier
    headers = {"Authorization": f"Bearer {served.keys['acme']}"}
    with pytest.raises(httpx.ReadTimeout):
        httpx.get(f"{served.url}/v1/runs/{run_id}?wait=60", headers=headers, timeout=0.5)

    deadline = time.monotonic() + 5
    while notifier.waiters and time.monotonic() < deadline:
        time.sleep(0.01)

    assert notifier.waiters == 0


def _until_waited_for(served: Served) -> None:
    deadline = time.monotonic() + 5
    while not served.app.state.context.notifier.waiters:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_list_is_paged_newest_first_without_gap_or_repeat(served: Served) -> None:
    submitted = [served.submit()["id"] for _ in range(7)]
    served.submit("globex")
    acme = served.client("acme")
    seen: list[str] = []
    cursor = None
    while True:
        page = acme.get("/v1/runs", params={"limit": 3} | ({"cursor": cursor} if cursor else {})).json()
        seen += [run["id"] for run in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
        seen_so_far = list(seen)
        served.submit()  # what is new meanwhile does not move the pages
        assert seen == seen_so_far

    assert seen == submitted[::-1]


def test_the_list_is_filtered_by_phase_and_outcome(served: Served) -> None:
    finished = served.submit()["id"]
    assert served.play() == finished
    queued = served.submit()["id"]
    acme = served.client("acme")

    def ids(**asked: str) -> list[str]:
        return [run["id"] for run in acme.get("/v1/runs", params=asked).json()["items"]]

    assert ids(phase="finished") == ids(outcome="passed") == [finished]
    assert ids(phase="queued") == [queued]
    assert ids(outcome="failed") == []


def test_a_cursor_that_is_not_ours_is_422(served: Served) -> None:
    for cursor in ("", "x", "AAAA", "MTpydW5f", "é", "../..", "a" * 300):
        answer = served.client("acme").get("/v1/runs", params={"cursor": cursor})

        assert (answer.status_code, answer.json()["code"]) == (422, "request_invalid"), cursor
        assert answer.json()["errors"][0]["path"] == "query.cursor"


def test_cancelling_ends_a_queued_run_marks_a_claimed_one_and_leaves_a_finished_one(served: Served) -> None:
    acme = served.client("acme")
    queued = served.submit()["id"]
    cancelled = acme.post(f"/v1/runs/{queued}/cancel")
    assert cancelled.status_code == 202
    assert (cancelled.json()["outcome"], cancelled.json()["reason"]) == ("cancelled", "cancelled_by_tenant")

    claimed = served.submit()["id"]
    claim = served.claim()
    assert acme.post(f"/v1/runs/{claimed}/cancel").json()["phase"] == "provisioning"
    assert served.store.look(claimed, claim.fence).cancel_requested_by == "tenant"

    again = acme.post(f"/v1/runs/{queued}/cancel")
    assert (again.status_code, again.json()["finished_at"]) == (202, cancelled.json()["finished_at"])


def test_a_finished_run_is_deleted_with_its_bundle_and_no_other_can_be(served: Served) -> None:
    acme, blobs = served.client("acme"), served.app.state.context.deps.blobs
    files = {"bundle": make_zip({"scenario.yaml": SCENARIO})}
    run = acme.post("/v1/runs", files=files).json()
    busy = acme.delete(f"/v1/runs/{run['id']}")
    assert (busy.status_code, busy.json()["code"]) == (409, "not_finished")

    served.play()

    assert blobs.path("acme", run["bundle"]["digest"]).exists()
    assert acme.delete(f"/v1/runs/{run['id']}").status_code == 204
    assert acme.get(f"/v1/runs/{run['id']}").status_code == 404
    assert acme.delete(f"/v1/runs/{run['id']}").status_code == 404
    with pytest.raises(Exception, match="no such thing"):
        blobs.path("acme", run["bundle"]["digest"])


def test_the_same_key_and_content_twenty_times_at_once_is_one_run(served: Served) -> None:
    """D41."""
    bundle = make_zip({"scenario.yaml": SCENARIO})
    together = threading.Barrier(20)

    def post(_: int) -> httpx.Response:
        with httpx.Client(base_url=served.url, timeout=30, trust_env=False) as client:
            headers = {"Authorization": f"Bearer {served.keys['acme']}", "Idempotency-Key": "order-17"}
            together.wait()
            return client.post("/v1/runs", files={"bundle": bundle}, headers=headers)

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(post, range(20)))

    accepted = [answer for answer in answers if answer.status_code == 202]
    refused = [answer for answer in answers if answer.status_code != 202]
    first = [answer for answer in accepted if "idempotent-replayed" not in answer.headers]
    assert len(first) == 1
    assert {answer.json()["code"] for answer in refused} <= {"idempotency_in_flight"}
    assert {answer.status_code for answer in refused} <= {409}
    assert {answer.content for answer in accepted} == {first[0].content}
    assert len(served.client("acme").get("/v1/runs").json()["items"]) == 1


def test_an_idempotency_key_replays_the_first_answer_and_refuses_other_content(served: Served) -> None:
    acme = served.client("acme")

    def post(files: dict[str, Any], key: str = "k") -> httpx.Response:
        return acme.post("/v1/runs", files=files, headers={"Idempotency-Key": key})

    first = post({"scenario": (None, SCENARIO)})
    served.play()
    again = post({"scenario": (None, SCENARIO)})
    assert again.status_code == 202
    assert again.content == first.content
    assert again.headers["location"] == first.headers["location"]
    assert again.headers["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in first.headers
    other = {
        "scenario": {"scenario": (None, SCENARIO + " ")},
        "a part more": {"scenario": (None, SCENARIO), "controls": (None, "{}")},
        "moved from one part to another": {"scenario": (None, ""), "controls": (None, SCENARIO)},
        "a bundle more": {"scenario": (None, SCENARIO), "bundle": make_zip({"a": "b"})},
    }
    for files in other.values():
        answer = post(files)
        assert (answer.status_code, answer.json()["code"]) == (422, "idempotency_mismatch")
    assert post({"scenario": (None, SCENARIO)}, key="another").json()["id"] != first.json()["id"]
    globex = served.client("globex").post(
        "/v1/runs", files={"scenario": (None, SCENARIO)}, headers={"Idempotency-Key": "k"}
    )
    assert globex.json()["tenant"] == "globex"


def test_a_refused_request_gives_its_idempotency_key_back(served: Served) -> None:
    acme, headers = served.client("acme"), {"Idempotency-Key": "k"}
    refused = acme.post("/v1/runs", files={"scenario": (None, "name: [")}, headers=headers)
    assert refused.json()["code"] == "scenario_invalid"

    assert acme.post("/v1/runs", files={"scenario": (None, SCENARIO)}, headers=headers).status_code == 202


def test_a_client_who_hangs_up_gives_its_idempotency_key_back(served: Served) -> None:
    acme, headers = served.client("acme"), {"Idempotency-Key": "k"}

    def breaks_off() -> Any:
        yield b'--b\r\nContent-Disposition: form-data; name="scenario"\r\n\r\nname'
        raise ConnectionAbortedError

    kind = {"Content-Type": "multipart/form-data; boundary=b", "Authorization": acme.headers["authorization"]}
    with pytest.raises(ConnectionAbortedError), httpx.Client() as leaving:
        leaving.post(f"{served.url}/v1/runs", content=breaks_off(), headers=headers | kind)

    deadline = time.monotonic() + 5
    while (answer := acme.post("/v1/runs", files={"scenario": (None, SCENARIO)}, headers=headers)).status_code == 409:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert answer.status_code == 202


def test_the_queue_of_a_tenant_is_bounded(served: Served) -> None:
    served.client("operator").patch("/v1/admin/tenants/acme", json={"quota": {"queued": 2}})
    served.submit()
    served.submit()

    answer = served.client("acme").post("/v1/runs", files={"scenario": (None, SCENARIO)})

    assert (answer.status_code, answer.json()["code"]) == (429, "quota_exceeded")
    served.submit("globex")
