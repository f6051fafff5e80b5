r"""A finished run as JUnit XML, in the shape that Jenkins, GitLab, GitHub's reporters and the usual schemas read.

A step is a testcase. `failure` is what the code did (an expectation, an exit code, a time-out, a limit), `error` is our
own infrastructure, `skipped` a step that was not played, or one whose failure the scenario tolerates. The suite is
green exactly when the run passed: what no step accounts for (cancelled, errored, a limit of the whole run) is a
testcase of its own, RUN_CASE.

The text is a stranger's. A character that XML 1.0 has no place for (section 2.2: controls, surrogates, U+FFFE, U+FFFF)
is spelled out, as `\x1b` or `\ufffe`; a carriage return is a reference, since a parser would make a newline of it.
"""

import json
import re
from collections.abc import Iterator, Mapping
from datetime import UTC

from service.core.run import Failure, Outcome, Run, StepOutcome, StepResult

RUN_CASE = "the run as a whole"
_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_TEXT = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "\r": "&#13;"})
_ATTRIBUTE = _TEXT | str.maketrans({'"': "&quot;", "\n": "&#10;", "\t": "&#9;"})
_NOT_PASSED = frozenset({StepOutcome.FAILED, StepOutcome.TIMED_OUT, StepOutcome.LIMIT_EXCEEDED})
_WORDS = {StepOutcome.TIMED_OUT: "took longer than allowed", StepOutcome.LIMIT_EXCEEDED: "hit a limit"}


def render_junit(run: Run) -> str:
    """The whole document, ASCII-declared as UTF-8. The run must be finished (ValueError)."""
    if run.outcome is None:
        raise ValueError(f"{run.id} is not finished")
    cases = [*(_case(step, run) for step in run.steps), *_run_case(run)]
    counts = {kind: sum(f"<{kind} " in case for case in cases) for kind in ("failure", "error", "skipped")}
    totals = {
        "tests": len(cases),
        "failures": counts["failure"],
        "errors": counts["error"],
        "skipped": counts["skipped"],
        "time": _seconds(run.usage.wall_s if run.usage else sum(step.duration_s or 0.0 for step in run.steps)),
    }
    began = (run.started_at or run.created_at).astimezone(UTC)
    suite = {"name": run.scenario.name, **totals, "timestamp": began.strftime("%Y-%m-%dT%H:%M:%S")}
    return "".join(
        (
            '<?xml version="1.0" encoding="UTF-8"?>\n',
            _opening("testsuites", {"name": run.id, **totals}),
            _opening("testsuite", suite),
            *_properties(run),
            *cases,
            "</testsuite>\n</testsuites>\n",
        )
    )


def xml_text(text: str) -> str:
    """As character data: any string at all becomes well-formed, and `]]>` cannot stand in it."""
    return _legal(text).translate(_TEXT)


def xml_attribute(text: str) -> str:
    """As the value of an attribute, in double quotes; newlines and tabs survive the parser's normalisation."""
    return _legal(text).translate(_ATTRIBUTE)


def _legal(text: str) -> str:
    return _ILLEGAL.sub(lambda match: _spelled(ord(match[0])), text)


def _spelled(point: int) -> str:
    return f"\\x{point:02x}" if point < 0x100 else f"\\u{point:04x}"


def _properties(run: Run) -> Iterator[str]:
    """What tells this run from others. Metadata are the tenant's own words and go along."""
    known = {
        "blastdoor.run": run.id,
        "blastdoor.outcome": run.outcome,
        "blastdoor.reason": run.reason,
        "blastdoor.boundary": run.placement.boundary,
        **{f"metadata.{name}": value for name, value in run.metadata.items()},
    }
    yield "<properties>\n"
    for name, value in known.items():
        if value is not None:
            yield _empty("property", {"name": name, "value": value})
    yield "</properties>\n"


def _case(step: StepResult, run: Run) -> str:
    opening = _opening(
        "testcase",
        {"name": f"{step.n}. {step.name}", "classname": run.scenario.name, "time": _seconds(step.duration_s or 0.0)},
    )
    outputs = (_element(f"system-{name}", {}, text) for name, text in _texts(step) if text)
    return "".join((opening, *_verdict(step, run), *outputs, "</testcase>\n"))


def _texts(step: StepResult) -> Iterator[tuple[str, str]]:
    yield "out", step.stdout.text
    yield "err", step.stderr.text


def _verdict(step: StepResult, run: Run) -> Iterator[str]:
    if step.outcome is StepOutcome.SKIPPED:
        yield _empty("skipped", {"message": "not played to its end"})
    elif step.outcome in _NOT_PASSED:
        message, text = _message(step, run), "\n".join(map(_failure_text, step.failures))
        if run.outcome is Outcome.PASSED:
            tolerated = f"{step.outcome}, which the scenario tolerates: {message}"
            yield _element("skipped", {"message": tolerated}, text)
        else:
            yield _element("failure", {"type": step.outcome, "message": message}, text or message)


def _message(step: StepResult, run: Run) -> str:
    about_this_step = f"step {step.n}: "
    if run.message and run.message.startswith(about_this_step):
        return run.message.removeprefix(about_this_step)
    if step.failures:
        return f"{step.failures[0].expectation}: not as expected"
    return _WORDS.get(step.outcome, "failed")


def _failure_text(failure: Failure) -> str:
    return f"{failure.expectation}\n  expected: {_shown(failure.expected)}\n  actual:   {_shown(failure.actual)}"


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _run_case(run: Run) -> Iterator[str]:
    """For an outcome that no step has."""
    if run.outcome is Outcome.PASSED or run.outcome in {step.outcome.value for step in run.steps}:
        return
    opening = _opening("testcase", {"name": RUN_CASE, "classname": run.scenario.name, "time": _seconds(0.0)})
    kind = "error" if run.outcome is Outcome.ERRORED else "failure"
    message = run.message or str(run.reason or run.outcome)
    verdict = _element(kind, {"type": run.reason or run.outcome, "message": message}, message)
    yield f"{opening}{verdict}</testcase>\n"


def _seconds(value: float) -> str:
    return f"{value:.3f}"


def _opening(name: str, attributes: Mapping[str, object]) -> str:
    return f"<{name}{_attributes(attributes)}>\n"


def _empty(name: str, attributes: Mapping[str, object]) -> str:
    return f"<{name}{_attributes(attributes)}/>\n"


def _element(name: str, attributes: Mapping[str, object], text: str) -> str:
    return f"<{name}{_attributes(attributes)}>{xml_text(text)}</{name}>\n"


def _attributes(attributes: Mapping[str, object]) -> str:
    return "".join(f' {name}="{xml_attribute(str(value))}"' for name, value in attributes.items())
