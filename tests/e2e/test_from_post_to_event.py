"""From an upload over HTTP, through a real sandbox, to the answer of `wait` and the events a consumer group reads."""

import hashlib
import io
import json
import os
import re
import signal
import tarfile
import time
import uuid
import zipfile
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest
from cloudevents.http import from_json

from service.core.ids import new_run_id
from tests.e2e.consumer import Consumer, Event
from tests.stack import Document, Stack, finished, played, post, read, started, submit
from tests.sweep import pids_in_cgroups

RUN, BOUNDARY = "dev.blastdoor.run.", "dev.blastdoor.boundary."
WHOLE_WAY = [
    f"{RUN}queued", f"{RUN}provisioning", f"{RUN}running", f"{RUN}collecting", f"{RUN}finished", f"{BOUNDARY}destroyed",
]  # fmt: skip
EVIDENCE = {
    "runtime", "runtime_version", "runtime_sha256", "platform", "network", "limits", "uid", "observed_at",
}  # fmt: skip
METADATA = {"order": "17", "who": "Zoë <z@example.org>"}
pytestmark = pytest.mark.timeout(180)

SCENARIO = """
name: discount rules
env: {MODE: test}
steps:
  - name: vip gets ten percent
    run: [python3, -S, rules.py]
    stdin: '{"customer": "vip", "total": 200}'
    expect: {stdout: {json: {total: 180}}, files: {out/report.json: {json: {mode: test}}}}
  - name: warns
    run: "echo a warning >&2; cat data/words.txt"
    expect: {stdout: {equals: "alpha\\nbeta\\n"}, stderr: {contains: warning}}
artifacts: ["out/**"]
"""
RULES = """
import json, os, sys
order = json.load(sys.stdin)
os.mkdir("out")
json.dump({"mode": os.environ["MODE"], "customer": order["customer"]}, open("out/report.json", "w"))
print(json.dumps({"total": order["total"] * 9 // 10}))
"""
FILES = {"scenario.yaml": SCENARIO, "rules.py": RULES, "data/words.txt": "alpha\nbeta\n"}


