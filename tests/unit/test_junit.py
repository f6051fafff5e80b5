"""JUnit XML of a run: well-formed for any text, in the shape its readers expect, green exactly when the run passed.

The parser is expat, which is strict: one character that XML has no place for, or one stray `]]>`, and it stops.
"""

import re
import string
import xml.etree.ElementTree as ElementTree
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.boundary import Usage
from service.core.junit import RUN_CASE, render_junit, xml_attribute, xml_text
from service.core.run import Failure, Outcome, Phase, Reason, Run, ScenarioSummary, StepOutcome, StreamText
from tests.factories import NOON, make_run, make_step_result

HOSTILE = "a\x00b\x1b[31m\r\n\t]]><x>&amp;'\"\ud800\udfff\ufffe\uffff\x85\u2028\U0001ffff é"
ANY_TEXT = st.text(st.characters(exclude_categories=()) | st.sampled_from("\0\x1b\r\n\t<>&\"']\ud800\ufffe"))
# Children of each element and the attributes it must have, after Jenkins' junit-10.xsd and Surefire's schema.
SHAPE: dict[str, tuple[set[str], set[str]]] = {
    "testsuites": ({"testsuite"}, {"tests", "failures", "errors"}),
    "testsuite": ({"properties", "testcase"}, {"name", "tests", "failures", "errors", "skipped", "time", "timestamp"}),
    "properties": ({"property"}, set()),
    "property": (set(), {"name", "value"}),
    "testcase": ({"skipped", "failure", "error", "system-out", "system-err"}, {"name", "classname", "time"}),
    "skipped": (set(), {"message"}),
    "failure": (set(), {"type", "message"}),
    "error": (set(), {"type", "message"}),
    "system-out": (set(), set()),
    "system-err": (set(), set()),
}


def finished(*outcomes: StepOutcome, outcome: Outcome = Outcome.PASSED, **more: Any) -> Run:
    steps = tuple(
        make_step_result(n=n, outcome=each, duration_s=None if each is StepOutcome.SKIPPED else 0.4)
        for n, each in enumerate(outcomes, start=1)
    )
    words: dict[str, Any] = {"phase": Phase.FINISHED, "outcome": outcome, "started_at": NOON, "steps": steps}
    return make_run(**words | more)


def parsed(run: Run) -> ElementTree.Element:
    """The one suite, after the whole was checked against the shape and its own counts."""
    root = ElementTree.fromstring(render_junit(run).encode())
    for element in root.iter():
        children, attributes = SHAPE[element.tag]
        assert {child.tag for child in element} <= children
        assert attributes <= element.attrib.keys()
        assert not element.text or not element.text.strip() or not children
    (suite,) = root
    cases = suite.findall("testcase")
    for tag, name in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
        found = [case for case in cases if case.find(tag) is not None]
        assert all(len(case.findall(tag)) == 1 for case in found)
        assert int(suite.attrib[name]) == int(root.attrib[name]) == len(found)
    assert int(suite.attrib["tests"]) == len(cases) == len({case.attrib["name"] for case in cases})
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", suite.attrib["timestamp"])
    assert all(re.fullmatch(r"\d+\.\d{3}", each.attrib["time"]) for each in (suite, *cases))
    return suite


def red(run: Run) -> int:
    suite = parsed(run)
    return int(suite.attrib["failures"]) + int(suite.attrib["errors"])


def test_the_parser_is_strict() -> None:
    """The positive control: what the renderer has to keep out is what the parser stops at."""
    for text in ("\x1b", "\x00", "\ufffe", "]]>", "<", "&"):
        with pytest.raises(ElementTree.ParseError):
            ElementTree.fromstring(f"<a>{text}</a>")


@given(text=ANY_TEXT)
def test_any_text_is_well_formed_anywhere(text: str) -> None:
    document = f'<a b="{xml_attribute(text)}">{xml_text(text)}</a>'
    root = ElementTree.fromstring(document.encode())
    assert root.text is None or root.text == root.attrib["b"]
    assert "]]>" not in document


@given(text=st.text(string.printable.replace("\x0b", "").replace("\x0c", "")))
def test_what_xml_has_a_place_for_comes_back_as_it_was(text: str) -> None:
    root = ElementTree.fromstring(f'<a b="{xml_attribute(text)}">{xml_text(text)}</a>')
    assert (root.text or "", root.attrib["b"]) == (text, text)


@pytest.mark.parametrize(
    ("character", "spelled"),
    [("\x00", r"\x00"), ("\x1b", r"\x1b"), ("\x0b", r"\x0b"), ("\ud800", r"\ud800"), ("\udfff", r"\udfff"),
     ("\ufffe", r"\ufffe"), ("\uffff", r"\uffff")],
)  # fmt: skip
def test_what_xml_has_no_place_for_is_spelled_out(character: str, spelled: str) -> None:
    assert xml_text(character) == xml_attribute(character) == spelled


@given(data=st.data())
def test_a_run_of_any_text_is_well_formed(data: st.DataObject) -> None:
    run = hostile(lambda: data.draw(ANY_TEXT))
    suite = parsed(run)
    assert int(suite.attrib["failures"]) == 1


def test_hostile_text_everywhere_at_once() -> None:
    suite = parsed(hostile(lambda: HOSTILE))
    case = suite.find("testcase")
    assert case is not None
    shown = "a\\x00b\\x1b[31m\r\n\t]]><x>&amp;'\"\\ud800\\udfff\\ufffe\\uffff\x85\u2028\U0001ffff é"
    assert case.findtext("system-out") == case.findtext("system-err") == shown
    assert suite.attrib["name"] == shown
    assert case.attrib["name"] == f"1. {shown}"


