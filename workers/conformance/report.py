"""How the results of the cases are told: to a person as a matrix, to a program as one document."""

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from workers.conformance.run import Outcome, Result

_COLOURS = {Outcome.BLOCKED: "green", Outcome.VACUOUS: "yellow", Outcome.FAILED: "bold red"}


def held(results: Sequence[Result]) -> bool:
    """Whether something was shown, and all of it was blocked."""
    return bool(results) and all(result.outcome is Outcome.BLOCKED for result in results)


def summary(results: Sequence[Result]) -> str:
    counts = {outcome: sum(result.outcome is outcome for result in results) for outcome in Outcome}
    return f"{len(results)} cases, " + ", ".join(f"{counts[outcome]} {outcome.lower()}" for outcome in Outcome)


def matrix(results: Sequence[Result]) -> RenderableType:
    """Case by boundary, and below it why what was not blocked was not."""
    boundaries = list(dict.fromkeys(result.boundary for result in results))
    found = {(result.case.id, result.boundary): result for result in results}
    table = Table("case", "", "severity", *boundaries, box=None, padding=(0, 2, 0, 0))
    for case in dict.fromkeys(result.case for result in results):
        row = [found.get((case.id, boundary)) for boundary in boundaries]
        table.add_row(case.id, escape(case.title), case.severity.value, *(_cell(result) for result in row))
    why = [f"{result.case.id} in {result.boundary}: {result.outcome}: {result.why}" for result in results if result.why]
    return Group(table, "", *(escape(line) for line in why), *([""] if why else []), summary(results))


def progress_line(result: Result) -> str:
    return f"{result.case.id:<5} {result.boundary}: {result.outcome}  ({result.seconds:.1f} s)"


def document(results: Sequence[Result], *, not_built: dict[str, list[str]]) -> dict[str, Any]:
    """`not_built`: boundaries that this host cannot build, and why."""
    rows = [
        {
            "id": result.case.id,
            "title": result.case.title,
            "severity": result.case.severity.value,
            "control_opens": result.case.opened,
            "boundary": result.boundary,
            "outcome": result.outcome.lower(),
            "why": result.why,
            "seconds": round(result.seconds, 3),
        }
        for result in results
    ]
    counts = {outcome.lower(): sum(result.outcome is outcome for result in results) for outcome in Outcome}
    return {"cases": rows, "summary": {"cases": len(results)} | counts, "not_built": not_built}


def _cell(result: Result | None) -> str:
    return f"[{_COLOURS[result.outcome]}]{result.outcome}[/]" if result else "-"
