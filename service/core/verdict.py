"""The outcome, computed outside the boundary from what the host observed. Nothing a guest prints, writes or exits with
can set a reason, or make itself `errored`.

Precedence: cancelled, then errored, then the first step that did not pass.
"""

import json
import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from service.core.boundary import Capture, Ended, Execution, FileContent, Limit
from service.core.lease import cancelled
from service.core.patterns import found_in
from service.core.run import Failure, Outcome, Reason, StepOutcome, StepResult, StreamText, Verdict
from service.core.scenario import FileExpectation, Step, TextExpectation

MAX_TEXT_BYTES = 16 * 1024
MAX_ACTUAL_BYTES = 2 * 1024
_MARKER = "\n[... a part is left out; {} bytes were printed ...]\n"
_MARKER_BYTES = 80
MAX_ACTUAL_DEPTH = 32
MAX_JSON_FAILURES = 20
MAX_STEP_FAILURES = 50

_LIMIT_ORDER = (Limit.MEMORY, Limit.PIDS, Limit.DISK, Limit.FILES, Limit.OUTPUT)
_TIMEOUTS = {Ended.STEP_TIMEOUT: Reason.STEP_TIMEOUT, Ended.WALL_TIMEOUT: Reason.WALL_TIMEOUT}


class JudgedStep(BaseModel):
    """A step's result and, when it did not pass, why in the words of the contract."""

    model_config = ConfigDict(frozen=True)

    result: StepResult
    reason: Reason | None = None
    message: str | None = None
    tolerated: bool = False
    """Its failure neither skips the rest nor changes the run's outcome (`continue_on_failure`)."""

    @property
    def stops(self) -> bool:
        """The steps after it are skipped, but for `always`."""
        return self.result.outcome is not StepOutcome.PASSED and not self.tolerated


def skipped(n: int, step: Step) -> JudgedStep:
    return JudgedStep(result=StepResult(n=n, name=step.name, outcome=StepOutcome.SKIPPED), tolerated=True)


def judge_step(n: int, step: Step, execution: Execution) -> JudgedStep:
    """All expectations but `files`, which are judged once, after the run (`judge_files`)."""
    base = StepResult(
        n=n,
        name=step.name,
        outcome=StepOutcome.SKIPPED,
        exit_code=execution.exit_code,
        signal=execution.signal,
        duration_s=round(execution.duration_s, 6),
        cpu_s=round(execution.cpu_s, 6),
        stdout=stream_text(execution.stdout),
        stderr=stream_text(execution.stderr),
    )
    if execution.ended in (Ended.CANCELLED, Ended.LOST):
        return JudgedStep(result=base)
    if reason := _TIMEOUTS.get(execution.ended):
        message = f"step {n}: {'the step' if reason is Reason.STEP_TIMEOUT else 'the run'} took longer than allowed"
        return _not_passed(base, StepOutcome.TIMED_OUT, reason, message)
    if execution.ended is Ended.BROKEN:
        why = Failure(expectation="exit_code", expected=step.expect.exit_code, actual=execution.message)
        base = base.model_copy(update={"failures": (why,)})
        return _not_passed(base, StepOutcome.FAILED, Reason.EXIT_CODE, f"step {n}: {execution.message}")
    failures = () if execution.ended is Ended.LIMIT else tuple(_failures(step, execution))
    if execution.ended is Ended.LIMIT or (failures and execution.limits):
        limit = next(limit for limit in _LIMIT_ORDER if limit in execution.limits)
        base = base.model_copy(update={"failures": failures[:MAX_STEP_FAILURES]})
        return _not_passed(base, StepOutcome.LIMIT_EXCEEDED, Reason(limit), f"step {n}: the {limit} limit was hit")
    return _judged(base, failures, tolerated=step.continue_on_failure)


def judge_files(judged: JudgedStep, step: Step, found: Mapping[str, FileContent]) -> JudgedStep:
    """Charge the files that were collected to the step that expects something of them. A step that was skipped, timed
    out or hit a limit is left as it is."""
    if judged.result.outcome not in (StepOutcome.PASSED, StepOutcome.FAILED) or not step.expect.files:
        return judged
    failures = [
        f for path, expected in step.expect.files.items() for f in _file_failures(path, expected, found.get(path))
    ]
    return _judged(judged.result, (*judged.result.failures, *failures), tolerated=step.continue_on_failure)


