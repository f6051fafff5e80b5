"""The outcome, from what the host observed: precedence, expectations, and that a guest can set nothing of it."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.boundary import Ended, Execution, FileContent, Limit
from service.core.events import finished_data
from service.core.run import Outcome, Reason, Result, StepOutcome
from service.core.scenario import Step
from service.core.verdict import (
    MAX_ACTUAL_BYTES,
    MAX_STEP_FAILURES,
    MAX_TEXT_BYTES,
    JudgedStep,
    judge_files,
    judge_run,
    judge_step,
    skipped,
    stream_text,
)
from tests.factories import make_capture, make_execution, make_result, make_run


def make_step(*, expect: dict[str, Any] | None = None, **more: Any) -> Step:
    return Step.model_validate({"name": "s", "run": "x"} | ({} if expect is None else {"expect": expect}) | more)


def judge(execution: Execution, *, expect: dict[str, Any] | None = None, **more: Any) -> JudgedStep:
    return judge_step(1, make_step(expect=expect, **more), execution)


def paths(judged: JudgedStep) -> list[str]:
    return [failure.expectation for failure in judged.result.failures]


class TestOutcome:
    @pytest.mark.parametrize(
        ("execution", "outcome", "reason"),
        [
            (make_execution(), StepOutcome.PASSED, None),
            (make_execution(exit_code=1), StepOutcome.FAILED, Reason.EXIT_CODE),
            (make_execution(exit_code=128), StepOutcome.FAILED, Reason.EXIT_CODE),
            (make_execution(exit_code=139), StepOutcome.FAILED, Reason.EXIT_CODE),
            (make_execution(exit_code=None, signal=11), StepOutcome.FAILED, Reason.EXIT_CODE),
            (make_execution(ended=Ended.NOT_STARTED, message="no such program"), StepOutcome.FAILED, Reason.EXIT_CODE),
            (make_execution(exit_code=None, ended=Ended.BROKEN), StepOutcome.FAILED, Reason.EXIT_CODE),
            (make_execution(ended=Ended.STEP_TIMEOUT), StepOutcome.TIMED_OUT, Reason.STEP_TIMEOUT),
            (make_execution(ended=Ended.WALL_TIMEOUT), StepOutcome.TIMED_OUT, Reason.WALL_TIMEOUT),
            *(
                (make_execution(ended=Ended.LIMIT, limits={limit}), StepOutcome.LIMIT_EXCEEDED, Reason(limit))
                for limit in Limit
            ),
            (make_execution(ended=Ended.CANCELLED), StepOutcome.SKIPPED, None),
            (make_execution(ended=Ended.LOST), StepOutcome.SKIPPED, None),
        ],
        ids=str,
    )
    def test_how_a_step_ended_decides(self, execution: Execution, outcome: StepOutcome, reason: Reason | None) -> None:
        judged = judge(execution)

        assert (judged.result.outcome, judged.reason) == (outcome, reason)
        assert judged.stops is (outcome is not StepOutcome.PASSED)

    def test_a_limit_that_was_hit_decides_only_when_the_step_did_not_pass(self) -> None:
        hit: dict[str, Any] = {"limits": {Limit.MEMORY, Limit.OUTPUT}}

        assert judge(make_execution(**hit)).result.outcome is StepOutcome.PASSED
        failed = judge(make_execution(exit_code=137, **hit))
        assert (failed.result.outcome, failed.reason) == (StepOutcome.LIMIT_EXCEEDED, Reason.MEMORY)
        assert paths(failed) == ["exit_code"]

    @pytest.mark.parametrize(
        ("execution", "actual"),
        [
            (make_execution(exit_code=3), 3),
            (make_execution(exit_code=None, signal=9), "signal 9 (SIGKILL)"),
            (make_execution(exit_code=None, signal=40), "signal 40 (real-time)"),
            (make_execution(ended=Ended.NOT_STARTED, message="no such program: x"), "no such program: x"),
        ],
    )
    def test_how_it_ended_is_said_where_an_exit_status_was_expected(self, execution: Execution, actual: Any) -> None:
        assert judge(execution).result.failures[0].actual == actual

    def test_an_expected_status_passes_and_null_takes_any_end(self) -> None:
        assert judge(make_execution(exit_code=3), expect={"exit_code": 3}).reason is None
        assert judge(make_execution(exit_code=None, signal=11), expect={"exit_code": None}).reason is None
        assert judge(make_execution(), expect={"exit_code": 3}).reason is Reason.EXIT_CODE

    def test_a_sandbox_that_the_guest_broke_is_a_failure_whatever_was_expected_and_tolerated(self) -> None:
        broken = make_execution(exit_code=None, ended=Ended.BROKEN, message="the guest ended it", sandbox_alive=False)

        judged = judge(broken, expect={"exit_code": None}, continue_on_failure=True)

        assert (judged.result.outcome, judged.stops) == (StepOutcome.FAILED, True)
        assert judged.result.failures[0].actual == "the guest ended it"


class TestRun:
    def test_cancelled_goes_before_errored_and_that_before_the_first_step_that_did_not_pass(self) -> None:
        steps = [
            judge(make_execution()),
            judge(make_execution(exit_code=1)),
            judge(make_execution(ended=Ended.WALL_TIMEOUT)),
        ]
        judged = [
            judge_run(steps, cancelled_by="tenant", lost="gone"),
            judge_run(steps, lost="gone"),
            judge_run(steps),
            judge_run(steps[:1]),
        ]

        assert [(verdict.outcome, verdict.reason) for verdict in judged] == [
            (Outcome.CANCELLED, Reason.CANCELLED_BY_TENANT),
            (Outcome.ERRORED, Reason.BOUNDARY_LOST),
            (Outcome.FAILED, Reason.EXIT_CODE),
            (Outcome.PASSED, None),
        ]

    def test_a_skipped_step_decides_nothing(self) -> None:
        assert judge_run([skipped(1, make_step())]).outcome is Outcome.PASSED

    @pytest.mark.parametrize(
        ("execution", "outcome"),
        [
            (make_execution(exit_code=1), Outcome.PASSED),
            (make_execution(ended=Ended.STEP_TIMEOUT), Outcome.TIMED_OUT),
            (make_execution(ended=Ended.LIMIT, limits={Limit.PIDS}), Outcome.LIMIT_EXCEEDED),
        ],
    )
    def test_what_may_fail_stops_nothing_but_limits_and_time_outs_still_do(
        self, execution: Execution, outcome: Outcome
    ) -> None:
        judged = judge(execution, continue_on_failure=True)

        assert judged.stops is (outcome is not Outcome.PASSED)
        assert judge_run([judged]).outcome is outcome


class TestStreams:
    @pytest.mark.parametrize(
        ("expected", "printed", "failing"),
        [
            ({"equals": "a\n"}, b"a\n", []),
            ({"equals": "a"}, b"a\n", ["stdout.equals"]),
            ({"contains": "b"}, b"abc", []),
            ({"contains": ""}, b"", []),
            ({"contains": "x"}, b"abc", ["stdout.contains"]),
            ({"matches": "^a.c$"}, b"abc", []),
            ({"matches": "^b"}, b"abc", ["stdout.matches"]),
            ({"equals": "x", "contains": "y"}, b"abc", ["stdout.equals", "stdout.contains"]),
            ({"equals": "\N{REPLACEMENT CHARACTER}"}, b"\xff", ["stdout.equals"]),
            ({"json": {"a": 1}}, b'{"a": 1.0, "b": 2}', []),
            ({"json": {"a": 1}}, b'{"a": true}', ["stdout.json.a"]),
            ({"json": {"a": True}}, b'{"a": 1}', ["stdout.json.a"]),
            ({"json": {"a": None}}, b'{"b": 1}', ["stdout.json.a"]),
            ({"json": None}, b"null", []),
            ({"json": None}, b"0", ["stdout.json"]),
            ({"json": [1, {"x": 2}]}, b'[1, {"x": 2, "y": 3}]', []),
            ({"json": [1]}, b"[1, 2]", ["stdout.json.length"]),
            ({"json": {"a": [1, 2]}}, b'{"a": [1, 3]}', ["stdout.json.a[1]"]),
            ({"json": 1}, b"NaN", ["stdout.json"]),
            ({"json": 1}, b"1 2", ["stdout.json"]),
            ({"json": 1}, b"\xff", ["stdout.json"]),
            ({"json": 1}, b"[" * 100_000, ["stdout.json"]),
        ],
        ids=str,
    )
    def test_expectations_of_what_was_printed(
        self, expected: dict[str, Any], printed: bytes, failing: list[str]
    ) -> None:
        assert paths(judge(make_execution(stdout=printed), expect={"stdout": expected})) == failing

    def test_both_streams_are_judged_alike(self) -> None:
        execution = make_execution(stderr=make_capture(printed=b"warn"))

        assert paths(judge(execution, expect={"stderr": {"equals": ""}})) == ["stderr.equals"]

    def test_on_a_truncated_stream_only_what_is_found_in_head_or_tail_holds(self) -> None:
        printed = make_capture(printed=b"HEAD" + b"x" * 2**21 + b"TAIL")
        expect = {"contains": "HEAD", "equals": "HEAD", "matches": "HEAD", "json": 1}
        judged = judge(make_execution().model_copy(update={"stdout": printed}), expect={"stdout": expect})

        assert paths(judged) == ["stdout.equals", "stdout.json", "stdout.matches"]
        assert all("truncated" in failure.actual for failure in judged.result.failures)
        across = judge(make_execution().model_copy(update={"stdout": printed}), expect={"stdout": {"contains": "xT"}})
        assert paths(across) == []

    def test_time_is_an_expectation_like_any_other(self) -> None:
        judged = judge(make_execution(duration_s=3.0), expect={"max_seconds": 2})

        assert (paths(judged), judged.reason) == (["max_seconds"], Reason.EXPECTATION)

    def test_text_is_cut_to_what_a_run_carries_and_counted_whole(self) -> None:
        shown = stream_text(make_capture(printed=b"\xff" * 100_000))

        assert (shown.bytes, shown.truncated) == (100_000, True)
        assert len(shown.text) <= MAX_TEXT_BYTES + 100
        assert stream_text(make_capture(printed=b"a" * MAX_TEXT_BYTES)).truncated is False


class TestFiles:
    @pytest.mark.parametrize(
        ("expected", "found", "failing"),
        [
            ({"exists": True}, FileContent(data=b""), []),
            ({"exists": True}, None, ["files.out.exists"]),
            ({"exists": True}, FileContent(absent_why="symlink"), ["files.out.exists"]),
            ({"exists": False}, None, []),
            ({"exists": False}, FileContent(absent_why="absent"), []),
            ({"exists": False}, FileContent(data=b""), ["files.out.exists"]),
            ({"exists": False}, FileContent(absent_why="symlink"), ["files.out.exists"]),
            ({"equals": "a"}, FileContent(data=b"a"), []),
            ({"json": {"a": 1}}, FileContent(data=b'{"a": 2}'), ["files.out.json.a"]),
            ({"contains": "a"}, FileContent(absent_why="too large"), ["files.out.exists"]),
        ],
        ids=str,
    )
    def test_files_are_charged_to_their_step(
        self, expected: dict[str, Any], found: FileContent | None, failing: list[str]
    ) -> None:
        step = make_step(expect={"files": {"out": expected}})
        judged = judge_files(judge_step(1, step, make_execution()), step, {} if found is None else {"out": found})

        assert paths(judged) == failing
        assert judged.reason is (Reason.EXPECTATION if failing else None)

    @pytest.mark.parametrize("ended", [Ended.STEP_TIMEOUT, Ended.CANCELLED, Ended.LOST])
    def test_a_step_that_did_not_come_to_its_end_is_left_as_it_is(self, ended: Ended) -> None:
        step = make_step(expect={"files": {"out": {"exists": True}}})
        judged = judge_step(1, step, make_execution(ended=ended))

        assert judge_files(judged, step, {}) == judged


SCALARS = st.none() | st.booleans() | st.floats() | st.text()
JSON = st.recursive(SCALARS, lambda more: st.lists(more) | st.dictionaries(st.text(), more))
HOSTILE = {
    "a lone surrogate": rb'{"a": "\ud800"}',
    "a lone surrogate as a key": rb'{"a": {"\ud800": 1}}',
    "a nest of lists": b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}",
    "a nest of objects": b'{"a": ' + b'{"a":' * 900 + b"1" + b"}" * 901,
    "a number beyond all": b'{"a": 1e999}',
    "a number beyond all in a list": b'{"a": [-1e999]}',
    "a number of 4000 digits": b'{"a": ' + b"9" * 4000 + b"}",
    "a number of 5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "a NUL": rb'{"a": "\u0000"}',
    "a mebibyte": b'{"a": "' + b"x" * 2**20 + b'"}',
    "a mebibyte of values": b'{"a": [' + b"1," * 2**19 + b"1]}",
}


class TestHostile:
    """What a guest prints may fail its step. It never breaks what we write down, or it could make itself `errored`."""

    @pytest.mark.parametrize("printed", HOSTILE.values(), ids=HOSTILE.keys())
    def test_hostile_json_is_the_steps_failure_and_every_reader_can_take_it(self, printed: bytes) -> None:
        judged = judge(make_execution(stdout=printed), expect={"stdout": {"json": {"a": 1}}})
        _assert_writable(judged)

        assert judged.result.outcome is StepOutcome.FAILED

    @given(st.binary(max_size=300))
    def test_any_bytes_at_all_are_judged_and_can_be_written(self, printed: bytes) -> None:
        expect = {"stdout": {"json": {"a": 1}, "equals": "x", "matches": "^x$", "contains": "\0"}}

        _assert_writable(judge(make_execution(stdout=printed), expect=expect))

    @given(JSON)
    def test_any_json_at_all_is_judged_and_can_be_written(self, value: Any) -> None:
        _assert_writable(
            judge(make_execution(stdout=json.dumps({"a": value}).encode()), expect={"stdout": {"json": {"a": 1}}})
        )

    def test_no_step_has_more_failures_than_can_be_read(self) -> None:
        files = {f"f{n}": {"json": {str(key): 1 for key in range(30)}} for n in range(100)}
        step = make_step(expect={"files": files})
        found = {name: FileContent(data=b"{}") for name in files}
        judged = judge_files(judge_step(1, step, make_execution()), step, found)

        assert len(judged.result.failures) == MAX_STEP_FAILURES


def _assert_writable(judged: JudgedStep) -> None:
    result = make_result(steps=(judged.result,))
    written = result.model_dump_json()
    assert Result.model_validate_json(written).model_dump_json() == written
    data = finished_data(make_run(steps=(judged.result,), message=judged.message))
    json.dumps(data, allow_nan=False, ensure_ascii=False).encode()
    for failure in judged.result.failures:
        assert len(json.dumps(failure.actual, ensure_ascii=False).encode()) <= 6 * MAX_ACTUAL_BYTES + 2
