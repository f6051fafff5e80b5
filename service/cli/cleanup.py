"""`blastdoor admin boundaries, cleanup, drain, forget-site, purge, audit`: what stands on the sites, and what to do."""

import sys
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Annotated, Any

import typer
import typer.main

from service.cli.connection import EXIT_INFRASTRUCTURE, EXIT_NOT_PASSED, Reach, reaching
from service.cli.printing import age_text, make_console, print_json, print_line, print_table, quoted
from service.core.quantities import parse_duration

_OF_HOSTS = "blastdoor.commands"
_LOCAL = "cleanup-local"


def _age(text: str | None) -> float | None:
    """`30m` -> seconds."""
    if text is None:
        return None
    try:
        return parse_duration(text).total_seconds()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


OlderThan = Annotated[str | None, typer.Option("--older-than", metavar="TIME", help="Such as 90s, 30m or 12h.")]


@reaching(for_a_tenant=False)
def boundaries(reach: Reach) -> None:
    """What stands on the sites: whose it is, how old, and live, orphan, overdue or quarantined.

    What is kept ready for whoever comes has no run yet, and says so under `standby`.

    [bold]Example[/bold]

      blastdoor admin boundaries --json | jq '.items[] | select(.state != "live")'
    """
    with reach.client("admin") as client:
        found = client.admin.boundaries()
    if reach.as_json:
        print_json(found)
        return
    if not found["items"]:
        print_line(make_console(), "nothing stands on any site")
        return
    columns = ["boundary", "kind", "state", "age", "tenant", "run", "site", "standby"]
    rows = [_boundary_row(row) for row in found["items"]]
    if not any(row[-1] for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    print_table(make_console(), columns, rows, wide="tenant")


def _boundary_row(row: Mapping[str, Any]) -> tuple[object, ...]:
    """Under fence 0 there is no run: its id is only part of the boundary's name."""
    kind = f"{row['kind']}/{row['variant']}" if row["variant"] else row["kind"]
    run = row["run"] if row["fence"] else ""
    standby = str(row["standby"] or "").replace("_", " ")
    return row["name"], kind, row["state"], age_text(row["age_s"]), row["tenant"] or "", run, row["site"], standby


@reaching(for_a_tenant=False)
def cleanup(
    reach: Reach,
    tenant: Annotated[str | None, typer.Option("--tenant", metavar="NAME", help="Only this tenant's.")] = None,
    run: Annotated[str | None, typer.Option("--run", metavar="ID", help="Only this run's.")] = None,
    boundary: Annotated[str | None, typer.Option("--boundary", metavar="NAME", help="Only this one.")] = None,
    orphans: Annotated[bool, typer.Option("--orphans", help="Only what is not live.")] = False,
    older_than: OlderThan = None,
    force: Annotated[bool, typer.Option("--force", help="Also what is live: its run is cancelled.")] = False,
    apply: Annotated[bool, typer.Option("--apply", help="Do it; without, it is only shown.")] = False,
    plan: Annotated[
        str | None, typer.Option("--plan", metavar="ID", help="Apply what was shown under this id.")
    ] = None,
    local: Annotated[bool, typer.Option("--local", help="On this host, by its labels, while the API is down.")] = False,
    installation: Annotated[
        str | None, typer.Option("--installation", metavar="ID", help="With --local, when the database is down, too.")
    ] = None,
) -> None:
    """Destroy boundaries. A dry run, unless --apply; what is shown is then exactly what is done.

    What is said of the scope is combined: --tenant acme --orphans is what acme has that is not live. Ends with 1 when
    something was refused or resists.

    [bold]Examples[/bold]

      blastdoor admin cleanup --orphans

      blastdoor admin cleanup --plan cln_0192f0c1d2e37a4b8c9d0e1f2a3b4c5d --apply

      blastdoor admin cleanup --run run_0192f0c1d2e37a4b8c9d0e1f2a3b4c5d --force --apply
    """
    age = _age(older_than)
    if local:
        said = {
            "--tenant": tenant,
            "--run": run,
            "--boundary": boundary,
            "--older-than": age,
            "--installation": installation,
        }
        arguments = [word for name, value in said.items() if value is not None for word in (name, str(value))]
        flags = {"--orphans": orphans, "--force": force, "--apply": apply, "--json": reach.as_json}
        arguments += [name for name, wanted in flags.items() if wanted]
        arguments += [] if reach.state is None else ["--state", str(reach.state)]
        if plan is not None:
            raise typer.BadParameter("a plan is the API's; --local makes its own", param_hint="--plan")
        raise typer.Exit(_here(arguments))
    scope = {"tenant": tenant, "run": run, "boundary": boundary, "orphans": orphans or None, "older_than_s": age}
    asked = {name: value for name, value in scope.items() if value is not None}
    if (plan is None) is (not asked):
        raise typer.BadParameter("say --plan, or which: --tenant, --run, --boundary, --older-than, --orphans")
    if plan is not None and not apply:
        raise typer.BadParameter("what was shown is applied with --apply", param_hint="--plan")
    with reach.client("admin") as client:
        shown: Mapping[str, Any] = {"id": plan}
        if plan is None:
            shown = client.admin.cleanup(asked, force=force)
        if apply:
            shown = client.admin.cleanup(plan=shown["id"], dry_run=False, force=force)
    _show(shown, as_json=reach.as_json)
    results = [str(line["result"] or "") for line in shown["actions"]]
    if apply and not all(result == "destroyed" for result in results):
        raise typer.Exit(EXIT_NOT_PASSED)


def _show(shown: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(shown)
        return
    console = make_console()
    if not shown["actions"]:
        print_line(console, "nothing is in that scope")
        return
    rows = [(line["ref"]["name"], line["action"], line["result"] or line["why"]) for line in shown["actions"]]
    print_table(
        console,
        ("boundary", "action", "result" if shown["applied"] else "why"),
        rows,
        wide="result" if shown["applied"] else "why",
    )
    if not shown["applied"]:
        print_line(
            console, "a dry run; to do exactly this: blastdoor admin cleanup --apply --plan ", quoted(shown["id"])
        )
    elif shown["done_at"] is None:
        print_line(console, "a site still works at it: ", quoted(shown["id"]))


def _here(arguments: list[str]) -> int:
    """The command for this host comes with the workers, as all that touch it do. -> its exit code."""
    for found in entry_points(group=_OF_HOSTS):
        group = typer.main.get_command(found.load())
        command = getattr(group, "commands", {}).get(_LOCAL)
        if command is not None:
            return int(command.main(arguments, prog_name="blastdoor admin cleanup --local", standalone_mode=False) or 0)
    print("blastdoor: this installation has no workers' part, which --local needs", file=sys.stderr)
    return EXIT_INFRASTRUCTURE


@reaching(for_a_tenant=False)
def drain(reach: Reach, worker: Annotated[str, typer.Argument(metavar="WORKER", help="Its id, wrk_...")]) -> None:
    """Let a worker take nothing more. It finishes what it plays; then `workers` shows it as drained.

    [bold]Example[/bold]

      blastdoor admin drain wrk_0192f0c1d2e37a4b8c9d0e1f2a3b4c5d
    """
    with reach.client("admin") as client:
        found = client.admin.drain(worker)
    if reach.as_json:
        print_json(found)
        return
    print_line(make_console(), quoted(found["id"]), f" is {found['state']}; it plays {found['playing']}")


@reaching(for_a_tenant=False)
def forget_site(
    reach: Reach,
    site: Annotated[str, typer.Argument(metavar="SITE", help="Its name, as `boundaries` shows it.")],
    force: Annotated[bool, typer.Option("--force", help="Though it has answered lately.")] = False,
) -> None:
    """A host that will not come back: what it had counts as gone.

    [bold]Example[/bold]

      blastdoor admin forget-site host-7
    """
    with reach.client("admin") as client:
        client.admin.forget_site(site, force=force)
    if reach.as_json:
        print_json({"forgotten": site})
    else:
        print_line(make_console(), quoted(site), " is forgotten")


@reaching(for_a_tenant=False)
def purge(
    reach: Reach,
    older_than: Annotated[str, typer.Option("--older-than", metavar="TIME", help="Such as 30m or 720h.")],
    apply: Annotated[bool, typer.Option("--apply", help="Do it; without, it is only counted.")] = False,
) -> None:
    """Give up finished runs of that age, with output and artifacts. A dry run, unless --apply.

    [bold]Example[/bold]

      blastdoor admin purge --older-than 720h --apply
    """
    age = _age(older_than)
    assert age is not None
    with reach.client("admin") as client:
        found = client.admin.purge(older_than_s=age, dry_run=not apply)
    if reach.as_json:
        print_json(found)
        return
    counted = f"{found['runs']} runs, {found['blobs']} blobs, {found['events']} events"
    print_line(make_console(), f"given up: {counted}" if apply else f"a dry run; --apply gives up {counted}")


@reaching(for_a_tenant=False)
def audit(
    reach: Reach,
    limit: Annotated[int, typer.Option("--limit", min=1, max=100, help="How many.")] = 20,
    cursor: Annotated[
        str | None, typer.Option("--cursor", help="Where the last page said the next one starts.")
    ] = None,
) -> None:
    """Who did what, and what came of it; newest first.

    [bold]Example[/bold]

      blastdoor admin audit --json | jq '.items[] | select(.result | startswith("refused"))'
    """
    with reach.client("admin") as client:
        page = client.admin.audit(limit=limit, cursor=cursor)
    if reach.as_json:
        print_json(page)
        return
    console = make_console()
    rows = [(row["at"], row["what"], row["target"], row["result"] or "not known", row["who"]) for row in page["items"]]
    print_table(console, ("at", "what", "of", "result", "who"), rows, wide="result")
    if page["next_cursor"]:
        print_line(console, "more: --cursor ", quoted(page["next_cursor"]))
