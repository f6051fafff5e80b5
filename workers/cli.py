"""Commands that touch this host. They join `blastdoor` by entry point, and need neither API nor database."""

import json
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from service.core.boundary import BoundaryKind, Capabilities
from service.core.placement import OFFERS
from workers.registry import DRIVERS, load

commands = typer.Typer(no_args_is_help=True)

StateDir = Annotated[Path, typer.Option("--state", envvar="BLASTDOOR_STATE_DIR", help="Where state lives.")]
RuntimeDir = Annotated[Path, typer.Option(envvar="BLASTDOOR_RUNTIME_DIR", help="Where live boundaries stand.")]
Runsc = Annotated[Path, typer.Option(envvar="BLASTDOOR_RUNSC", help="The gVisor runtime.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document instead of a table.")]


@dataclass(frozen=True)
class ThisHost:
    """A host without an installation: what a probe makes carries a mark that no installation has."""

    state_dir: Path
    runtime_dir: Path
    runsc: Path
    installation: str
    site: str


@commands.command()
def doctor(
    state_dir: StateDir = Path("/var/lib/blastdoor"),
    runtime_dir: RuntimeDir = Path("/run/blastdoor"),
    runsc: Runsc = Path("/usr/bin/runsc"),
    as_json: Json = False,
) -> None:
    """Say which boundaries this host can build, and for each that it cannot, why and how to get it.

    Every line was measured just now: for gVisor a real sandbox was started and asked.

    Examples:  blastdoor doctor    |    blastdoor doctor --json | jq '.boundaries[] | select(.available)'
    """
    host = ThisHost(state_dir, runtime_dir, runsc, installation=f"doctor{os.getpid()}", site=socket.gethostname())
    try:
        rows = [row for kind in DRIVERS for row in load(kind, host).probe()]
    finally:
        with suppress(FileNotFoundError):
            (runtime_dir / host.installation).rmdir()
    measured = {row.boundary for row in rows}
    undriven = [offer for offer in OFFERS if offer.boundary not in measured]
    rows += [
        Capabilities(boundary=offer.boundary, available=False, missing=(_no_driver(offer.kind),)) for offer in undriven
    ]
    if as_json:
        typer.echo(json.dumps({"boundaries": [row.model_dump(mode="json") for row in rows]}))
    else:
        _show(rows)
    raise typer.Exit(0 if any(row.available for row in rows) else 3)


def _no_driver(kind: BoundaryKind) -> str:
    return f"this version has no driver for {kind}"


def _show(rows: list[Capabilities]) -> None:
    promised = {offer.boundary: offer.guarantees for offer in OFFERS}
    grid = Table.grid(padding=(0, 2))
    for row in rows:
        verdict, colour = ("yes", "green") if row.available else ("no", "dim")
        guarantees = row.guarantees or promised[row.boundary]
        notes = [f"kernel {guarantees.kernel}, nodes {guarantees.nodes}, control plane {guarantees.control_plane}"]
        notes += [f"{name} {version}" for name, version in sorted(row.versions.items())]
        notes += [f"advisory: {text}" for text in row.advisories]
        grid.add_row(
            row.boundary, f"[{colour}]{verdict}[/]", escape("\n".join(notes if row.available else row.missing))
        )
    Console().print(grid)