def hostile(text: Any) -> Run:
    """Built around the model's own checks, since a record may be older than they are."""
    failure = Failure.model_construct(expectation=text(), expected=text(), actual={text(): [text()]})
    stream = [StreamText.model_construct(text=text(), bytes=1, truncated=False) for _ in range(2)]
    step = make_step_result(outcome=StepOutcome.FAILED).model_copy(
        update={"name": text(), "failures": (failure, failure), "stdout": stream[0], "stderr": stream[1]}
    )
    return finished(outcome=Outcome.FAILED).model_copy(
        update={
            "steps": (step,), "message": f"step 1: {text()}", "metadata": {text(): text()},
            "scenario": ScenarioSummary.model_construct(name=text(), digest=""),
        }
    )  # fmt: skip


def test_a_step_is_a_testcase_with_its_time_and_its_output() -> None:
    step = make_step_result(text="printed").model_copy(
        update={"name": "build", "stderr": StreamText(text="warned", bytes=6), "duration_s": 0.1234}
    )
    run = finished().model_copy(update={"steps": (step,), "usage": Usage(wall_s=1.5), "metadata": {"build": "7"}})
    suite = parsed(run)
    (case,) = suite.findall("testcase")
    assert case.attrib == {"name": "1. build", "classname": run.scenario.name, "time": "0.123"}
    assert (case.findtext("system-out"), case.findtext("system-err")) == ("printed", "warned")
    assert (suite.attrib["time"], suite.attrib["timestamp"]) == ("1.500", "2026-01-01T12:00:00")
    properties = {each.attrib["name"]: each.attrib["value"] for each in suite.iter("property")}
    assert properties == {
        "blastdoor.run": run.id, "blastdoor.outcome": "passed", "blastdoor.boundary": "gvisor", "metadata.build": "7",
    }  # fmt: skip


def test_all_failures_of_a_step_are_in_one_element() -> None:
    failures = (
        Failure(expectation="exit_code", expected=0, actual=3),
        Failure(expectation="stdout.json.total", expected={"a": 180}, actual=None),
    )
    run = finished(StepOutcome.PASSED, outcome=Outcome.FAILED, message="step 2: exit_code: expected 0, got 3")
    step = make_step_result(n=2, outcome=StepOutcome.FAILED, failures=failures)
    failure = parsed(run.model_copy(update={"steps": (*run.steps, step)})).find("testcase/failure")
    assert failure is not None
    assert failure.attrib == {"type": "failed", "message": "exit_code: expected 0, got 3"}
    assert failure.text == (
        'exit_code\n  expected: 0\n  actual:   3\nstdout.json.total\n  expected: {"a": 180}\n  actual:   null'
    )


P, F, T, L, S = (StepOutcome(word) for word in ("passed", "failed", "timed_out", "limit_exceeded", "skipped"))


@pytest.mark.parametrize(
    ("steps", "outcome", "failures", "errors", "whole"),
    [
        ((P, P), Outcome.PASSED, 0, 0, False),
        ((P, F, S), Outcome.FAILED, 1, 0, False),
        ((T, S), Outcome.TIMED_OUT, 1, 0, False),
        ((L, S), Outcome.LIMIT_EXCEEDED, 1, 0, False),
        ((P, P), Outcome.LIMIT_EXCEEDED, 1, 0, True),
        ((P, P), Outcome.FAILED, 1, 0, True),
        ((S,), Outcome.TIMED_OUT, 1, 0, True),
        ((P, S), Outcome.CANCELLED, 1, 0, True),
        ((), Outcome.CANCELLED, 1, 0, True),
        ((P, S), Outcome.ERRORED, 0, 1, True),
        ((), Outcome.ERRORED, 0, 1, True),
        ((F, F), Outcome.FAILED, 2, 0, False),
        ((F, P), Outcome.PASSED, 0, 0, False),
    ],
)  # fmt: skip
def test_the_suite_is_red_exactly_when_the_run_did_not_pass(
    steps: tuple[StepOutcome, ...], outcome: Outcome, failures: int, errors: int, whole: bool
) -> None:
    run = finished(*steps, outcome=outcome, message="why", reason=Reason.INTERNAL)
    suite = parsed(run)
    assert (int(suite.attrib["failures"]), int(suite.attrib["errors"])) == (failures, errors)
    names = [case.attrib["name"] for case in suite.findall("testcase")]
    assert (RUN_CASE in names) == whole
    if whole:
        said = suite.findall("testcase")[-1][0]
        assert said.attrib == {"type": "internal", "message": "why"}


@given(steps=st.lists(st.sampled_from(StepOutcome), max_size=5), outcome=st.sampled_from(Outcome))
def test_it_is_never_green_for_another_reason(steps: list[StepOutcome], outcome: Outcome) -> None:
    assert (red(finished(*steps, outcome=outcome)) == 0) == (outcome is Outcome.PASSED)


def test_a_failure_that_the_scenario_tolerates_is_told_and_breaks_nothing() -> None:
    step = make_step_result(outcome=F, failures=(Failure(expectation="exit_code", expected=0, actual=1),))
    skipped = parsed(finished().model_copy(update={"steps": (step,)})).find("testcase/skipped")
    assert skipped is not None
    assert skipped.attrib["message"] == "failed, which the scenario tolerates: exit_code: not as expected"
    assert "actual:   1" in (skipped.text or "")


def test_a_moment_elsewhere_is_told_in_utc() -> None:
    moment = NOON.astimezone() + timedelta(hours=1)
    assert parsed(finished(P, started_at=moment)).attrib["timestamp"] == "2026-01-01T13:00:00"


def test_an_unfinished_run_has_no_report() -> None:
    with pytest.raises(ValueError, match="not finished"):
        render_junit(make_run())
