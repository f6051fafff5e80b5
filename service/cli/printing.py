"""What the commands print. Text that came from a guest or a tenant passes through `visible` on its way to a terminal.

A terminal obeys its input: escape sequences move the cursor over what was printed before, set the title, write the
clipboard; bidirectional controls show a line in another order than it has (CVE-2021-25743, CVE-2021-42574). So nothing
but printable characters, newlines and tabs gets there, and what was replaced is shown. Rich's own markup is never read.
"""

import codecs
import json
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

# Controls, formats (bidi, zero width, tags), surrogates, private use, unassigned, line and paragraph separators.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_NARROWEST = 8
_OUTCOME_STYLE = {"passed": "green", "skipped": "dim", "errored": "bold magenta", "running": "cyan", "queued": "dim"}


def visible(text: object, *, one_line: bool = False) -> str:
    r"""Text as it may stand on a terminal: `\x1b`, `\u202e` and their like are spelled out.

    Newlines and tabs are kept, or spelled out as well where `one_line`.
    """
    kept = "" if one_line else "\n\t"
    return "".join(c if c in kept or not _is_hidden(c) else _spelled(c) for c in str(text))


def _is_hidden(character: str) -> bool:
    return not (" " <= character <= "~") and unicodedata.category(character) in _HIDDEN


def _spelled(character: str) -> str:
    point = ord(character)
    if point < 0x100:
        return {"\n": r"\n", "\r": r"\r", "\t": r"\t"}.get(character, f"\\x{point:02x}")
    return f"\\u{point:04x}" if point < 0x10000 else f"\\U{point:08x}"


def quoted(text: object, style: str = "", *, one_line: bool = True) -> Text:
    """The same as a Rich text: no markup, no emoji codes, no links."""
    return Text(visible(text, one_line=one_line), style=style)


def make_console(*, stderr: bool = False) -> Console:
    """Plain when it is not a terminal: no colour, no spinner, 80 columns unless COLUMNS says otherwise."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=False)


def print_json(document: Any) -> None:
    """One line of ASCII: every control character, also DEL, is an escape of JSON's own."""
    text = json.dumps(document, ensure_ascii=True, separators=(", ", ": ")).replace("\x7f", "\\u007f")
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def print_line(console: Console, *parts: str | Text | tuple[str, str]) -> None:
    """One line of our own words and quoted parts; long ones wrap at spaces."""
    console.print(Text.assemble(*parts))


def print_table(console: Console, columns: Sequence[str], rows: Iterable[Sequence[object]], *, wide: str = "") -> None:
    """A table within the console's width. `wide` names the column that folds when there is not enough room; where even
    that does not help, each row is a block of lines instead, so that nothing is lost."""
    cells = [[cell if isinstance(cell, Text) else quoted(cell) for cell in row] for row in rows]
    if _least_width(columns, cells, wide) > console.width:
        for line in cells:
            print_fields(console, zip(columns, line, strict=True))
            console.print()
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1), header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=column != wide, overflow="fold")
    for line in cells:
        table.add_row(*line)
    _print_trimmed(console, table)


def _least_width(columns: Sequence[str], rows: Sequence[Sequence[Text]], wide: str) -> int:
    """Of the table that has these: columns are two cells and a line apart."""
    widths = [
        _NARROWEST if column == wide else max([len(column), *(row[n].cell_len for row in rows)])
        for n, column in enumerate(columns)
    ]
    return sum(widths) + 3 * (len(widths) - 1)


def print_fields(console: Console, fields: Iterable[tuple[str, object]]) -> None:
    """Names and values, a line each; what is unknown is left out."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, value in fields:
        if value not in (None, "", (), [], {}):
            table.add_row(name, value if isinstance(value, Text) else quoted(value))
    _print_trimmed(console, table)


def _print_trimmed(console: Console, table: Table) -> None:
    """In a file or a pipe, without the spaces that fill a table's last column."""
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as captured:
        console.print(table)
    console.file.write("".join(line.rstrip() + "\n" for line in captured.get().splitlines()))
    console.file.flush()


def write_bytes(pieces: Iterable[bytes]) -> None:
    """To stdout: as they are into a pipe or file; control characters spelled out on a terminal, which would obey."""
    if not sys.stdout.isatty():
        for piece in pieces:
            sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
        return
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for piece in pieces:
        sys.stdout.write(visible(decoder.decode(piece)))
    sys.stdout.write(visible(decoder.decode(b"", final=True)))
    sys.stdout.flush()


def outcome_text(word: object) -> Text:
    """An outcome or a phase in its colour; the word itself says it where there is no colour."""
    return quoted(word, _OUTCOME_STYLE.get(str(word), "red" if word else "dim"))


def seconds_text(value: object) -> str:
    """Seconds as people read them: `0.41 s`, `12.0 s`; empty when unknown."""
    if not isinstance(value, int | float):
        return ""
    return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"


def age_text(value: object) -> str:
    """Seconds as an age, in the largest unit and the next: `41 s`, `3 min 5 s`, `2 h 10 min`, `4 d 1 h`."""
    if not isinstance(value, int | float):
        return ""
    left, parts = int(value), []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if left >= size or unit == "s":
            parts.append((left // size, unit))
        elif parts:
            parts.append((0, unit))
        left %= size
    return " ".join(f"{number} {unit}" for n, (number, unit) in enumerate(parts[:2]) if number or n == 0)


def bytes_text(value: object) -> str:
    if not isinstance(value, int | float):
        return ""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:g} B"
