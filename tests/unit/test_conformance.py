"""How attacks are judged and told, on fakes: blocked, vacuous and FAILED, and that everything opened is destroyed."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import structlog
from rich.console import Console
from typer.testing import CliRunner

from service.core.boundary import BoundaryRef, BoundarySpec, Cancellation, Capabilities, Limit, Sandbox
from service.core.errors import BoundaryError
from tests.factories import make_capabilities
from workers.boundaries.fake import (
    DyingBoundary,
    FakeBoundary,
    NeverReadyBoundary,
    ResistingBoundary,
)
from workers.cli import commands
from workers.conformance import report
from workers.conformance.cases import Case, Make, Play, Severity, leaked, not_hit
from workers.conformance.corpus import CASES
from workers.conformance.programs import BEGUN, ENDED
from workers.conformance.run import Arena, Outcome, Result
from workers.conformance.stage import Stage, new_token

TOKEN = new_token()


class Silence:
    """Listeners that nobody calls, without a socket."""

    targets: tuple[tuple[str, int], ...] = ()

    def take(self) -> tuple[str, ...]:
        return ()


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(
        host_file=tmp_path / "canary",
        ears=Silence(),  # type: ignore[arg-type]
        mark="bdmark0123456789",
        given=TOKEN,
        tokens={"the step's own": TOKEN},
    )


def judged(boundary: FakeBoundary, stage: Stage, case: Case) -> Result:
    with Arena(boundary, stage, name="gvisor", installation="fake", site="here") as arena:
        result = arena.judge(case)
    assert (boundary.world.labels, boundary.world.running) == ({}, set()), "something was left"
    return result


def prints(text: str, *, begun: bool = True, ended: bool = True) -> Make:
    lines = [*([BEGUN] if begun else []), text, *([ENDED] if ended else [])]
    return lambda stage: Play(argv=("print", "\n".join(lines)))


def runs(*argv: str) -> Make:
    return lambda stage: Play(argv=argv)


def leak_case(attack: Make, control: Make) -> Case:
    return Case(
        id="T1", title="a test's own", severity=Severity.HOST_LEAK, attack=attack, control=control, wrong=leaked,
        opened="everything",
    )  # fmt: skip


CLEAN, LEAKING = prints("nothing"), prints(f"found {TOKEN}")


@pytest.mark.parametrize(
    ("attack", "control", "outcome", "why"),
    [
        (CLEAN, LEAKING, Outcome.BLOCKED, ""),
        (LEAKING, LEAKING, Outcome.FAILED, "came out: the token of the step's own"),
        (CLEAN, CLEAN, Outcome.VACUOUS, "the control did not fire: it ended as exited, exit code 0"),
        (CLEAN, runs("/no/python"), Outcome.VACUOUS, "the control did not begin"),
        (runs("/no/python"), LEAKING, Outcome.VACUOUS, "the attack did not begin: /no/python: no such program"),
        (prints("", ended=False), LEAKING, Outcome.VACUOUS, "the attack broke off: it ended as exited, exit code 0"),
        (prints(TOKEN, ended=False), LEAKING, Outcome.FAILED, "came out: the token of the step's own"),
    ],
)
def test_a_case_is_blocked_only_when_the_attack_was_held_and_its_control_fired(
    stage: Stage, attack: Make, control: Make, outcome: Outcome, why: str
) -> None:
    result = judged(FakeBoundary(), stage, leak_case(attack, control))

    assert (result.outcome, result.why) == (outcome, why)


def test_a_boundary_that_cannot_be_opened_shows_nothing(stage: Stage) -> None:
    result = judged(NeverReadyBoundary(), stage, leak_case(CLEAN, LEAKING))

    assert result.outcome is Outcome.VACUOUS
    assert "not ready in time" in result.why


def test_a_sandbox_that_dies_before_the_attack_begins_shows_nothing(stage: Stage) -> None:
    assert judged(DyingBoundary(), stage, leak_case(CLEAN, LEAKING)).outcome is Outcome.VACUOUS


def test_a_boundary_that_resists_its_end_is_asked_until_it_is_gone(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.conformance.run._POLL_S", 0)

    assert judged(ResistingBoundary(), stage, leak_case(CLEAN, LEAKING)).outcome is Outcome.BLOCKED


def test_a_boundary_that_never_goes_is_a_failure(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.conformance.run._DESTROY_S", 0)
    boundary = ResistingBoundary()
    boundary.refusals = 10**9
    with Arena(boundary, stage, name="gvisor", installation="fake", site="here") as arena:
        result = arena.judge(leak_case(CLEAN, LEAKING))

    assert result.outcome is Outcome.FAILED
    assert "could not be destroyed" in result.why


def test_a_limit_that_the_host_did_not_see_is_a_failure(stage: Stage) -> None:
    case = Case(
        id="T2", title="a limit", severity=Severity.HOST_DOS, attack=CLEAN, control=CLEAN,
        wrong=lambda seen: not_hit(seen, Limit.DISK), opened="the limit",
    )  # fmt: skip

    assert judged(FakeBoundary(), stage, case).why == "the host did not see the disk limit being hit"


def test_every_case_of_the_corpus_has_an_id_of_its_own_and_says_what_its_control_opens() -> None:
    assert len({case.id for case in CASES}) == len(CASES) >= 20
    assert [case.id for case in CASES if len(case.opened) < 10] == []


def test_no_attack_of_the_corpus_knows_a_token_and_its_control_differs_from_it(stage: Stage) -> None:
    """Else what comes out would say nothing."""
    for case in CASES:
        attack, control = case.attack(stage), case.control(stage)
        assert TOKEN not in repr(attack), case.id
        assert attack != control, case.id


# --- how it is told ---


def results(*outcomes: Outcome) -> list[Result]:
    case = leak_case(CLEAN, LEAKING)
    cases = [Case(**{**vars(case), "id": f"T{n}"}) for n in range(len(outcomes))]
    return [
        Result(case=case, boundary="gvisor", outcome=outcome, why="" if outcome is Outcome.BLOCKED else "a [reason]")
        for case, outcome in zip(cases, outcomes, strict=True)
    ]


def printed(told: Sequence[Result]) -> str:
    console = Console(width=200, force_terminal=False)
    with console.capture() as capture:
        console.print(report.matrix(told))
    return capture.get()


def test_the_matrix_has_a_row_for_each_case_and_a_column_for_each_boundary() -> None:
    here = results(Outcome.BLOCKED, Outcome.VACUOUS, Outcome.FAILED)
    there = [Result(**{**vars(here[0]), "boundary": "namespace/runc"})]
    rows = [line.split("  ") for line in printed([*here, *there]).splitlines()]
    cells = [[word.strip() for word in row if word.strip()] for row in rows]

    assert cells[0] == ["case", "severity", "gvisor", "namespace/runc"]
    assert cells[1:4] == [
        ["T0", "a test's own", "HostLeak", "blocked", "blocked"],
        ["T1", "a test's own", "HostLeak", "vacuous", "-"],
        ["T2", "a test's own", "HostLeak", "FAILED", "-"],
    ]


def test_below_it_stands_why_and_how_many_of_each() -> None:
    lines = printed(results(Outcome.BLOCKED, Outcome.VACUOUS, Outcome.FAILED)).splitlines()

    assert "T2 in gvisor: FAILED: a [reason]" in lines
    assert lines[-1] == "3 cases, 1 blocked, 1 vacuous, 1 failed"


@pytest.mark.parametrize(
    ("told", "held"),
    [
        (results(Outcome.BLOCKED, Outcome.BLOCKED), True),
        (results(Outcome.BLOCKED, Outcome.VACUOUS), False),
        (results(Outcome.BLOCKED, Outcome.FAILED), False),
        ([], False),
    ],
)
def test_only_a_wall_that_blocked_everything_holds(told: list[Result], held: bool) -> None:
    assert report.held(told) is held


# --- the command ---


@pytest.fixture
def attack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[int, str, str]]]:
    for name in ("BLASTDOOR_STATE_DIR", "BLASTDOOR_RUNTIME_DIR", "BLASTDOOR_RUNSC"):
        monkeypatch.delenv(name, raising=False)
    before = structlog.get_config()

    def invoke(*arguments: str) -> tuple[int, str, str]:
        places = ["--state", str(tmp_path / "state"), "--runtime-dir", str(tmp_path / "run")]
        result = CliRunner().invoke(commands, ["doctor", "--attack", *places, *arguments])
        return result.exit_code, result.stdout, result.stderr

    yield invoke
    structlog.configure(**before)


def test_without_root_the_command_says_that_it_needs_it(
    attack: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    code, said, complained = attack()

    assert (code, said) == (2, "")
    assert "needs root" in complained


class Absent(FakeBoundary):
    def probe(self) -> Sequence[Capabilities]:
        return (make_capabilities(available=False, missing=("runsc",)),)

    def open(self, spec: BoundarySpec, ref: BoundaryRef, *, cancelled: Cancellation) -> AbstractContextManager[Sandbox]:
        raise BoundaryError("nobody opens what cannot be built")


def test_a_boundary_that_cannot_be_built_is_named_and_nothing_is_shown(
    attack: Callable[..., tuple[int, str, str]], stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr("workers.cli.set_stage", lambda: nullcontext(stage))
    monkeypatch.setattr("workers.cli.load", lambda kind, host: Absent())

    code, said, _ = attack("--json")

    assert code == 3
    assert json.loads(said)["not_built"] == {"gvisor": ["runsc"]}
    assert attack()[1].startswith("gvisor cannot be built here: runsc")
