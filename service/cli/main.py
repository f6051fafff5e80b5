"""The `blastdoor` command. Commands that touch this host join it by entry point, so that `service` never imports
`workers`: the group `blastdoor.commands` names Typer apps, whose commands become commands of this one."""

import io
import sys
from importlib.metadata import entry_points, version
from typing import Annotated

import typer

from service.cli.admin import admin
from service.cli.printing import make_console, print_line, quoted
from service.cli.run import run
from service.cli.runs import runs
from service.cli.tenants import services, tenants
from service.cli.up import up
from service.cli.webhooks import webhooks

GROUP = "blastdoor.commands"
OWN = ("up", "run", "runs", "webhooks", "tenants", "services", "admin")


def make_app() -> typer.Typer:
    app = typer.Typer(
        name="blastdoor",
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,  # its tracebacks show local variables, and keys are among them
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_blastdoor)
    app.command()(up)
    app.command()(run)
    app.add_typer(runs, name="runs")
    app.add_typer(webhooks, name="webhooks")
    app.add_typer(tenants, name="tenants")
    app.add_typer(services, name="services")
    app.add_typer(admin, name="admin")
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        print_line(make_console(), f"blastdoor {version('blastdoor')}")
        raise typer.Exit


def _blastdoor(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Runs code that nobody trusts behind a wall made for that one run.

    [bold]Start here[/bold]

      blastdoor doctor        what walls can this machine build?

      blastdoor up            everything on this machine, in the foreground

      blastdoor run DIR       play a scenario, and see how it went
    """


def join_commands(app: typer.Typer) -> None:
    """Add the commands of other packages. One that cannot be loaded is said, and the rest still work."""
    for found in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        try:
            commands = found.load()
        except (ImportError, AttributeError) as error:
            console = make_console(stderr=True)
            print_line(console, ("blastdoor: ", "bold yellow"), quoted(f"no commands from {found.value}: {error}"))
            continue
        app.add_typer(commands)


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a guest may print what this terminal has no letters for
    app = make_app()
    if sys.argv[1:2] not in [[name] for name in OWN]:  # ours start sooner without loading the others'
        join_commands(app)
    app()


if __name__ == "__main__":
    main()
