"""`blastdoor tenants` and `blastdoor services`: who may ask, and for how much. They need an operator's key; a service
key may use `tenants` for those that it created."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from service.cli.connection import Reach, is_asked_itself, reaching
from service.cli.printing import bytes_text, make_console, print_fields, print_json, print_line, print_table, quoted
from service.client import Document
from service.core.quantities import parse_size

tenants = typer.Typer(rich_markup_mode="rich")
keys = typer.Typer(rich_markup_mode="rich", no_args_is_help=True)
services = typer.Typer(rich_markup_mode="rich", no_args_is_help=True)
tenants.add_typer(keys, name="keys")

Name = Annotated[str, typer.Argument(metavar="NAME", help="Lower-case letters, digits and hyphens.")]
Affinity = Annotated[str | None, typer.Option("--affinity", metavar="GROUP", help="Only on this group's nodes.")]
Concurrent = Annotated[int | None, typer.Option("--concurrent", min=1, help="Runs at once.")]
Queued = Annotated[int | None, typer.Option("--queued", min=1, help="Runs waiting.")]
Storage = Annotated[str | None, typer.Option("--storage", metavar="SIZE", help="Of uploads and results, as 1GiB.")]
Ceiling = Annotated[
    list[str] | None,
    typer.Option("--ceiling", metavar="LIMIT=VALUE", help="The most a run may ask for, as memory=512MiB; repeatable."),
]


@tenants.callback(invoke_without_command=True)
@reaching(for_a_tenant=False)
def list_tenants(reach: Reach) -> None:
    """Tenants: whose code is run, and how far it is trusted. Without a command: list them.

    [bold]Examples[/bold]

      blastdoor tenants

      blastdoor tenants add acme --concurrent 4 --ceiling memory=512MiB

      blastdoor tenants keys add acme
    """
    if is_asked_itself(reach.context):
        _list(reach)


@tenants.command("list")
@reaching(for_a_tenant=False)
def list_(reach: Reach) -> None:
    """All tenants.

    [bold]Example[/bold]

      blastdoor tenants list --json
    """
    _list(reach)


def _list(reach: Reach) -> None:
    with reach.client("admin") as client:
        found = client.tenants.list()
    if reach.as_json:
        print_json(found)
        return
    print_table(
        make_console(),
        ("tenant", "trust", "at once", "queued", "nodes"),
        map(_tenant_row, found["items"]),
        wide="tenant",
    )


@tenants.command()
@reaching(for_a_tenant=False)
def add(
    reach: Reach,
    name: Name,
    trusted: Annotated[bool, typer.Option("--trusted", help="Its code is trusted; the default is not to.")] = False,
    affinity: Affinity = None,
    concurrent: Concurrent = None,
    queued: Queued = None,
    storage: Storage = None,
    ceiling: Ceiling = None,
) -> None:
    """Add a tenant and print its first key, which is shown only now.

    [bold]Examples[/bold]

      blastdoor tenants add acme --concurrent 4 --ceiling memory=512MiB

      blastdoor tenants add own-builds --trusted
    """
    asked = {"name": name, "trust": "trusted" if trusted else "untrusted"}
    asked |= _changes(affinity=affinity, concurrent=concurrent, queued=queued, storage=storage, ceiling=ceiling)
    with reach.client("admin") as client:
        made = client.tenants.create(asked)
    if reach.as_json:
        print_json(made)
        return
    _print_tenant(made["tenant"])
    _print_key(made["key"])


@tenants.command()
@reaching(for_a_tenant=False)
def show(reach: Reach, name: Name) -> None:
    """One tenant: trust, quota, ceilings.

    [bold]Example[/bold]

      blastdoor tenants show acme
    """
    with reach.client("admin") as client:
        found = client.tenants.get(name)
    if reach.as_json:
        print_json(found)
    else:
        _print_tenant(found)


@tenants.command()
@reaching(for_a_tenant=False)
def update(
    reach: Reach,
    name: Name,
    trust: Annotated[str | None, typer.Option("--trust", help="trusted or untrusted")] = None,
    affinity: Affinity = None,
    concurrent: Concurrent = None,
    queued: Queued = None,
    storage: Storage = None,
    ceiling: Ceiling = None,
) -> None:
    """Change a tenant; what is not named stays as it is.

    [bold]Example[/bold]

      blastdoor tenants update acme --queued 500 --storage 10GiB
    """
    changes = _changes(affinity=affinity, concurrent=concurrent, queued=queued, storage=storage, ceiling=ceiling)
    if trust is not None:
        changes["trust"] = trust
    if not changes:
        raise typer.BadParameter("name something to change, such as --concurrent 4")
    with reach.client("admin") as client:
        changed = client.tenants.update(name, changes)
    if reach.as_json:
        print_json(changed)
    else:
        _print_tenant(changed)


@tenants.command()
@reaching(for_a_tenant=False)
def delete(
    reach: Reach,
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete a tenant: its runs are cancelled, its keys revoked. Its name stays taken.

    [bold]Example[/bold]

      blastdoor tenants delete acme --yes
    """
    if not yes:
        typer.confirm(f"Delete tenant {name}, cancel its runs and revoke its keys?", abort=True, err=True)
    with reach.client("admin") as client:
        client.tenants.delete(name)
    if reach.as_json:
        print_json({"deleted": name})
    else:
        print_line(make_console(), "deleted ", quoted(name))


