"""`blastdoor run DIR`: upload a directory, wait while its scenario is played, say how it went."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Protocol

import typer

from service.cli.client import Client, Document, Problem, Unreachable
from service.cli.connection import (
    EXIT_INFRASTRUCTURE,
    EXIT_NOT_PASSED,
    EXIT_PASSED,
    ActingFor,
    AsJson,
    Key,
    State,
    Url,
    connected,
)
from service.cli.printing import make_console, print_json, print_line, quoted, visible
from service.cli.report import print_run

_PHASES = {
    "queued": "waiting for a worker",
    "provisioning": "building the wall",
    "running": "playing the scenario",
    "collecting": "collecting what it left",
    "finished": "finished",
}


def run(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The code to run, with its scenario.yaml.")],
    scenario: Annotated[
        Path | None, typer.Option("--scenario", metavar="FILE", help="Instead of DIR/scenario.yaml.")
    ] = None,
    controls: Annotated[
        Path | None, typer.Option("--controls", metavar="FILE", help="Instead of DIR/controls.yaml.")
    ] = None,
    metadata: Annotated[
        list[str] | None, typer.Option("--metadata", metavar="NAME=TEXT", help="Kept with the run; may be repeated.")
    ] = None,
    url: Url = None,
    key: Key = None,
    state: State = None,
    tenant: ActingFor = None,
    as_json: AsJson = False,
) -> None:
    """Run a directory's scenario behind a wall of its own.

    Exit code 0: passed. 1: failed, timed out, hit a limit, was cancelled.
    2: refused. 3: infrastructure failed. Ctrl-C cancels the run.

    [bold]Examples[/bold]

      blastdoor run examples/scenarios/rule-engine

      blastdoor run . --scenario tests/smoke.yaml --json | jq .outcome
    """
    pairs = dict(_pair(text) for text in metadata or [])
    with connected(context, "tenant", url=url, key=key, state=state, tenant=tenant, as_json=as_json) as client:
        submitted = client.submit(directory, scenario=scenario, controls=controls, metadata=pairs)
        finished = _follow(client, submitted, quiet=as_json)
        if as_json:
            print_json(finished)
        else:
            print_run(make_console(), finished)
    raise typer.Exit(exit_code(finished))


def exit_code(run: Document) -> int:
    """What the outcome means for a script."""
    outcomes = {"passed": EXIT_PASSED, "errored": EXIT_INFRASTRUCTURE}
    return outcomes.get(str(run["outcome"]), EXIT_NOT_PASSED)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise typer.BadParameter(f"{text!r} should be NAME=TEXT", param_hint="--metadata")
    return name, value


def _follow(client: Client, submitted: Document, *, quiet: bool) -> Document:
    """Show each phase until the run is finished. An interrupt cancels it; a second one stops waiting for that."""
    run_id, latest = submitted["id"], submitted
    with _progress(quiet=quiet) as show:
        try:
            show(latest)
            for latest in client.watch(run_id):
                show(latest)
        except KeyboardInterrupt:
            _say(f"cancelling {run_id}")
            client.cancel(run_id)
            return client.wait(run_id)
        except (Problem, Unreachable):
            _say(f"{run_id} was accepted and goes on; see it with: blastdoor runs show {run_id}")
            raise
    return latest


class _Show(Protocol):
    def __call__(self, run: Document, /) -> None: ...


@contextmanager
def _progress(*, quiet: bool) -> Iterator[_Show]:
    """On a terminal a spinner that says the phase; elsewhere a line for each new phase. On stderr, both of them."""
    console = make_console(stderr=True)
    if quiet:
        yield lambda run: None
    elif console.is_terminal:
        with console.status("uploaded") as status:
            yield lambda run: status.update(quoted(_words(run)))
    else:
        said: list[str] = []

        def say_new(run: Document) -> None:
            if said[-1:] != [_words(run)]:
                said.append(_words(run))
                print_line(console, visible(said[-1]))

        yield say_new


def _words(run: Document) -> str:
    position = run["queue_position"] if run["phase"] == "queued" else None
    place = f", {position} in the queue" if position is not None else ""
    return f"{run['id']}: {_PHASES.get(run['phase'], run['phase'])}{place}"


def _say(message: str) -> None:
    print_line(make_console(stderr=True), ("blastdoor: ", "bold yellow"), quoted(message))
