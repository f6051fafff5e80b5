"""`blastdoor runs`: what was run, one run in full, what it printed and left, cancel."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from service.cli.connection import ActingFor, AsJson, Key, State, Url, connected, is_asked_itself
from service.cli.printing import make_console, outcome_text, print_json, print_line, print_table, quoted
from service.cli.report import print_run
from service.cli.saving import save_artifacts, write_output

runs = typer.Typer(rich_markup_mode="rich", invoke_without_command=True)
RunId = Annotated[str, typer.Argument(metavar="RUN", help="The run's id, run_...")]


@runs.callback()
def list_runs(
    context: typer.Context,
    phase: Annotated[str | None, typer.Option("--phase", help="Only runs in this phase, such as queued.")] = None,
    outcome: Annotated[str | None, typer.Option("--outcome", help="Only runs that ended so, such as failed.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=100, help="How many.")] = 20,
    cursor: Annotated[
        str | None, typer.Option("--cursor", help="Where the last page said the next one starts.")
    ] = None,
    url: Url = None,
    key: Key = None,
    state: State = None,
    tenant: ActingFor = None,
    as_json: AsJson = False,
) -> None:
    """List your runs, newest first; show or cancel one; fetch what it printed and left.

    [bold]Examples[/bold]

      blastdoor runs --outcome failed

      blastdoor runs show run_0192f0c1d2e37a4b8c9d0e1f2a3b4c5d

      blastdoor runs cancel run_0192f0c1d2e37a4b8c9d0e1f2a3b4c5d

      blastdoor runs output run_0192f0c1d2e37a4b8c9d0e1f2a3b4c5d 2 --stderr
    """
    if not is_asked_itself(context):
        return
    with connected(context, "tenant", url=url, key=key, state=state, tenant=tenant, as_json=as_json) as client:
        page = client.list_runs(phase=phase, outcome=outcome, limit=limit, cursor=cursor)
    if as_json:
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
def show(
    context: typer.Context,
    run: RunId,
    url: Url = None,
    key: Key = None,
    state: State = None,
    tenant: ActingFor = None,
    as_json: AsJson = False,
) -> None:
    """One run: its steps, the end of what failing steps printed, and the wall it ran in."""
    with connected(context, "tenant", url=url, key=key, state=state, tenant=tenant, as_json=as_json) as client:
        found = client.get(run)
    if as_json:
        print_json(found)
    else:
        print_run(make_console(), found)


@runs.command()
def cancel(
    context: typer.Context,
    run: RunId,
    url: Url = None,
    key: Key = None,
    state: State = None,
    tenant: ActingFor = None,
    as_json: AsJson = False,
) -> None:
    """Cancel a run in any phase; its worker sees it within two seconds. A finished run is left as it is."""
    with connected(context, "tenant", url=url, key=key, state=state, tenant=tenant, as_json=as_json) as client:
        found = client.cancel(run)
    if as_json:
        print_json(found)
        return
    finished = found["phase"] == "finished"
    words = (" is finished: ", outcome_text(found["outcome"])) if finished else (" is being cancelled",)
    print_line(make_console(), quoted(found["id"]), *words)


@runs.command()
def output(
    context: typer.Context,
    run: RunId,
    step: Annotated[int, typer.Argument(min=1, help="The step's number, from 1.")],
    stderr: Annotated[bool, typer.Option("--stderr", help="What it printed as errors.")] = False,
    url: Url = None,
    key: Key = None,
    state: State = None,
    tenant: ActingFor = None,
) -> None:
    """All that was kept of what a step printed: byte for byte into a pipe or file, made harmless on a terminal."""
    stream = "stderr" if stderr else "stdout"
    with (
        connected(context, "tenant", url=url, key=key, state=state, tenant=tenant, as_json=False) as client,
        client.output(run, step, stream=stream) as pieces,
    ):
        write_output(pieces)


@runs.command()
def artifacts(
    context: typer.Context,
    run: RunId,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new directory to save them in.")] = Path(
        "artifacts"
    ),
    url: Url = None,
    key: Key = None,
    state: State = None,
    tenant: ActingFor = None,
    as_json: AsJson = False,
) -> None:
    """Download a run's artifacts into a new directory; their names are the guest's, and lead nowhere else."""
    with connected(context, "tenant", url=url, key=key, state=state, tenant=tenant, as_json=as_json) as client:
        saved = save_artifacts(client, client.get(run), directory)
    if as_json:
        print_json({"directory": str(directory), "saved": saved})
    else:
        print_line(make_console(), f"{len(saved)} artifacts in ", quoted(directory))


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
