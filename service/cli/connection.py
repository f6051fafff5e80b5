"""What every command that talks to the service shares: its options, how it connects, and what its exit code says.

Exit codes: 0 done or passed; 1 the run failed, timed out, hit a limit or was cancelled; 2 refused or bad usage;
3 infrastructure, or the service cannot be reached.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from service.cli.address import NoAddress, NoService, Role, find_address
from service.cli.printing import make_console, print_json, print_line, quoted
from service.client import CannotPack, CannotSave, Client, Problem, Refused, Unreachable

EXIT_PASSED, EXIT_NOT_PASSED, EXIT_REFUSED, EXIT_INFRASTRUCTURE = 0, 1, 2, 3

_PANEL = "Which service"
Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        help="Where the service is; default: BLASTDOOR_URL, then `blastdoor up` here.",
        rich_help_panel=_PANEL,
    ),
]
Key = Annotated[
    str | None,
    typer.Option(
        "--key",
        metavar="KEY",
        help="The key to use. Others on this machine can read it there; BLASTDOOR_KEY is safer.",
        rich_help_panel=_PANEL,
    ),
]
State = Annotated[
    Path | None,
    typer.Option("--state", metavar="DIR", help="State directory of `blastdoor up`.", rich_help_panel=_PANEL),
]
ActingFor = Annotated[
    str | None,
    typer.Option("--tenant", metavar="NAME", help="With a service key: the tenant to act for.", rich_help_panel=_PANEL),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one line of JSON instead of text.")]


@dataclass(frozen=True)
class Reach:
    """How one command reaches the service, as its options say. `as_json`: what it prints is for a program."""

    context: typer.Context
    url: str | None
    key: str | None
    state: Path | None
    as_json: bool
    tenant: str | None = None

    @contextmanager
    def client(self, *roles: Role) -> Iterator[Client]:
        """With the given key or the client file's first one among `roles`; a service's when `--tenant` was given.
        Whatever goes wrong inside is said on stderr, and as JSON on stdout where that was asked for, and becomes the
        exit code."""
        with exit_codes(as_json=self.as_json):
            address = find_address(url=self.url, key=self.key, state=self.state)
            chosen = address.key_for(*(("service",) if self.tenant else roles))
            if address.exposes_key:
                warn(f"the key goes to {address.url} unencrypted; use https outside of a network that is yours alone")
            transport: httpx.BaseTransport | None = self.context.find_root().obj
            with Client(
                address.url, chosen, self.tenant, transport=transport, use_proxies=not address.on_this_machine,
                retries=1,  # somebody sits and waits to hear that it is not there
            ) as client:  # fmt: skip
                yield client


_OPTIONS = {"url": Url, "key": Key, "state": State, "tenant": ActingFor, "as_json": AsJson}


def reaching(*, for_a_tenant: bool = True) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a command of a function whose first parameter is a Reach: the options above are added to its own, without
    `--tenant` where nobody is acted for."""
    names = [name for name in _OPTIONS if for_a_tenant or name != "tenant"]

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function)
        kind = inspect.Parameter.KEYWORD_ONLY
        own = [parameter.replace(kind=kind) for parameter in list(signature.parameters.values())[1:]]
        added = [
            inspect.Parameter(name, kind, default=False if name == "as_json" else None, annotation=_OPTIONS[name])
            for name in names
        ]
        context = inspect.Parameter("context", kind, annotation=typer.Context)

        def command(**values: Any) -> None:
            reach = Reach(values.pop("context"), **{name: values.pop(name) for name in names})
            function(reach, **values)

        command.__name__, command.__doc__ = function.__name__, function.__doc__
        parameters = [context, *own, *added]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return command

    return decorate


def is_asked_itself(context: typer.Context) -> bool:
    """Whether a group was called without a subcommand. Options between the two would be lost: they are refused."""
    if context.invoked_subcommand is None:
        return True
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(f"options go after {context.invoked_subcommand!r}, not before it")
    return False


@contextmanager
def exit_codes(*, as_json: bool = False) -> Iterator[None]:
    try:
        yield
    except Problem as problem:
        _say_problem(problem, as_json=as_json)
        raise typer.Exit(EXIT_REFUSED if isinstance(problem, Refused) else EXIT_INFRASTRUCTURE) from problem
    except Unreachable as error:
        _say(str(error), code="unreachable", as_json=as_json)
        raise typer.Exit(EXIT_INFRASTRUCTURE) from error
    except NoAddress as error:
        _say(str(error), code="no_address", as_json=as_json)
        raise typer.Exit(EXIT_INFRASTRUCTURE if isinstance(error, NoService) else EXIT_REFUSED) from error
    except (CannotPack, CannotSave, OSError) as error:
        _say(str(error), code="bad_usage", as_json=as_json)
        raise typer.Exit(EXIT_REFUSED) from error


def _say(message: str, *, code: str, as_json: bool) -> None:
    if as_json:
        print_json({"code": code, "detail": message})
    print_line(make_console(stderr=True), ("blastdoor: ", "bold red"), quoted(message, one_line=False))


def warn(message: str) -> None:
    print_line(make_console(stderr=True), ("blastdoor: ", "bold yellow"), quoted(message))


def _say_problem(problem: Problem, *, as_json: bool) -> None:
    """The one sentence, then each place that is wrong, then what was considered; all of it may quote the upload."""
    if as_json:
        print_json(problem.document)
    console = make_console(stderr=True)
    title = "refused" if isinstance(problem, Refused) else "the service failed"
    print_line(console, ("blastdoor: ", "bold red"), f"{title} ({problem.code}): ", quoted(problem.detail))
    for row in _rows(problem, "errors"):
        print_line(console, "  ", quoted(row.get("path") or "."), ": ", quoted(row.get("message", "")))
    for row in _rows(problem, "candidates"):
        print_line(console, "  ", quoted(row.get("boundary", "")), " - missing: ", quoted(row.get("missing", "")))


def _rows(problem: Problem, name: str) -> list[dict[str, object]]:
    rows = problem.document.get(name)
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
