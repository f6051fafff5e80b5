"""What leaves: valid CloudEvents, whatever the run holds; the last event under 20 kB, cut and counted."""

import json
import time
from typing import Any

import pytest
from cloudevents.conversion import from_json
from cloudevents.http import CloudEvent
from hypothesis import given, settings
from hypothesis import strategies as st

from service.core.boundary import Artifact, SkippedArtifact, Usage
from service.core.events import MAX_DATA_BYTES, EventType, cloud_event, finished_data, json_size, phase_data
from service.core.run import Failure, Outcome, Phase, Reason, Run, StepOutcome, StreamText
from tests.factories import NOON, make_placement, make_run, make_step_result

NEVER_CUT = ("phase", "outcome", "reason", "usage", "evidence", "metadata")


def make_finished(*, steps: int = 1, failures: int = 0, artifacts: int = 0, text: str = "a", **more: Any) -> Run:
    """`text` stands wherever a customer or a guest may write."""
    failed = tuple(Failure(expectation=f"stdout.json.{text}", expected=text, actual=text) for _ in range(failures))
    words: dict[str, Any] = {
        "phase": Phase.FINISHED,
        "outcome": Outcome.FAILED,
        "reason": Reason.EXPECTATION,
        "message": text,
        "usage": Usage(wall_s=1.0, cpu_s=0.5, peak_memory_bytes=2**28),
        "evidence": {"runtime": "runsc", "limits": {"memory_bytes": 2**28}, "observed_at": "2026-01-01T12:00:00Z"},
        "steps": tuple(
            make_step_result(n=n + 1, name=text[:200] or "a", outcome=StepOutcome.FAILED, failures=failed, text=text)
            for n in range(steps)
        ),
        "artifacts": tuple(Artifact(path=f"{text[:1000]}{n}", bytes=n, sha256="a" * 64) for n in range(artifacts)),
        "skipped_artifacts": tuple(SkippedArtifact(path=f"{text[:1000]}{n}", why="symlink") for n in range(artifacts)),
    }
    return make_run(**words | more)


def make_event(*, data: dict[str, Any], **more: Any) -> dict[str, Any]:
    words: dict[str, Any] = {
        "event_id": "evt_1", "installation": "0123456789ab", "type_": EventType.FINISHED, "run_id": "run_1",
        "tenant": "acme", "sequence": 7, "at": NOON, "data": data,
    }  # fmt: skip
    return cloud_event(**words | more)


def test_an_event_is_a_cloudevent_to_the_reference_library() -> None:
    run = make_finished()
    written = json.dumps(make_event(data=finished_data(run), traceparent="00-" + "0" * 32 + "-" + "0" * 16 + "-01"))
    event = from_json(CloudEvent, written)

    assert event["specversion"] == "1.0"
    assert (event["type"], event["source"]) == ("dev.blastdoor.run.finished", "urn:blastdoor:0123456789ab")
    assert (event["subject"], event["tenant"], event["sequence"]) == ("run_1", "acme", "0000000007")
    assert (event["time"], event["datacontenttype"]) == ("2026-01-01T12:00:00Z", "application/json")
    assert event["traceparent"].startswith("00-")
    assert event.data["id"] == run.id


def test_an_event_without_a_trace_has_no_empty_one() -> None:
    assert "traceparent" not in make_event(data={})


def test_sequences_sort_as_text_in_their_order() -> None:
    spelled = [make_event(data={}, sequence=n)["sequence"] for n in (1, 2, 9, 10, 99, 100)]

    assert spelled == sorted(spelled)


def test_a_phase_is_told_with_what_its_owner_needs_and_no_more() -> None:
    run = make_run(metadata={"ticket": "7"})

    assert phase_data(run, fence=3) == {
        "id": run.id, "tenant": "acme", "phase": "queued", "outcome": None, "reason": None, "attempt": 0,
        "metadata": {"ticket": "7"}, "created_at": "2026-01-01T12:00:00Z", "fence": 3, "boundary": "gvisor",
    }  # fmt: skip


def test_the_end_of_a_small_run_is_told_whole_but_for_its_output() -> None:
    run = make_finished(steps=2, failures=2, artifacts=2, text="output of the guest")
    data = finished_data(run)
    whole = run.model_dump(mode="json")
    for step in whole["steps"]:
        del step["stdout"]["text"], step["stderr"]["text"]

    assert data == whole | {"omitted": {"steps": 0, "artifacts": 0, "failures": 0}}


@pytest.mark.parametrize(
    ("steps", "failures", "artifacts"), [(100, 50, 1000), (1, 50, 1000), (100, 0, 0), (0, 0, 1000), (3, 50, 0)]
)
@pytest.mark.parametrize("text", ["a" * 2000, "\u0001" * 2000, "\U0001f6aa" * 2000], ids=["ascii", "control", "door"])
def test_the_end_of_the_largest_run_fits_is_counted_and_does_not_take_long(
    steps: int, failures: int, artifacts: int, text: str
) -> None:
    metadata = {f"{n:02d}": "m" * 480 for n in range(16)}  # 8 KiB: as much as submission lets in
    run = make_finished(steps=steps, failures=failures, artifacts=artifacts, text=text, metadata=metadata)
    run = run.model_copy(update={"scenario": run.scenario.model_copy(update={"name": text[:200]})})
    started = time.process_time()
    data = finished_data(run)
    took_s = time.process_time() - started
    shown = run.model_dump(mode="json")

    assert json_size(data) < MAX_DATA_BYTES
    assert {name: data[name] for name in NEVER_CUT} == {name: shown[name] for name in NEVER_CUT}
    assert data["omitted"]["steps"] == steps - len(data["steps"])
    assert data["omitted"]["artifacts"] == 2 * artifacts - len(data["artifacts"]) - len(data["skipped_artifacts"])
    assert data["omitted"]["failures"] == steps * failures - sum(len(step["failures"]) for step in data["steps"])
    assert took_s < 1.0


def test_a_long_tail_of_rejected_candidates_and_controls_goes_before_what_is_never_cut() -> None:
    rejected = tuple({"boundary": "gvisor", "missing": "m" * 3000} for _ in range(12))
    run = make_finished(steps=1, placement=make_placement(rejected=rejected))
    data = finished_data(run)

    assert json_size(data) < MAX_DATA_BYTES
    assert data["placement"]["rejected"] == []
    assert data["controls"] != {}
    assert len(data["steps"]) == 1


@settings(deadline=None)
@given(
    text=st.text(max_size=3000), steps=st.integers(0, 100), failures=st.integers(0, 50), artifacts=st.integers(0, 100)
)
def test_whatever_the_run_holds_its_end_fits_and_is_json(text: str, steps: int, failures: int, artifacts: int) -> None:
    text = text.encode("utf-8", "replace").decode()
    run = make_finished(steps=steps, failures=failures, artifacts=artifacts, text=text)
    data = finished_data(run)

    assert json_size(data) < MAX_DATA_BYTES
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert "text" not in json.dumps([step["stdout"] for step in data["steps"]]) or "text" in text


def test_output_is_counted_in_the_event_but_not_shown() -> None:
    step = make_step_result(stdout=StreamText(text="secret", bytes=9_999, truncated=True))
    (shown,) = finished_data(make_run(steps=(step,)))["steps"]

    assert shown["stdout"] == {"bytes": 9_999, "truncated": True}
