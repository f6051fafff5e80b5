"""`blastdoor run DIR`: upload a directory, watch its scenario being played, say how it went."""

from pathlib import Path
from typing import Annotated

import typer

from service.cli.connection import EXIT_INFRASTRUCTURE, EXIT_NOT_PASSED, EXIT_PASSED, Reach, reaching, warn
from service.cli.live import Live
from service.cli.printing import make_console, print_json, print_line, quoted
from service.cli.report import print_run
from service.client import Client, Document, Problem, ResultEvent, Unreachable


@reaching()
def run(
    reach: Reach,
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="The code to run, with its scenario.yaml; or an archive of it.")
    ],
    scenario: Annotated[
        Path | None, typer.Option("--scenario", metavar="FILE", help="Instead of DIR/scenario.yaml.")
    ] = None,
    controls: Annotated[
        Path | None, typer.Option("--controls", metavar="FILE", help="Instead of DIR/controls.yaml.")
    ] = None,
    metadata: Annotated[
        list[str] | None, typer.Option("--metadata", metavar="NAME=TEXT", help="Kept with the run; may be repeated.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Print the run's id and do not wait.")] = False,
    junit: Annotated[
        Path | None, typer.Option("--junit", metavar="FILE", help="Write the result there as JUnit XML.")
    ] = None,
    artifacts: Annotated[
        Path | None, typer.Option("--artifacts", metavar="DIR", help="Save what it left in this new directory.")
    ] = None,
) -> None:
    """Run a directory's scenario behind a wall of its own, and watch it.

    Exit code 0: passed. 1: failed, timed out, hit a limit, was cancelled.
    2: refused. 3: infrastructure failed. Ctrl-C cancels the run; a second
    one leaves without waiting for that.

    [bold]Examples[/bold]

      blastdoor run examples/scenarios/rule-engine

      blastdoor run . --junit report.xml --artifacts out

      blastdoor run . --scenario tests/smoke.yaml --json | jq .outcome
    """
    pairs = dict(_pair(text) for text in metadata or [])
    _insist_on_room(detach=detach, junit=junit, artifacts=artifacts)
    with reach.client("tenant") as client:
        submitted = client.submit(directory, scenario=scenario, controls=controls, metadata=pairs)
        if detach:
            _print_submitted(submitted, as_json=reach.as_json)
            raise typer.Exit(EXIT_PASSED)
        finished = _follow(client, submitted, quiet=reach.as_json)
        if junit is not None:
            junit.write_text(client.junit(finished["id"]), encoding="utf-8")
        if artifacts is not None:
            client.save_artifacts(finished, artifacts)
        if reach.as_json:
            print_json(finished)
    raise typer.Exit(exit_code(finished))


def exit_code(run: Document) -> int:
    """What the outcome means for a script."""
    outcomes = {"passed": EXIT_PASSED, "errored": EXIT_INFRASTRUCTURE}
    return outcomes.get(str(run["outcome"]), EXIT_NOT_PASSED)


def follow(client: Client, run_id: str, live: Live) -> Document:
    """Show what happens until the run is finished. -> the run."""
    for event in client.stream(run_id, on_lost=live.lost):
        if isinstance(event, ResultEvent):
            return event.run
        live.show(event)
    raise AssertionError("a stream ends with the result or raises")


def _follow(client: Client, submitted: Document, *, quiet: bool) -> Document:
    """An interrupt cancels the run; a second one stops waiting for that."""
    run_id = submitted["id"]
    try:
        if quiet:
            return client.wait(run_id)
        out = make_console()
        with Live(run_id, out=out, errors=make_console(stderr=True)) as live:
            live.phase(submitted["phase"], submitted["queue_position"])
            finished = follow(client, run_id, live)
        out.print()
        print_run(out, finished, tails=live.omitted)
    except KeyboardInterrupt:
        return _cancel(client, run_id, quiet=quiet)
    except (Problem, Unreachable):
        warn(f"{run_id} was accepted and goes on; see it with: blastdoor runs show {run_id}")
        raise
    return finished


def _cancel(client: Client, run_id: str, *, quiet: bool) -> Document:
    warn(f"cancelling {run_id}")
    try:
        client.cancel(run_id)
        finished = client.wait(run_id)
    except KeyboardInterrupt:
        warn(f"not waited for; how it ended says: blastdoor runs show {run_id}")
        raise typer.Exit(EXIT_NOT_PASSED) from None
    if not quiet:
        print_run(make_console(), finished)
    return finished


def _print_submitted(submitted: Document, *, as_json: bool) -> None:
    if as_json:
        print_json(submitted)
    else:
        print_line(make_console(), quoted(submitted["id"]))


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise typer.BadParameter(f"{text!r} should be NAME=TEXT", param_hint="--metadata")
    return name, value


def _insist_on_room(*, detach: bool, junit: Path | None, artifacts: Path | None) -> None:
    """What could not be written in the end is better said before anything is run."""
    if detach and (junit or artifacts):
        raise typer.BadParameter(
            "there is nothing to save yet; leave out --junit and --artifacts", param_hint="--detach"
        )
    if junit is not None and not junit.parent.is_dir():
        raise typer.BadParameter(f"{junit.parent} is not a directory", param_hint="--junit")
    if artifacts is not None and (artifacts.exists() or artifacts.is_symlink() or not artifacts.parent.is_dir()):
        raise typer.BadParameter(f"{artifacts} should be a new directory in one that exists", param_hint="--artifacts")