@keys.callback()
def _keys() -> None:
    """A tenant's keys.

    [bold]Example[/bold]

      blastdoor tenants keys add acme
    """


@keys.command("add")
@reaching(for_a_tenant=False)
def add_key(reach: Reach, name: Name) -> None:
    """One more key for a tenant, shown only now.

    [bold]Example[/bold]

      blastdoor tenants keys add acme
    """
    with reach.client("admin") as client:
        made = client.tenants.create_key(name)
    if reach.as_json:
        print_json(made)
        return
    print_fields(make_console(), [("id", made["id"])])
    _print_key(made["key"])


@keys.command("revoke")
@reaching(for_a_tenant=False)
def revoke_key(
    reach: Reach,
    name: Name,
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The key's id, key_...")],
) -> None:
    """Revoke a key; it stops working at once.

    [bold]Example[/bold]

      blastdoor tenants keys revoke acme key_0192f0c1d2e37a4b8c9d0e1f2a3b4c5d
    """
    with reach.client("admin") as client:
        client.tenants.revoke_key(name, key_id)
    if reach.as_json:
        print_json({"revoked": key_id})
    else:
        print_line(make_console(), "revoked ", quoted(key_id))


@services.callback()
def _services() -> None:
    """Service keys: for applications that have tenants of their own.

    [bold]Example[/bold]

      blastdoor services add shop
    """


@services.command("add")
@reaching(for_a_tenant=False)
def add_service(reach: Reach, name: Name) -> None:
    """Add a service and print its key, which is shown only now. The key creates tenants and acts for those.

    [bold]Example[/bold]

      blastdoor services add shop --json
    """
    with reach.client("admin") as client:
        made = client.admin.create_service(name)
    if reach.as_json:
        print_json(made)
        return
    print_fields(make_console(), [("id", made["id"]), ("service", name)])
    _print_key(made["key"])


def _changes(
    *, affinity: str | None, concurrent: int | None, queued: int | None, storage: str | None, ceiling: list[str] | None
) -> dict[str, Any]:
    """What was named, in the shape of the request; sizes are judged here so that a typing error is found early."""
    try:
        storage_bytes = parse_size(storage) if storage is not None else None
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--storage") from error
    quota = {"concurrent": concurrent, "queued": queued, "storage_bytes": storage_bytes}
    quota = {name: value for name, value in quota.items() if value is not None}
    limits = dict(_ceiling(text) for text in ceiling or [])
    changes: dict[str, Any] = {"quota": quota, "ceilings": {"limits": limits} if limits else None, "affinity": affinity}
    return {name: value for name, value in changes.items() if value}


def _ceiling(text: str) -> tuple[str, str | float]:
    name, equals, value = text.partition("=")
    if not equals or not value:
        raise typer.BadParameter(f"{text!r} should look like memory=512MiB", param_hint="--ceiling")
    if value.isascii() and value.isdecimal():
        return name, int(value)
    try:
        return name, float(value)
    except ValueError:
        return name, value


def _print_tenant(tenant: Document) -> None:
    print_fields(make_console(), _tenant_fields(tenant))


def _tenant_row(tenant: Mapping[str, Any]) -> tuple[object, ...]:
    quota = tenant["quota"]
    return tenant["name"], tenant["trust"], quota["concurrent"], quota["queued"], tenant["affinity"] or ""


def _tenant_fields(tenant: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    yield "tenant", tenant["name"]
    yield "trust", tenant["trust"]
    yield "nodes", tenant["affinity"]
    quota = tenant["quota"]
    stored = bytes_text(quota["storage_bytes"])
    yield "quota", f"{quota['concurrent']} at once, {quota['queued']} queued, {stored} stored"
    limits = {name: value for name, value in tenant["ceilings"]["limits"].items() if value is not None}
    yield "ceilings", ", ".join(f"{name} {value}" for name, value in limits.items())


def _print_key(key: object) -> None:
    """Alone on its line, so that it can be copied whole."""
    console = make_console()
    print_line(console, "key, shown only this once:")
    console.print(quoted(key, "bold"), soft_wrap=True)
