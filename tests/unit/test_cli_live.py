"""What a person sees of a run that goes on: whose line is whose, and that nothing a guest prints is obeyed (D34)."""

import io
import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from service.cli.live import GuestLines, Live
from service.client import OutputEvent, PhaseEvent, ProgressEvent, Unreachable
from tests.unit.test_printing import NASTY

CONTROLS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]")
D34 = "\x1b[2J\x1b]52;c;cm0gLXJmIH4=\x07\x1b]8;;https://evil.example\x1b\\x\x1b]8;;\x1b\\\x9b31m\rpassed\u202egnp\x07\x1b]0;t\x07"


def printed(*pieces: tuple[str, str], width: int = 80, terminal: bool = False) -> str:
    """On a console without colours, so that every control character in it would be the guest's."""
    file = io.StringIO()
    lines = GuestLines(Console(file=file, width=width, color_system=None, force_terminal=terminal, markup=False))
    for stream, text in pieces:
        lines.write(stream, text)
    lines.end_line()
    return file.getvalue()


def test_the_check_sees_what_a_terminal_would_obey() -> None:
    """The positive control: unspelled, every piece of D34 is found."""
    assert len(CONTROLS.findall(D34)) > 8
    file = io.StringIO()
    Console(file=file, color_system=None, force_terminal=True).out(D34, highlight=False)
    assert CONTROLS.search(file.getvalue())


@pytest.mark.parametrize("terminal", [False, True])
@given(cuts=st.lists(st.integers(0, len(D34)), max_size=6), stream=st.sampled_from(["stdout", "stderr"]))
def test_no_sequence_is_obeyed_however_it_is_cut(terminal: bool, cuts: list[int], stream: str) -> None:
    places = [0, *sorted(cuts), len(D34)]
    pieces = [(stream, D34[a:b]) for a, b in itertools.pairwise(places)]
    assert not CONTROLS.search(printed(*pieces, width=400, terminal=terminal))
    assert printed(*pieces, width=400) == printed((stream, D34), width=400)


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY.keys())
def test_nothing_that_a_terminal_obeys_is_left_when_it_comes_by_the_character(text: str) -> None:
    assert not CONTROLS.search(printed(*(("stdout", character) for character in text)))


@given(
    pieces=st.lists(
        st.tuples(st.sampled_from(["stdout", "stderr"]), st.text(st.characters() | st.sampled_from("\n\r\t|世"))),
        max_size=6,
    ),
    width=st.integers(30, 100),
)
def test_every_line_on_the_screen_is_marked_and_none_is_wrapped_by_the_terminal(
    pieces: list[tuple[str, str]], width: int
) -> None:
    shown = printed(*pieces, width=width)
    assert all(line.startswith(("  |", "  !")) for line in shown.split("\n")[:-1])
    assert all(cell_len(line) <= width for line in shown.split("\n"))
    assert shown == "" or shown.endswith("\n")


def test_streams_do_not_share_a_line_and_pieces_of_one_line_do() -> None:
    shown = printed(("stdout", "a"), ("stdout", "b\nc"), ("stderr", "e"), ("stdout", "\n"), ("stdout", "d"))
    assert shown.splitlines() == ["  | ab", "  | c", "  ! e", "  |", "  | d"]


def test_a_tab_is_spaces_to_its_place() -> None:
    assert printed(("stdout", "a\tb")) == "  | a   b\n"


# --- the whole --------------------------------------------------------------------------------------------------------


def watched(*events: PhaseEvent | ProgressEvent | OutputEvent, terminal: bool = False) -> tuple[str, str]:
    """-> what was written to stdout and to stderr."""
    out, errors = io.StringIO(), io.StringIO()
    consoles = [
        Console(file=file, width=60, color_system=None, force_terminal=terminal, markup=False) for file in (out, errors)
    ]
    with Live("run_1", out=consoles[0], errors=consoles[1]) as live:
        for event in events:
            live.show(event)
    return out.getvalue(), errors.getvalue()


def step(n: int, state: str, name: str = "build") -> ProgressEvent:
    return ProgressEvent(id="1.1", stage="step", step=n, steps=2, name=name, state=state)


def said(n: int, text: str) -> OutputEvent:
    return OutputEvent(id="1.1", step=n, stream="stdout", text=text)


def test_a_step_without_output_is_one_line_and_one_with_output_has_its_end_below() -> None:
    out, _ = watched(step(1, "started"), step(1, "passed"), step(2, "started"), said(2, "x"), step(2, "failed"))
    assert out.splitlines() == ["step 1/2  build  passed", "step 2/2  build", "  | x", "  failed"]


def test_the_name_of_a_step_stays_on_its_line_and_is_harmless() -> None:
    out, _ = watched(step(1, "started", name=f"{D34}\nstep 2/2  forged  passed " + "long " * 40), step(1, "passed"))
    assert not CONTROLS.search(out)
    assert len(out.splitlines()) == 1
    assert out.startswith("step 1/2  \\x1b[2J")


def test_output_whose_beginning_was_not_seen_is_under_its_step() -> None:
    out, _ = watched(said(3, "x\n"), said(4, "y"))
    assert out.splitlines() == ["step 3", "  | x", "step 4", "  | y"]


def test_what_goes_on_before_and_after_the_steps_is_said_once_each() -> None:
    phases = [PhaseEvent(id="1.0", phase="queued", queue_position=place) for place in (2, 2, 1)]
    boundary = ProgressEvent(id="2.1", stage="boundary", state="started", text="gvisor")
    _, errors = watched(*phases, boundary, PhaseEvent(id="3.0", phase="a phase of a later version"))
    assert [line.removeprefix("run_1: ") for line in errors.splitlines()] == [
        "waiting for a worker, 2 in the queue", "waiting for a worker, 1 in the queue", "building the wall: gvisor",
        "a phase of a later version",
    ]  # fmt: skip


def test_why_a_run_waits_is_said_when_it_is_known() -> None:
    phase = PhaseEvent(id="1.0", phase="queued", queue_position=2, message="no worker")
    _, errors = watched(phase, PhaseEvent(id="2.0", phase="running", message="of no phase but that"))
    assert [line.removeprefix("run_1: ") for line in errors.splitlines()] == [
        "waiting for a worker, 2 in the queue: no worker", "playing the scenario",
    ]  # fmt: skip


def test_on_a_terminal_the_spinner_is_gone_before_a_step_begins() -> None:
    out, errors = watched(
        PhaseEvent(id="1.0", phase="provisioning"), step(1, "started"), said(1, "x"), terminal=True
    )  # fmt: skip
    assert "building the wall" in errors
    assert errors.endswith(("\x1b[?25h", "\x1b[2K", "\x1b[1A\x1b[2K"))
    assert out == "step 1/2  build\n  | x\n"


def test_a_connection_that_is_lost_is_said() -> None:
    errors = io.StringIO()
    console = Console(file=errors, width=100, color_system=None, markup=False)
    with Live("run_1", out=console, errors=console) as live:
        live.lost(Unreachable("http://127.0.0.1:1 does not answer: reset"))
    assert errors.getvalue() == "http://127.0.0.1:1 does not answer: reset; trying again\n"
