"""`blastdoor admin`: what an operator sees and does. It needs an operator's key."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from service.cli.cleanup import audit, boundaries, cleanup, drain, forget_site, purge
from service.cli.connection import Reach, is_asked_itself, reaching
from service.cli.printing import make_console, outcome_text, print_json, print_line, print_table, quoted
from service.cli.webhooks import print_deliveries

admin = typer.Typer(rich_markup_mode="rich", no_args_is_help=True)
dead_letters = typer.Typer(rich_markup_mode="rich")
admin.add_typer(dead_letters, name="dead-letters")
for command in (boundaries, cleanup, drain, forget_site, purge, audit):
    admin.command()(command)


@admin.callback()
def _admin() -> None:
    """For operators: workers, what stands on the sites, any tenant's run, deliveries that were given up.

    [bold]Examples[/bold]

      blastdoor admin workers

      blastdoor admin kill run_0192f0c1d2e37a4b8c9d0e1f2a3b4c5d

      blastdoor admin cleanup --orphans

      blastdoor admin dead-letters
    """


@admin.command()
@reaching(for_a_tenant=False)
def workers(reach: Reach) -> None:
    """The workers that are alive, and the walls that each can build.

    [bold]Example[/bold]

      blastdoor admin workers --json
    """
    with reach.client("admin") as client:
        found = client.admin.workers()
    if reach.as_json:
        print_json(found)
        return
    console = make_console()
    if not found["items"]:
        print_line(console, "no worker is alive")
        return
    columns = ("worker", "site", "state", "plays", "walls")
    print_table(console, columns, map(_worker_row, found["items"]), wide="walls")


@admin.command()
@reaching(for_a_tenant=False)
def kill(reach: Reach, run: Annotated[str, typer.Argument(metavar="RUN", help="The run's id, run_...")]) -> None:
    """Cancel any tenant's run, in any phase. A finished run is left as it is.

    [bold]Example[/bold]

      blastdoor admin kill run_0192f0c1d2e37a4b8c9d0e1f2a3b4c5d
    """
    with reach.client("admin") as client:
        found = client.admin.kill(run)
    if reach.as_json:
        print_json(found)
        return
    finished = found["phase"] == "finished"
    words = (" is finished: ", outcome_text(found["outcome"])) if finished else (" is being cancelled",)
    print_line(make_console(), quoted(found["id"]), *words)


@dead_letters.callback(invoke_without_command=True)
@reaching(for_a_tenant=False)
def list_dead_letters(reach: Reach) -> None:
    """Deliveries that were given up after the last attempt. Without a command: list them.

    [bold]Examples[/bold]

      blastdoor admin dead-letters

      blastdoor admin dead-letters replay ID
    """
    if is_asked_itself(reach.context):
        _list(reach)


@dead_letters.command("list")
@reaching(for_a_tenant=False)
def list_(
    reach: Reach,
    limit: Annotated[int, typer.Option("--limit", min=1, max=100, help="How many.")] = 20,
    cursor: Annotated[
        str | None, typer.Option("--cursor", help="Where the last page said the next one starts.")
    ] = None,
) -> None:
    """All of them.

    [bold]Example[/bold]

      blastdoor admin dead-letters list --limit 5
    """
    _list(reach, limit=limit, cursor=cursor)


@dead_letters.command()
@reaching(for_a_tenant=False)
def replay(reach: Reach, letter: Annotated[str, typer.Argument(metavar="ID", help="Its id.")]) -> None:
    """Start the deliveries of one again, from the first attempt.

    [bold]Example[/bold]

      blastdoor admin dead-letters replay ID
    """
    with reach.client("admin") as client:
        replayed = client.admin.replay_dead_letter(letter)
    if reach.as_json:
        print_json(replayed)
    else:
        print_line(make_console(), "it is being delivered again: ", quoted(letter))


def _list(reach: Reach, *, limit: int | None = None, cursor: str | None = None) -> None:
    with reach.client("admin") as client:
        page = client.admin.dead_letters(limit=limit, cursor=cursor)
    if reach.as_json:
        print_json(page)
    else:
        print_deliveries(page)


def _worker_row(worker: Mapping[str, Any]) -> tuple[object, ...]:
    walls = [each["boundary"] for each in worker["capabilities"] if each["available"]]
    state, playing = worker.get("state", ""), worker.get("playing", "")
    return worker["id"], worker["site"], state, playing, ", ".join(map(str, walls)) or "none"
