"""`blastdoor webhooks`: where events are delivered to, how that went, and once more."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from service.cli.connection import Reach, is_asked_itself, reaching
from service.cli.printing import make_console, print_fields, print_json, print_line, print_table, quoted
from service.client import Client

webhooks = typer.Typer(rich_markup_mode="rich")

WebhookId = Annotated[str, typer.Argument(metavar="WEBHOOK", help="The endpoint's id.")]
OfService = Annotated[
    bool,
    typer.Option("--service", help="The service's own endpoints, which hear of all its tenants (with its key)."),
]


@webhooks.callback(invoke_without_command=True)
@reaching()
def list_webhooks(reach: Reach, service: OfService = False) -> None:
    """Webhooks: where the events of your runs are sent, signed. Without a command: list them.

    [bold]Examples[/bold]

      blastdoor webhooks

      blastdoor webhooks add https://shop.example/hooks/blastdoor

      blastdoor webhooks deliveries WEBHOOK
    """
    if is_asked_itself(reach.context):
        _list(reach, service=service)


@webhooks.command("list")
@reaching()
def list_(reach: Reach, service: OfService = False) -> None:
    """All endpoints.

    [bold]Example[/bold]

      blastdoor webhooks list --json
    """
    _list(reach, service=service)


def _list(reach: Reach, *, service: bool) -> None:
    with _client(reach, service=service) as client:
        found = client.webhooks.list()
    if reach.as_json:
        print_json(found)
        return
    console = make_console()
    if not found["items"]:
        print_line(console, "no webhooks")
        return
    print_table(console, ("webhook", "enabled", "url"), map(_row, found["items"]), wide="url")


@webhooks.command()
@reaching()
def add(
    reach: Reach,
    endpoint: Annotated[str, typer.Argument(metavar="ENDPOINT", help="https, port 443 or 8443, at a public address.")],
    types: Annotated[
        list[str] | None, typer.Option("--type", metavar="TYPE", help="Only these events; may be repeated.")
    ] = None,
    service: OfService = False,
) -> None:
    """Add an endpoint and print the secret that its deliveries are signed with, which is shown only now.

    [bold]Examples[/bold]

      blastdoor webhooks add https://shop.example/hooks/blastdoor

      blastdoor webhooks add https://shop.example/hooks --type dev.blastdoor.run.finished
    """
    with _client(reach, service=service) as client:
        made = client.webhooks.create(endpoint, types or ("*",))
    if reach.as_json:
        print_json(made)
        return
    print_fields(make_console(), _fields(made))
    _print_secret(made["secret"])


@webhooks.command()
@reaching()
def show(reach: Reach, webhook: WebhookId, service: OfService = False) -> None:
    """One endpoint.

    [bold]Example[/bold]

      blastdoor webhooks show WEBHOOK
    """
    with _client(reach, service=service) as client:
        found = client.webhooks.get(webhook)
    if reach.as_json:
        print_json(found)
    else:
        print_fields(make_console(), _fields(found))


@webhooks.command()
@reaching()
def remove(
    reach: Reach,
    webhook: WebhookId,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    service: OfService = False,
) -> None:
    """Remove an endpoint; nothing more is delivered to it.

    [bold]Example[/bold]

      blastdoor webhooks remove WEBHOOK --yes
    """
    if not yes:
        typer.confirm(f"Remove webhook {quoted(webhook)} and its delivery log?", abort=True, err=True)
    with _client(reach, service=service) as client:
        client.webhooks.delete(webhook)
    if reach.as_json:
        print_json({"removed": webhook})
    else:
        print_line(make_console(), "removed ", quoted(webhook))


@webhooks.command()
@reaching()
def rotate(reach: Reach, webhook: WebhookId, service: OfService = False) -> None:
    """Make a new secret, shown only now. For 24 hours deliveries are signed with the old one, too.

    [bold]Example[/bold]

      blastdoor webhooks rotate WEBHOOK
    """
    with _client(reach, service=service) as client:
        rotated = client.webhooks.rotate(webhook)
    if reach.as_json:
        print_json(rotated)
    else:
        _print_secret(rotated["secret"])


@webhooks.command()
@reaching()
def deliveries(
    reach: Reach,
    webhook: WebhookId,
    limit: Annotated[int, typer.Option("--limit", min=1, max=100, help="How many.")] = 20,
    cursor: Annotated[
        str | None, typer.Option("--cursor", help="Where the last page said the next one starts.")
    ] = None,
    service: OfService = False,
) -> None:
    """Every attempt to deliver to an endpoint, newest first, and when the next one is.

    [bold]Example[/bold]

      blastdoor webhooks deliveries WEBHOOK --limit 5
    """
    with _client(reach, service=service) as client:
        page = client.webhooks.deliveries(webhook, limit=limit, cursor=cursor)
    if reach.as_json:
        print_json(page)
    else:
        print_deliveries(page)


@webhooks.command()
@reaching()
def replay(
    reach: Reach,
    webhook: WebhookId,
    delivery: Annotated[str, typer.Argument(metavar="DELIVERY", help="The delivery's id.")],
    service: OfService = False,
) -> None:
    """Deliver an event once more, whatever became of it.

    [bold]Example[/bold]

      blastdoor webhooks replay WEBHOOK DELIVERY
    """
    with _client(reach, service=service) as client:
        replayed = client.webhooks.replay(webhook, delivery)
    if reach.as_json:
        print_json(replayed)
    else:
        print_line(make_console(), "it is being delivered again: ", quoted(delivery))


def print_deliveries(page: Mapping[str, Any]) -> None:
    """A page of attempts, or of those that were given up: `{items, next_cursor}`."""
    console = make_console()
    if not page["items"]:
        print_line(console, "no deliveries")
        return
    for row in page["items"]:
        print_fields(console, _attempt(row))
        console.print()
    if page.get("pending"):
        print_line(console, f"{page['pending']} wait to be delivered")
    if page.get("next_cursor"):
        print_line(console, "there are more: --cursor ", quoted(page["next_cursor"]))


def _attempt(row: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Ids are too long for a table of many columns: a block each."""
    for name in ("id", "webhook_id", "event_id", "type", "tenant", "url"):
        yield name.replace("_", " ").removesuffix(" id") if name != "id" else "delivery", row.get(name)
    at = f" at {row['at']}" if row.get("at") else ""
    if row.get("attempts") is not None:  # of one that was given up
        yield "attempts", f"{row['attempts']}, given up{at}"
    else:
        yield "attempt", f"{row.get('attempt')}{at}"
    yield "status", row.get("status")
    yield "error", row.get("error")
    yield "next", row.get("next_at")


@contextmanager
def _client(reach: Reach, *, service: bool) -> Iterator[Client]:
    if service and reach.tenant:
        raise typer.BadParameter("the endpoints are a tenant's or the service's, not both", param_hint="--service")
    with reach.client("service" if service else "tenant") as client:
        yield client


def _row(webhook: Mapping[str, Any]) -> tuple[object, ...]:
    return webhook["id"], "yes" if webhook["enabled"] else "no", webhook["url"]


def _fields(webhook: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    yield "webhook", webhook["id"]
    yield "url", webhook["url"]
    yield "types", ", ".join(map(str, webhook["types"]))
    why = f": {webhook['disabled_reason']}" if webhook.get("disabled_reason") else ""
    yield "enabled", "yes" if webhook["enabled"] else f"no{why}"
    yield "old secret", f"signs until {webhook['old_secret_until']}" if webhook.get("old_secret_until") else None


def _print_secret(secret: object) -> None:
    """Alone on its line, so that it can be copied whole."""
    console = make_console()
    print_line(console, "secret, shown only this once:")
    console.print(quoted(secret, "bold"), soft_wrap=True)