def judge_run(steps: Sequence[JudgedStep], *, cancelled_by: str | None = None, lost: str | None = None) -> Verdict:
    """`cancelled_by`: tenant or operator. `lost`: why the boundary is no longer there, when no limit explains it."""
    if cancelled_by is not None:
        return cancelled(cancelled_by)
    if lost is not None:
        return Verdict(outcome=Outcome.ERRORED, reason=Reason.BOUNDARY_LOST, message=lost)
    for step in steps:
        if step.stops:
            return Verdict(outcome=Outcome(step.result.outcome), reason=step.reason, message=step.message)
    return Verdict(outcome=Outcome.PASSED)


def stream_text(capture: Capture) -> StreamText:
    """What was kept, as UTF-8 with replacement and at most 16 KiB of it, head and tail. `truncated`: that is not all;
    `bytes` counts all that was printed."""
    text = capture.data.decode("utf-8", "replace")
    if len(text.encode()) <= MAX_TEXT_BYTES and not capture.truncated:
        return StreamText(text=text, bytes=capture.total_bytes, truncated=False)
    half = (MAX_TEXT_BYTES - _MARKER_BYTES) // 2
    head = _encodable_to(half, capture.head.decode("utf-8", "replace"), from_end=False)
    end = (capture.tail or capture.head).decode("utf-8", "replace")
    tail = _encodable_to(half, end, from_end=True)
    return StreamText(text=head + _MARKER.format(capture.total_bytes) + tail, bytes=capture.total_bytes, truncated=True)


def _encodable_to(size: int, text: str, *, from_end: bool) -> str:
    """As much of the text's beginning, or end, as `size` bytes of UTF-8 hold."""
    data = text.encode()
    return (data[-size:] if from_end else data[:size]).decode("utf-8", "ignore")


def _judged(base: StepResult, failures: tuple[Failure, ...], *, tolerated: bool) -> JudgedStep:
    if not failures:
        return JudgedStep(result=base.model_copy(update={"outcome": StepOutcome.PASSED}))
    first = failures[0]
    reason = Reason.EXIT_CODE if first.expectation == "exit_code" else Reason.EXPECTATION
    message = f"step {base.n}: {first.expectation}: expected {_short(first.expected)}, got {_short(first.actual)}"
    kept = failures[:MAX_STEP_FAILURES]
    result = base.model_copy(update={"outcome": StepOutcome.FAILED, "failures": kept})
    return JudgedStep(result=result, reason=reason, message=message, tolerated=tolerated)


def _not_passed(base: StepResult, outcome: StepOutcome, reason: Reason, message: str) -> JudgedStep:
    return JudgedStep(result=base.model_copy(update={"outcome": outcome}), reason=reason, message=message)


def _failures(step: Step, execution: Execution) -> Iterator[Failure]:
    expect = step.expect
    if expect.exit_code is not None and execution.exit_code != expect.exit_code:
        yield Failure(expectation="exit_code", expected=expect.exit_code, actual=_how_it_ended(execution))
    for name, expected, capture in (
        ("stdout", expect.stdout, execution.stdout),
        ("stderr", expect.stderr, execution.stderr),
    ):
        if expected is not None:
            yield from _stream_failures(name, expected, capture)
    if expect.max_seconds is not None and execution.duration_s > expect.max_seconds:
        yield Failure(expectation="max_seconds", expected=expect.max_seconds, actual=round(execution.duration_s, 3))


def _how_it_ended(execution: Execution) -> int | str | None:
    if execution.ended is Ended.NOT_STARTED:
        return execution.message
    if execution.signal is not None:
        known = {s.value: s.name for s in signal.Signals}
        return f"signal {execution.signal} ({known.get(execution.signal, 'real-time')})"
    return execution.exit_code


def _stream_failures(name: str, expected: TextExpectation, capture: Capture) -> Iterator[Failure]:
    if not capture.truncated:
        yield from _text_failures(name, expected, capture.data)
        return
    for key in sorted(expected.given):
        value = expected.json_ if key == "json" else getattr(expected, key)
        if (
            key == "contains"
            and value is not None
            and any(value.encode() in part for part in (capture.head, capture.tail))
        ):
            continue
        yield Failure(
            expectation=f"{name}.{key}", expected=value, actual=f"truncated: {capture.total_bytes} bytes were printed"
        )


