"""`blastdoor runs`: what was run, one run in full, what it prints, printed and left, cancel, delete."""

import base64
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from service.cli.connection import Reach, is_asked_itself, reaching
from service.cli.live import GuestLines, Live
from service.cli.printing import (
    make_console,
    outcome_text,
    print_json,
    print_line,
    print_table,
    quoted,
    write_bytes,
)
from service.cli.report import print_run
from service.cli.run import follow as follow_run
from service.client import Client, Document, NotFound, ResultEvent
from service.core.run import Outcome, Phase

runs = typer.Typer(rich_markup_mode="rich", invoke_without_command=True)
RunId = Annotated[str, typer.Argument(metavar="RUN", help="The run's id, run_...")]


@runs.callback()
@reaching()
def list_runs(
    reach: Reach,
    phase: Annotated[Phase | None, typer.Option("--phase", help="Only runs in this phase.")] = None,
    outcome: Annotated[Outcome | None, typer.Option("--outcome", help="Only runs that ended so.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=100, help="How many.")] = 20,
    cursor: Annotated[
        str | None, typer.Option("--cursor", help="Where the last page said the next one starts.")
    ] = None,
) -> None:
    """List your runs, newest first; show, follow or cancel one; fetch what it printed and left.

    [bold]Examples[/bold]

      blastdoor runs --outcome failed

      blastdoor runs show run_0192f0c1d2e37a4b8c9d0e1f2a3b4c5d

      blastdoor runs logs run_0192f0c1d2e37a4b8c9d0e1f2a3b4c5d --follow
    """
    if not is_asked_itself(reach.context):
        return
    with reach.client("tenant") as client:
        page = client.page(phase=phase and phase.value, outcome=outcome and outcome.value, limit=limit, cursor=cursor)
    if reach.as_json:
        print_json(page)
        return
    console = make_console()
    if not page["items"]:
        print_line(console, "no runs")
        return
    print_table(console, ("run", "outcome", "age", "scenario"), map(_row, page["items"]), wide="scenario")
    if page["next_cursor"]:
        print_line(console, "there are more: --cursor ", quoted(page["next_cursor"]))


@runs.command()
@reaching()
def show(reach: Reach, run: RunId) -> None:
    """One run: its steps, the end of what failing steps printed, and the wall it ran in.

    [bold]Example[/bold]

      blastdoor runs show run_0192f0c1d2e37a4b8c9d0e1f2a3b4c5d
    """
    with reach.client("tenant") as client:
        found = client.get(run)
    if reach.as_json:
        print_json(found)
    else:
        print_run(make_console(), found)


@runs.command()
@reaching()
def logs(
    reach: Reach,
    run: RunId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run is finished.")] = False,
) -> None:
    """What a run's steps printed, step by step; of one that goes on, what there is so far.

    With --json one line for each event: an object with its kind and fields.

    [bold]Examples[/bold]

      blastdoor runs logs run_0192f0c1d2e37a4b8c9d0e1f2a3b4c5d

      blastdoor runs logs run_0192f0c1d2e37a4b8c9d0e1f2a3b4c5d --follow
    """
    with reach.client("tenant") as client:
        if reach.as_json:
            for event in client.stream(run) if follow else client.events_so_far(run):
                print_json({"event": type(event).__name__.removesuffix("Event").lower(), **vars(event)})
            return
        found = client.get(run)
        if found["phase"] == "finished":
            _print_stored(client, found)
            return
        with Live(run, out=make_console(), errors=make_console(stderr=True)) as live:
            if follow:
                found = follow_run(client, run, live)
            else:
                for event in client.events_so_far(run):
                    live.show(event)
                    found = event.run if isinstance(event, ResultEvent) else found
        if found["phase"] == "finished":
            print_line(make_console(), outcome_text(found["outcome"]), "  ", quoted(_why(found)))


@runs.command()
@reaching()
def cancel(reach: Reach, run: RunId) -> None:
    """Cancel a run in any phase; its worker sees it within two seconds. A finished run is left as it is.

    [bold]Example[/bold]

      blastdoor runs cancel run_0192f0c1d2e37a4b8c9d0e1f2a3b4c5d
    """
    with reach.client("tenant") as client:
        found = client.cancel(run)
    if reach.as_json:
        print_json(found)
        return
    finished = found["phase"] == "finished"
    words = (" is finished: ", outcome_text(found["outcome"])) if finished else (" is being cancelled",)
    print_line(make_console(), quoted(found["id"]), *words)


@runs.command()
@reaching()
def delete(reach: Reach, run: RunId) -> None:
    """Delete a finished run: its record, its output, its artifacts.

    [bold]Example[/bold]

      blastdoor runs delete run_0192f0c1d2e37a4b8c9d0e1f2a3b4c5d
    """
    with reach.client("tenant") as client:
        client.delete(run)
    if reach.as_json:
        print_json({"deleted": run})
    else:
        print_line(make_console(), "deleted ", quoted(run))


@runs.command()
@reaching()
def output(
    reach: Reach,
    run: RunId,
    step: Annotated[int, typer.Argument(min=1, help="The step's number, from 1.")],
    stderr: Annotated[bool, typer.Option("--stderr", help="What it printed as errors.")] = False,
) -> None:
    """All that was kept of what a step printed: byte for byte into a pipe or file, made harmless on a terminal.

    [bold]Example[/bold]

      blastdoor runs output run_0192f0c1d2e37a4b8c9d0e1f2a3b4c5d 2 --stderr > errors
    """
    with reach.client("tenant") as client, client.open_output(run, step, "stderr" if stderr else "stdout") as pieces:
        if reach.as_json:
            print_json({"run": run, "step": step, "base64": base64.b64encode(b"".join(pieces)).decode()})
        else:
            write_bytes(pieces)


@runs.command()
@reaching()
def artifacts(
    reach: Reach,
    run: RunId,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new directory to save them in.")] = Path(
        "artifacts"
    ),
) -> None:
    """Download a run's artifacts into a new directory; their names are the guest's, and lead nowhere else.

    [bold]Example[/bold]

      blastdoor runs artifacts run_0192f0c1d2e37a4b8c9d0e1f2a3b4c5d ./out
    """
    with reach.client("tenant") as client:
        saved = client.save_artifacts(client.get(run), directory)
    if reach.as_json:
        print_json({"directory": str(directory), "saved": saved})
    else:
        print_line(make_console(), f"{len(saved)} artifacts in ", quoted(directory))


@runs.command()
@reaching()
def junit(
    reach: Reach,
    run: RunId,
    file: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where to write it; default: stdout.")
    ] = None,
) -> None:
    """A finished run as JUnit XML: a step is a testcase.

    [bold]Example[/bold]

      blastdoor runs junit run_0192f0c1d2e37a4b8c9d0e1f2a3b4c5d -o report.xml
    """
    with reach.client("tenant") as client:
        report = client.junit(run)
        if file is not None:
            file.write_text(report, encoding="utf-8")
    if reach.as_json:
        print_json({"run": run, "file": str(file) if file else None, "junit": None if file else report})
    elif file is None:
        write_bytes([report.encode()])


