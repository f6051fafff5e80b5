"""Text from guests reaches a terminal as letters only: D34 of the corpus, and what else terminals obey."""

import io
import json
import sys
import unicodedata

import pytest
from rich.console import Console

from service.cli.printing import (
    age_text,
    bytes_text,
    make_console,
    outcome_text,
    print_fields,
    print_json,
    print_line,
    print_table,
    quoted,
    seconds_text,
    visible,
)

NASTY = {
    "colour": "\x1b[31mred\x1b[0m",
    "cursor up and erase": "ok\x1b[1A\x1b[2K",
    "window title": "\x1b]0;owned\x07",
    "clipboard, OSC 52": "\x1b]52;c;cm0gLXJmIH4=\x07",
    "hyperlink, OSC 8": "\x1b]8;;https://evil.example\x1b\\click\x1b]8;;\x1b\\",
    "device control": "\x1bP+q544e\x1b\\",
    "answer back": "\x05",
    "bell": "\x07",
    "backspace": "passed\b\b\b\b\b\bfailed",
    "carriage return": "failed\rpassed",
    "NUL": "a\0b",
    "DEL": "a\x7fb",
    "C1 CSI": "\x9b31mred",
    "C1 OSC": "\x9d0;owned\x9c",
    "NEL": "one\x85two",
    "bidi override": "\u202egnp.exe",
    "bidi isolates": "\u2066x\u2069\u2067y\u2068z",
    "bidi marks": "\u200e\u200f\u061c",
    "zero width": "pass\u200bed\u200c\u200d\u2060\ufeff",
    "line separators": "one\u2028two\u2029three",
    "tag characters": "\U000e0041\U000e007f",
    "lone surrogate": "\ud800",
    "private use": "\ue000\U000f0000",
    "unassigned": "\u0378\U0001ffff",
    "interlinear annotation": "\ufff9\ufffb",
}


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY.keys())
def test_nothing_that_a_terminal_obeys_is_left(text: str) -> None:
    shown = visible(text)
    assert shown != text
    assert all(unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") for c in shown)
    assert "\\" in shown


def test_what_was_replaced_is_shown() -> None:
    assert visible("\x1b]0;x\x07") == r"\x1b]0;x\x07"
    assert visible("\u202e") == r"\u202e"
    assert visible("\U000e0041") == r"\U000e0041"
    assert visible("failed\rpassed") == r"failed\rpassed"


def test_letters_of_every_script_stay_as_they_are() -> None:
    text = "Grüße, 世界, мир, שלום, e\u0301, 🎉 ~ €"
    assert visible(text) == text


def test_newlines_and_tabs_are_kept_where_lines_may_begin_and_shown_where_they_may_not() -> None:
    assert visible("a\n\tb") == "a\n\tb"
    assert visible("a\n\tb", one_line=True) == r"a\n\tb"


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY.keys())
def test_json_is_one_line_of_printable_ascii(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"text": text})
    line = capsys.readouterr().out
    assert line.endswith("\n")
    assert all(" " <= c <= "~" for c in line[:-1])
    assert json.loads(line) == {"text": text}


def test_the_markup_links_and_emoji_codes_of_rich_are_only_text() -> None:
    shown = _printed(lambda console: print_line(console, quoted("[bold red]x[/] [link=http://evil]y[/link] :smile:")))
    assert shown == "[bold red]x[/] [link=http://evil]y[/link] :smile:\n"


def test_a_cell_of_a_table_cannot_leave_its_line() -> None:
    shown = _printed(lambda console: print_table(console, ("name",), [("a\nrun_2 passed",)], wide="name"))
    assert r"a\nrun_2 passed" in shown


def test_a_table_fits_eighty_columns_and_loses_nothing() -> None:
    rows = [("run_" + "0" * 32, outcome_text("limit_exceeded"), "15m", "long " * 40 + "世界" * 30)]
    shown = _printed(lambda console: print_table(console, ("run", "outcome", "age", "scenario"), rows, wide="scenario"))
    assert max(map(_columns, shown.splitlines())) <= 80
    assert shown.count("long") == 40
    assert shown.count("世") == 30
    assert "run_" + "0" * 32 in shown


@pytest.mark.parametrize("width", [20, 40, 60])
def test_where_a_table_does_not_fit_each_row_is_a_block_and_nothing_is_lost(width: int) -> None:
    rows = [("run_" + str(n) * 32, outcome_text("limit_exceeded"), "15m", "a scenario") for n in range(2)]
    columns = ("run", "outcome", "age", "scenario")
    shown = _printed(lambda console: print_table(console, columns, rows, wide="scenario"), width=width)
    assert max(map(_columns, shown.splitlines())) <= width
    joined = "".join(shown.split())
    for n in range(2):
        assert joined.count("run_" + str(n) * 32) == 1
    assert joined.count("limit_exceeded") == 2


def test_unknown_fields_are_left_out() -> None:
    shown = _printed(lambda console: print_fields(console, [("name", "x"), ("reason", None), ("why", ""), ("n", 0)]))
    assert [line.split() for line in shown.splitlines()] == [["name", "x"], ["n", "0"]]


def test_nothing_but_text_is_printed_into_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO()
    for name in ("FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "stdout", pipe)
    console = make_console()
    print_line(console, outcome_text("failed"), ("bold", "bold"))
    assert pipe.getvalue() == "failedbold\n"
    assert console.width == 80


def test_an_age_is_in_the_largest_unit_and_the_next() -> None:
    shown = {0.4: "0 s", 59.9: "59 s", 60: "1 min", 185: "3 min 5 s", 7800: "2 h 10 min", 349200: "4 d 1 h"}
    assert {seconds: age_text(seconds) for seconds in shown} == shown
    assert age_text(None) == ""


def test_seconds_and_bytes_are_written_for_people() -> None:
    assert [seconds_text(value) for value in (0.414, 12.0, None)] == ["0.41 s", "12.0 s", ""]
    assert [bytes_text(value) for value in (0, 512, 2048, 3 * 2**20, None)] == [
        "0 B",
        "512 B",
        "2.0 KiB",
        "3.0 MiB",
        "",
    ]


def _printed(act, *, width: int = 80) -> str:  # type: ignore[no-untyped-def]
    pipe = io.StringIO()
    act(Console(file=pipe, width=width, markup=False, emoji=False, highlight=False, color_system=None))
    return pipe.getvalue()


def _columns(line: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line)
