"""`blastdoor tenants` and `blastdoor services`: who may ask, and for how much. They need an operator's key; a service
key may use `tenants` for those that it created."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from service.cli.client import Document
from service.cli.connection import AsJson, Key, State, Url, connected, is_asked_itself
from service.cli.printing import bytes_text, make_console, print_fields, print_json, print_line, print_table, quoted
from service.core.quantities import parse_size

tenants = typer.Typer(rich_markup_mode="rich")
keys = typer.Typer(help="A tenant's keys.", rich_markup_mode="rich", no_args_is_help=True)
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
def list_tenants(
    context: typer.Context, url: Url = None, key: Key = None, state: State = None, as_json: AsJson = False
) -> None:
    """Tenants: whose code is run, and how far it is trusted. Without a command: list them.

    [bold]Examples[/bold]

      blastdoor tenants

      blastdoor tenants add acme --concurrent 4 --ceiling memory=512MiB

      blastdoor tenants keys add acme
    """
    if is_asked_itself(context):
        _list(context, url=url, key=key, state=state, as_json=as_json)


@tenants.command("list")
def list_(
    context: typer.Context, url: Url = None, key: Key = None, state: State = None, as_json: AsJson = False
) -> None:
    """All tenants."""
    _list(context, url=url, key=key, state=state, as_json=as_json)


def _list(context: typer.Context, *, url: Url, key: Key, state: State, as_json: bool) -> None:
    with connected(context, "admin", url=url, key=key, state=state, as_json=as_json) as client:
        found = client.list_tenants()
    if as_json:
        print_json(found)
        return
    print_table(
        make_console(),
        ("tenant", "trust", "at once", "queued", "nodes"),
        map(_tenant_row, found["items"]),
        wide="tenant",
    )


@tenants.command()
def add(
    context: typer.Context,
    name: Name,
    trusted: Annotated[bool, typer.Option("--trusted", help="Its code is trusted; the default is not to.")] = False,
    affinity: Affinity = None,
    concurrent: Concurrent = None,
    queued: Queued = None,
    storage: Storage = None,
    ceiling: Ceiling = None,
    url: Url = None,
    key: Key = None,
    state: State = None,
    as_json: AsJson = False,
) -> None:
    """Add a tenant and print its first key, which is shown only now."""
    asked = {"name": name, "trust": "trusted" if trusted else "untrusted"}
    asked |= _changes(affinity=affinity, concurrent=concurrent, queued=queued, storage=storage, ceiling=ceiling)
    with connected(context, "admin", url=url, key=key, state=state, as_json=as_json) as client:
        made = client.create_tenant(asked)
    if as_json:
        print_json(made)
        return
    _print_tenant(made["tenant"])
    _print_key(made["key"])


@tenants.command()
def show(
    context: typer.Context, name: Name, url: Url = None, key: Key = None, state: State = None, as_json: AsJson = False
) -> None:
    """One tenant: trust, quota, ceilings."""
    with connected(context, "admin", url=url, key=key, state=state, as_json=as_json) as client:
        found = client.get_tenant(name)
    if as_json:
        print_json(found)
    else:
        _print_tenant(found)


@tenants.command()
def update(
    context: typer.Context,
    name: Name,
    trust: Annotated[str | None, typer.Option("--trust", help="trusted or untrusted")] = None,
    affinity: Affinity = None,
    concurrent: Concurrent = None,
    queued: Queued = None,
    storage: Storage = None,
    ceiling: Ceiling = None,
    url: Url = None,
    key: Key = None,
    state: State = None,
    as_json: AsJson = False,
) -> None:
    """Change a tenant; what is not named stays as it is."""
    changes = _changes(affinity=affinity, concurrent=concurrent, queued=queued, storage=storage, ceiling=ceiling)
    if trust is not None:
        changes["trust"] = trust
    if not changes:
        raise typer.BadParameter("name something to change, such as --concurrent 4")
    with connected(context, "admin", url=url, key=key, state=state, as_json=as_json) as client:
        changed = client.update_tenant(name, changes)
    if as_json:
        print_json(changed)
    else:
        _print_tenant(changed)


@tenants.command()
def delete(
    context: typer.Context,
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    url: Url = None,
    key: Key = None,
    state: State = None,
    as_json: AsJson = False,
) -> None:
    """Delete a tenant: its runs are cancelled, its keys revoked. Its name stays taken."""
    if not yes:
        typer.confirm(f"Delete tenant {name}, cancel its runs and revoke its keys?", abort=True, err=True)
    with connected(context, "admin", url=url, key=key, state=state, as_json=as_json) as client:
        client.delete_tenant(name)
    if as_json:
        print_json({"deleted": name})
    else:
        print_line(make_console(), "deleted ", quoted(name))


@keys.command("add")
def add_key(
    context: typer.Context, name: Name, url: Url = None, key: Key = None, state: State = None, as_json: AsJson = False
) -> None:
    """One more key for a tenant, shown only now."""
    with connected(context, "admin", url=url, key=key, state=state, as_json=as_json) as client:
        made = client.create_key(name)
    if as_json:
        print_json(made)
        return
    print_fields(make_console(), [("id", made["id"])])
    _print_key(made["key"])


@keys.command("revoke")
def revoke_key(
    context: typer.Context,
    name: Name,
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The key's id, key_...")],
    url: Url = None,
    key: Key = None,
    state: State = None,
    as_json: AsJson = False,
) -> None:
    """Revoke a key; it stops working at once."""
    with connected(context, "admin", url=url, key=key, state=state, as_json=as_json) as client:
        client.revoke_key(name, key_id)
    if as_json:
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
def add_service(
    context: typer.Context, name: Name, url: Url = None, key: Key = None, state: State = None, as_json: AsJson = False
) -> None:
    """Add a service and print its key, which is shown only now. The key creates tenants and acts for those."""
    with connected(context, "admin", url=url, key=key, state=state, as_json=as_json) as client:
        made = client.create_service(name)
    if as_json:
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