def zipped(files: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return buffer.getvalue()


def tarred(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for info, content in members:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def regular(name: str, text: str) -> tuple[tarfile.TarInfo, bytes]:
    return tarfile.TarInfo(name), text.encode()


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def tar_gz(files: dict[str, str]) -> bytes:
    return tarred(*(regular(name, text) for name, text in files.items()))


def at(text: str) -> datetime:
    moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    assert moment.utcoffset() is not None
    return moment


def nulls(value: Any, path: str = "") -> list[str]:
    """Dotted paths of what is null in a document."""
    if isinstance(value, dict):
        return [found for key, inner in value.items() for found in nulls(inner, f"{path}.{key}")]
    return [path] if value is None else []


# --- the whole way ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[zipped, tar_gz], ids=["zip", "tar.gz"])
def way(
    request: pytest.FixtureRequest, running_stack: Stack, _consumer: Consumer
) -> tuple[Document, list[Event], Stack]:
    """One run of each kind of bundle: the run when its wall is gone, and all its events."""
    answer = post(running_stack.tenant, bundle=request.param(FILES), metadata=METADATA, limits={"memory": "96MiB"})
    assert answer.status_code == 202, answer.text
    queued = answer.json()
    assert answer.headers["Location"] == f"/v1/runs/{queued['id']}"
    assert (queued["phase"], queued["outcome"], queued["evidence"]) == ("queued", None, None)
    finished(running_stack.tenant, queued["id"])
    events = _consumer.events(queued["id"], until="boundary.destroyed")
    return read(running_stack.tenant, queued["id"]), events, running_stack


@pytest.fixture
def run(stack: Stack, way: tuple[Document, list[Event], Stack]) -> Document:
    return way[0]


@pytest.fixture
def events(stack: Stack, way: tuple[Document, list[Event], Stack]) -> list[Event]:
    return way[1]


class TestTheWholeWay:
    def test_the_result_has_what_the_steps_printed_and_what_they_left(self, run: Document) -> None:
        assert (run["outcome"], run["reason"], run["message"]) == ("passed", None, None)
        first, second = run["steps"]
        assert json.loads(first["stdout"]["text"]) == {"total": 180}
        assert (second["stdout"]["text"], second["stderr"]["text"]) == ("alpha\nbeta\n", "a warning\n")
        assert second["stderr"] == {"text": "a warning\n", "bytes": 10, "truncated": False}
        assert [(s["exit_code"], s["signal"], s["failures"]) for s in run["steps"]] == [(0, None, [])] * 2
        assert [artifact["path"] for artifact in run["artifacts"]] == ["out/report.json"]
        assert run["bundle"]["files"] == len(FILES)
        assert run["metadata"] == METADATA
        assert run["usage"]["wall_s"] >= sum(step["duration_s"] for step in run["steps"]) > 0
        assert 0 < run["usage"]["peak_memory_bytes"] <= 96 * 2**20

    def test_every_field_of_the_evidence_is_known_and_is_what_was_asked_for(self, run: Document) -> None:
        evidence = run["evidence"]
        assert nulls(evidence) == []
        assert set(evidence) >= EVIDENCE
        assert (evidence["runtime"], evidence["network"], evidence["uid"]) == ("runsc", "none", 65532)
        assert evidence["limits"]["memory_bytes"] == 96 * 2**20
        assert re.fullmatch("[0-9a-f]{64}", evidence["runtime_sha256"])
        assert run["placement"]["guarantees"]["kernel"] == "sandboxed"

    def test_times_are_in_order_and_the_walls_end_is_among_them(self, run: Document) -> None:
        names = ("created_at", "started_at", "finished_at", "boundary_destroyed_at")
        moments = [at(run[name]) for name in names]
        assert moments == sorted(moments)
        assert at(run["started_at"]) <= at(run["evidence"]["observed_at"]) <= at(run["finished_at"])
        assert at(run["boundary_destroyed_at"]) - at(run["finished_at"]) < timedelta(seconds=5)

    def test_nothing_of_it_is_left_on_the_host(self, run: Document, stack: Stack) -> None:
        assert stack.left_of(run["id"]) == []

    def test_its_events_came_in_order_each_once_up_to_the_walls_end(self, events: list[Event]) -> None:
        assert [event["type"] for event in events] == WHOLE_WAY
        assert [int(event["sequence"]) for event in events] == list(range(1, len(WHOLE_WAY) + 1))
        assert [event["sequence"] for event in events] == sorted(event["sequence"] for event in events)
        assert len({event["id"] for event in events}) == len(events)
        moments = [at(event["time"]) for event in events]
        assert moments == sorted(moments)

    def test_each_event_is_a_valid_cloud_event(self, run: Document, events: list[Event]) -> None:
        for event in events:
            parsed = from_json(json.dumps(event))
            assert parsed["specversion"] == "1.0"
            assert (parsed["subject"], parsed["datacontenttype"]) == (run["id"], "application/json")
            assert parsed["source"]
            assert parsed["tenant"] == run["tenant"]
            assert isinstance(parsed.get_data(), dict)
            assert all(re.fullmatch("[a-z0-9]{1,20}", name) for name in parsed.get_attributes())
            if "traceparent" in parsed.get_attributes():
                assert re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}", parsed["traceparent"])

    def test_each_event_says_which_run_and_has_the_metadata_and_the_walls_its_fence(
        self, run: Document, events: list[Event]
    ) -> None:
        for event in events[:-2]:
            phase = event["type"].rpartition(".")[2]
            assert (event["data"]["id"], event["data"]["phase"]) == (run["id"], phase)
            assert event["data"]["metadata"] == METADATA
        assert events[-1]["data"]["fence"] == 1

    def test_the_finished_event_is_the_run_without_its_output(self, run: Document, events: list[Event]) -> None:
        event = next(event for event in events if event["type"] == f"{RUN}finished")
        data = event["data"]
        for name in ("id", "tenant", "phase", "outcome", "reason", "usage", "evidence", "metadata", "artifacts"):
            assert data[name] == run[name], name
        assert data["omitted"] == {"steps": 0, "artifacts": 0, "failures": 0}
        assert [step["name"] for step in data["steps"]] == [step["name"] for step in run["steps"]]
        assert "beta" not in json.dumps(data)
        assert all("text" not in step[stream] for step in data["steps"] for stream in ("stdout", "stderr"))
        assert len(json.dumps(data).encode()) < 20_000


def test_a_run_of_many_failing_steps_still_fits_into_its_event(stack: Stack, consumer: Consumer) -> None:
    loud = {"run": f"printf %02000d 1; printf '{'x' * 900}' >&2; exit 1", "continue_on_failure": True}
    expect = {"expect": {"stdout": {"equals": "y" * 900}, "stderr": {"equals": "z"}}}
    run = played(stack.tenant, *([loud | expect] * 12), metadata=METADATA)
    event = next(e for e in consumer.events(run["id"], until="run.finished") if e["type"] == f"{RUN}finished")
    data = event["data"]
    assert len(run["steps"]) == 12
    assert len(json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode()) < 20_000
    assert (data["outcome"], data["evidence"], data["usage"]) == (run["outcome"], run["evidence"], run["usage"])
    assert data["metadata"] == METADATA
    failures = sum(len(step["failures"]) for step in run["steps"])
    shown = sum(len(step["failures"]) for step in data["steps"])
    assert data["omitted"]["failures"] == failures - shown > 0
    assert [len(s["failures"]) for s in run["steps"]] == [3] * 12


def test_every_acknowledged_event_stays_acknowledged(stack: Stack, consumer: Consumer) -> None:
    consumer.events(played(stack.tenant, "true")["id"], until="boundary.destroyed")
    assert consumer.pending() == 0


# --- five ends that look alike ----------------------------------------------------------------------------------------


class TestFiveEnds:
    def test_what_a_guest_does_is_its_own_failure(self, stack: Stack) -> None:
        runs = {
            "exit 128": played(stack.tenant, "exit 128"),
            "exit 139": played(stack.tenant, "exit 139"),
            "SIGSEGV": played(stack.tenant, "kill -SEGV $$"),
            "no such program": played(stack.tenant, ["/no/such/program"]),
        }
        seen = {
            name: (run["outcome"], run["reason"], run["steps"][0]["exit_code"], run["steps"][0]["signal"])
            for name, run in runs.items()
        }
        assert seen == {
            "exit 128": ("failed", "exit_code", 128, None),
            "exit 139": ("failed", "exit_code", 139, None),
            "SIGSEGV": ("failed", "exit_code", None, signal.SIGSEGV),
            "no such program": ("failed", "exit_code", None, None),
        }
        assert "SIGSEGV" in runs["SIGSEGV"]["message"]
        assert "/no/such/program" in runs["no such program"]["message"]

    def test_only_a_sandbox_that_was_killed_is_lost_and_is_ours(self, stack: Stack, consumer: Consumer) -> None:
        run_id = submit(stack.tenant, "echo before; sleep 0.5; touch plays; sleep 60", "echo never")
        stack.wait_for_file(run_id, "plays")
        sentry = stack.sentry(run_id)
        assert stack.mark(run_id) in _cgroup(sentry)
        os.kill(sentry, signal.SIGKILL)
        run = finished(stack.tenant, run_id)
        assert (run["outcome"], run["reason"], run["attempt"]) == ("errored", "boundary_lost", 1)
        assert [step["outcome"] for step in run["steps"]] == ["skipped", "skipped"]
        assert nulls(run["evidence"]) == []
        types = [event["type"] for event in consumer.events(run_id, until="boundary.destroyed")]
        assert types == WHOLE_WAY
        assert stack.left_of(run_id) == []

    def test_a_failed_expectation_says_what_was_expected_and_what_was_there(self, stack: Stack) -> None:
        step = {"run": "echo '{\"total\": 200}'", "expect": {"stdout": {"json": {"total": 180}}}}
        run = played(stack.tenant, "true", step, "echo after", {"run": "echo tidy", "always": True})
        assert (run["outcome"], run["reason"]) == ("failed", "expectation")
        assert run["message"] == "step 2: stdout.json.total: expected 180, got 200"
        assert [s["outcome"] for s in run["steps"]] == ["passed", "failed", "skipped", "passed"]


def _cgroup(pid: int) -> str:
    with open(f"/proc/{pid}/cgroup") as listing:
        return listing.read()


# --- cancelling -------------------------------------------------------------------------------------------------------


class TestCancelling:
    def test_a_running_run_is_cancelled_within_two_seconds(self, stack: Stack, consumer: Consumer) -> None:
        run_id = submit(stack.tenant, "trap '' TERM INT; while :; do sleep 1; done", "echo never")
        started(stack.tenant, run_id)
        assert stack.group(run_id).pids()
        asked_at = time.time()
        assert stack.tenant.post(f"/v1/runs/{run_id}/cancel").status_code == 202
        run = finished(stack.tenant, run_id)
        assert (run["outcome"], run["reason"]) == ("cancelled", "cancelled_by_tenant")
        assert [step["outcome"] for step in run["steps"]] == ["skipped", "skipped"]
        events = consumer.events(run_id, until="boundary.destroyed")
        collecting = next(event for event in events if event["type"] == f"{RUN}collecting")
        assert at(collecting["time"]).timestamp() - asked_at <= 2.0, "the worker took longer to see it"
        assert [event["type"] for event in events] == WHOLE_WAY
        assert stack.left_of(run_id) == []

    def test_a_queued_run_is_cancelled_and_never_gets_a_wall(self, stack: Stack, consumer: Consumer) -> None:
        one_at_a_time = stack.new_tenant("one-at-a-time", concurrent=1)
        first = submit(one_at_a_time, "sleep 60")
        started(one_at_a_time, first)
        second = submit(one_at_a_time, "touch /work/ran")
        assert (read(one_at_a_time, second)["phase"], read(one_at_a_time, second)["queue_position"]) == ("queued", 1)
        assert one_at_a_time.post(f"/v1/runs/{second}/cancel").status_code == 202
        run = finished(one_at_a_time, second)
        assert (run["outcome"], run["reason"]) == ("cancelled", "cancelled_by_tenant")
        assert (run["started_at"], run["evidence"], run["usage"], run["attempt"]) == (None, None, None, 0)
        assert read(one_at_a_time, first)["phase"] == "running", "control: the other goes on"
        one_at_a_time.post(f"/v1/runs/{first}/cancel")
        finished(one_at_a_time, first)
        events = [event["type"] for event in consumer.events(second, until="run.finished")]
        assert events == [f"{RUN}queued", f"{RUN}finished"]
        assert pids_in_cgroups(stack.mark(second)) == set()

    def test_a_finished_run_is_left_as_it_is(self, stack: Stack) -> None:
        run = played(stack.tenant, "true")
        answer = stack.tenant.post(f"/v1/runs/{run['id']}/cancel")
        assert (answer.status_code, answer.json()["outcome"]) == (202, "passed")


# --- who may see it ---------------------------------------------------------------------------------------------------


class TestAnotherTenant:
    """D40 as far as there are routes; tests/integration/api has it for each route and kind of key."""

    def test_another_tenants_run_is_as_if_it_never_was(self, stack: Stack) -> None:
        run_id, never = submit(stack.tenant, "sleep 60"), new_run_id()
        started(stack.tenant, run_id)
        for method, suffix in (("GET", ""), ("GET", "?wait=1"), ("POST", "/cancel"), ("DELETE", "")):
            theirs, none = (stack.stranger.request(method, f"/v1/runs/{one}{suffix}") for one in (run_id, never))
            assert (theirs.status_code, none.status_code) == (404, 404)
            assert _without(theirs, run_id) == _without(none, never)
        assert stack.stranger.get("/v1/runs").json()["items"] == []
        assert read(stack.tenant, run_id)["phase"] == "running", "control: for its owner it is there, and goes on"
        stack.tenant.post(f"/v1/runs/{run_id}/cancel")
        finished(stack.tenant, run_id)

    def test_a_service_sees_the_events_of_its_tenants_by_name(self, stack: Stack, consumer: Consumer) -> None:
        name = f"of-service-{uuid.uuid4().hex[:8]}"
        assert stack.service.post("/v1/tenants", json={"name": name}).status_code == 201
        with _Acting(stack.service, name) as acting:
            answer = post(acting, "true")
        assert answer.status_code == 202, answer.text
        events = consumer.events(answer.json()["id"], until="boundary.destroyed")
        assert {event["tenant"] for event in events} == {name}


class _Acting(httpx.Client):
    """A service's client that acts for one of its tenants."""

    def __init__(self, service: httpx.Client, tenant: str) -> None:
        headers = {"Authorization": service.headers["Authorization"], "Blastdoor-Tenant": tenant}
        super().__init__(base_url=service.base_url, headers=headers, trust_env=False, timeout=90.0)


def _without(answer: httpx.Response, run_id: str) -> str:
    document = {key: value for key, value in answer.json().items() if key != "request_id"}
    return json.dumps(document, sort_keys=True).replace(run_id, "RUN")


# --- what is refused --------------------------------------------------------------------------------------------------


class TestRefusals:
    @pytest.mark.parametrize(
        ("controls", "requirement"),
        [
            ({"isolation": "dedicated-cluster"}, "dedicated"),
            ({"needs": ["privileged"]}, "the code needs privileges"),
            ({"network": {"mode": "allow", "allow": ["api.example.com:443"]}}, "egress-allow-list"),
        ],
        ids=["dedicated-cluster", "privileged", "network"],
    )
    def test_what_no_live_worker_can_build_is_refused_with_what_is_missing(
        self, stack: Stack, controls: Document, requirement: str
    ) -> None:
        fresh = stack.new_tenant(f"refused-{uuid.uuid4().hex[:8]}")
        answer = post(fresh, "true", controls=controls)
        assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
        problem = answer.json()
        assert problem["code"] == "placement_refused"
        assert requirement in json.dumps(problem["requirements"]) + json.dumps(problem["why"])
        candidates = {row["boundary"]: row["missing"] for row in problem["candidates"]}
        assert "gvisor" in candidates
        assert all(candidates.values())
        assert fresh.get("/v1/runs").json() == {"items": [], "next_cursor": None}

    @pytest.mark.parametrize(
        "members",
        [
            [link("d", "/etc"), regular("d/passwd", "x")],
            [link("inside", "scenario.yaml")],
            [link("hard", "scenario.yaml", tarfile.LNKTYPE)],
            [regular("../x-of-e2e", "x")],
            [regular("a/../../x-of-e2e", "x")],
            [regular("/tmp/x-of-e2e", "x")],
            [link("pipe", "", tarfile.FIFOTYPE)],
        ],
        ids=["symlink and through it", "symlink inside", "hard link", "..", "a/../..", "absolute", "fifo"],
    )
    def test_a_bad_bundle_is_refused_and_leaves_nothing_behind(
        self, stack: Stack, members: list[tuple[tarfile.TarInfo, bytes]]
    ) -> None:
        fresh = stack.new_tenant(name := f"bad-{uuid.uuid4().hex[:8]}")
        blobs = stack.state / "blobs" / hashlib.sha256(name.encode()).hexdigest()
        answer = post(fresh, bundle=tarred(regular("scenario.yaml", SCENARIO), *members))
        assert (answer.status_code, answer.json()["code"]) == (422, "bundle_rejected"), answer.text
        assert any(info.name.strip("/") in answer.json()["detail"] for info, _ in members), answer.json()
        assert fresh.get("/v1/runs").json() == {"items": [], "next_cursor": None}
        assert not list((stack.state / "staging").iterdir())
        assert not blobs.exists()
        assert not [place for place in (stack.state, stack.state.parent) if (place / "x-of-e2e").exists()]
        assert not os.path.lexists("/tmp/x-of-e2e")
        accepted = post(fresh, bundle=tar_gz(FILES))
        assert accepted.status_code == 202, "control: without it the bundle is accepted"
        assert finished(fresh, accepted.json()["id"])["outcome"] == "passed"
        assert blobs.is_dir(), "control: and is stored there"