def _file_failures(path: str, expected: FileExpectation, found: FileContent | None) -> Iterator[Failure]:
    name = f"files.{path}"
    why = found.absent_why if found else "absent"
    if expected.exists is False:
        if found is not None and why != "absent":
            yield Failure(expectation=f"{name}.exists", expected=False, actual=why or True)
        return
    if found is None or found.data is None:
        yield Failure(expectation=f"{name}.exists", expected=True, actual=False if why == "absent" else why)
        return
    yield from _text_failures(name, expected, found.data)


def _text_failures(name: str, expected: TextExpectation, data: bytes) -> Iterator[Failure]:
    text = data.decode("utf-8", "replace")
    if expected.equals is not None and expected.equals.encode() != data:
        yield Failure(expectation=f"{name}.equals", expected=expected.equals, actual=_cut(text))
    if expected.contains is not None and expected.contains.encode() not in data:
        yield Failure(expectation=f"{name}.contains", expected=expected.contains, actual=_cut(text))
    if expected.matches is not None and not found_in(expected.matches, text):
        yield Failure(expectation=f"{name}.matches", expected=expected.matches, actual=_cut(text))
    if "json" in expected.given:
        yield from _json_failures(f"{name}.json", expected.json_, data)


def _json_failures(name: str, expected: Any, data: bytes) -> Iterator[Failure]:
    try:
        actual = json.loads(data.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        yield Failure(expectation=name, expected=expected, actual=_cut("not JSON: " + data.decode("utf-8", "replace")))
        return
    for count, (path, want, got) in enumerate(_mismatches(name, expected, actual)):
        if count == MAX_JSON_FAILURES:
            return
        yield Failure(expectation=path, expected=want, actual=_cut_value(got))


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


_ABSENT = "absent"


def _mismatches(path: str, want: Any, got: Any) -> Iterator[tuple[str, Any, Any]]:
    """Subset match: an object may have more keys than expected; an array must have the same length, each element
    matching; numbers compare by value, and true is not 1."""
    if isinstance(want, dict) and isinstance(got, dict):
        for key, value in want.items():
            if key in got:
                yield from _mismatches(f"{path}.{key}", value, got[key])
            else:
                yield f"{path}.{key}", value, _ABSENT
    elif isinstance(want, list) and isinstance(got, list) and len(want) == len(got):
        for index, value in enumerate(want):
            yield from _mismatches(f"{path}[{index}]", value, got[index])
    elif isinstance(want, list) and isinstance(got, list):
        yield f"{path}.length", len(want), len(got)
    elif isinstance(want, bool) or isinstance(got, bool) or not (_number(want) and _number(got)):
        if type(want) is not type(got) or want != got:
            yield path, want, got
    elif want != got:
        yield path, want, got


_JSON_TYPES = {dict: "object", list: "array", int: "number", float: "number"}


def _number(value: Any) -> bool:
    return isinstance(value, int | float)


def _cut(text: str) -> str:
    data = text.encode("utf-8", "replace")
    if len(data) <= MAX_ACTUAL_BYTES:
        return text
    return data[: MAX_ACTUAL_BYTES - 40].decode("utf-8", "ignore") + f" [... {len(data)} bytes in all]"


def _cut_value(value: Any) -> Any:
    """What a guest's JSON had, as every reader of ours can take it: the value itself while it is small, else its text.

    The guest chose it. Lone surrogates, numbers that are not finite and a nest of a thousand lists are things that some
    JSON writer down the line refuses, and a result that cannot be written would end the run as our own failure.
    """
    if isinstance(value, str):
        return _cut(value.encode("utf-8", "replace").decode())
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace").decode()
    except (RecursionError, ValueError):
        return f"a {_JSON_TYPES.get(type(value), 'value')} that is too deep or too large to show"
    if len(text.encode()) > MAX_ACTUAL_BYTES or text.count("[") + text.count("{") > MAX_ACTUAL_DEPTH:
        return _cut(text)
    return json.loads(text)


def _short(value: Any) -> str:
    text = (
        json.dumps(value, ensure_ascii=False)
        if not isinstance(value, str) or len(value) <= 200
        else json.dumps(value[:200] + "...")
    )
    return text if len(text) <= 220 else text[:217] + "..."