def _print_stored(client: Client, run: Document) -> None:
    """What was kept of each step's output, in full; the end of it where it is no longer stored."""
    console = make_console()
    for step in run["steps"]:
        lines = GuestLines(console)
        print_line(console, (f"step {step['n']}  ", "bold"), quoted(step["name"]), "  ", outcome_text(step["outcome"]))
        for stream in ("stdout", "stderr"):
            if step[stream]["bytes"]:
                lines.write(stream, _stored(client, run, step, stream))
                lines.end_line()


def _stored(client: Client, run: Document, step: Document, stream: Any) -> str:
    try:
        return client.output(run["id"], step["n"], stream).decode("utf-8", "replace")
    except NotFound:
        return str(step[stream]["text"])


def _why(run: Document) -> str:
    return ": ".join(str(part) for part in (run["reason"], run["message"]) if part)


def _row(run: Mapping[str, Any]) -> tuple[object, ...]:
    return run["id"], outcome_text(run["outcome"] or run["phase"]), _age(run["created_at"]), run["scenario"]["name"]


def _age(created_at: str, *, now: datetime | None = None) -> str:
    """How long ago, in the largest unit that is at least one."""
    try:
        seconds = int(((now or datetime.now(UTC)) - datetime.fromisoformat(created_at)).total_seconds())
    except ValueError:
        return ""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{max(seconds, 0)}s"
