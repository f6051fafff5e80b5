"""`blastdoor up`: everything on one machine, in the foreground. The one place in `service` that starts processes."""

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_PORT = 8700


def up(
    state: Annotated[
        Path | None,
        typer.Option(
            "--state", metavar="DIR", help="Where it keeps its state; default: blastdoor in the XDG state home."
        ),
    ] = None,
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Of the API; 0 picks a free one.")
    ] = DEFAULT_PORT,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON when ready, and nothing else.")
    ] = False,
) -> None:
    """Run everything on this machine, in the foreground, until Ctrl-C.

    API, worker, relay, reaper, a Redis of its own and an SQLite database
    in one state directory, all on loopback. It prints the address and a
    tenant's key; the other commands find both by themselves. It needs root:
    sandboxes are built from namespaces, mounts and cgroups. Other settings:
    BLASTDOOR_... in the environment.

    [bold]Examples[/bold]

      sudo blastdoor up

      sudo blastdoor up --state /srv/blastdoor --port 9000

      sudo blastdoor up --json | head -1 | jq -r .tenant_key
    """
    from service.cli.up.command import run_everything  # the other commands need no database, and start without it

    run_everything(state=state, port=port, as_json=as_json)
