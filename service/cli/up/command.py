"""What the command does: check, start in order, say when it is ready, watch, stop in order."""

import os
import platform
import select
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import typer
from rich.text import Text

from service.cli.address import CLIENT_FILE, default_state_dir, write_client_file
from service.cli.connection import EXIT_INFRASTRUCTURE, EXIT_REFUSED
from service.cli.printing import make_console, print_fields, print_json, print_line, quoted
from service.cli.up.children import Child, CrashLoop, end_left_over
from service.cli.up.installation import Keys, cancel_what_runs, mint_keys, prepare, remove_runtime_directory
from service.cli.up.programs import SECRETS_KEY, Plan, processes, redis_server
from service.cli.up.redis import LOOPBACK, RedisPlan, redis_answers
from service.cli.up.state import CannotUse, StateDirectory, free_port, open_state, port_is_free
from service.client import Client, Document, Problem, Unreachable
from service.core.errors import BlastdoorError
from service.settings import Settings

READY_WITHIN_S = 60.0
RUNS_MAY_END_S = 5.0


class NotReady(Exception):
    """Something did not come up; the message has the end of its log."""


def run_everything(*, state: Path | None, port: int, as_json: bool) -> None:
    """Until a signal asks for the end. Raises typer.Exit with the exit code."""
    try:
        check_machine()
        directory = open_state(state or default_state_dir())
    except CannotUse as error:
        _complain(str(error))
        raise typer.Exit(EXIT_REFUSED) from error
    try:
        plan = _plan(directory, port=port)
    except (CannotUse, ValueError) as error:  # pydantic's ValidationError is one
        directory.close()
        _complain(str(error))
        raise typer.Exit(EXIT_REFUSED) from error
    try:
        _run(plan, as_json=as_json)
    finally:
        directory.close()


def check_machine() -> None:
    """Raises CannotUse with what is missing and how to get it."""
    if platform.system() != "Linux":
        raise CannotUse("`blastdoor up` runs on Linux: its walls are made of Linux namespaces and cgroups")
    if os.geteuid() != 0:
        raise CannotUse(
            "`blastdoor up` must run as root: sandboxes need namespaces, mounts and cgroups, and Blastdoor builds no "
            "weaker wall instead. Run `sudo blastdoor up`; `blastdoor doctor` says what else this machine lacks"
        )
    if shutil.which("redis-server") is None:
        raise CannotUse("redis-server is not installed: `apt-get install redis-server` (Debian), or redis elsewhere")


@dataclass(frozen=True)
class Ready:
    """What is printed: the address, this start's keys, the walls that the worker can build."""

    url: str
    keys: Keys
    redis_url: str
    capabilities: Document

    def document(self) -> dict[str, Any]:
        return {
            "url": self.url,
            "tenant": self.keys.tenant,
            "tenant_key": self.keys.tenant_key,
            "service_key": self.keys.service_key,
            "admin_key": self.keys.admin_key,
            "redis_url": self.redis_url,
        }


class Interrupts:
    """Counts SIGINT, SIGTERM and SIGHUP, and wakes who sleeps in `pause`."""

    def __init__(self) -> None:
        self.count = 0
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        self.count += 1

    def pause(self, seconds: float) -> None:
        """Sleep; a signal ends it at once."""
        if select.select([self._reader], [], [], seconds)[0]:
            os.read(self._reader, 512)

    @contextmanager
    def watching(self) -> Iterator[None]:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, self._caught) for number in numbers}
        woken_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(woken_before)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(self._reader)
            os.close(self._writer)


def _run(plan: Plan, *, as_json: bool) -> None:
    interrupts = Interrupts()
    children: dict[str, Child] = {}
    with interrupts.watching():
        end_left_over(plan.state.left_over(), _say)
        try:
            ready = _start(plan, children, interrupts)
            if ready is not None:
                _announce(ready, plan, as_json=as_json)
            while not interrupts.count:
                interrupts.pause(0.5)
                for child in children.values():
                    child.revive(_say)
        except (NotReady, CrashLoop, BlastdoorError, OSError) as error:
            _complain(str(error))
            raise typer.Exit(EXIT_INFRASTRUCTURE) from error
        finally:
            _stop(plan, children, interrupts)


def _plan(directory: StateDirectory, *, port: int) -> Plan:
    """Raises CannotUse for a port that is taken, ValueError for a setting that is wrong."""
    if port and not port_is_free(port):
        raise CannotUse(f"port {port} is in use; name another with --port, or --port 0 for a free one")
    redis = RedisPlan(port=directory.redis_port(), directory=directory.redis)
    passed_on = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("BLASTDOOR_") and name.removeprefix("BLASTDOOR_").lower() in Settings.model_fields
    }
    decided = {
        "BLASTDOOR_STATE_DIR": str(directory.path),
        "BLASTDOOR_DATABASE_URL": "",
        "BLASTDOOR_REDIS_URL": redis.process_url,
        "BLASTDOOR_BUS_URL": "",
        "BLASTDOOR_HOST": LOOPBACK,
        "BLASTDOOR_PORT": str(port or free_port()),
    }
    if not passed_on.get(SECRETS_KEY):
        decided[SECRETS_KEY] = directory.secrets_key()
    environment = passed_on | decided
    fields: dict[str, Any] = {name.removeprefix("BLASTDOOR_").lower(): value for name, value in decided.items()}
    return Plan(state=directory, redis=redis, settings=Settings(**fields), environment=environment)


# --- starting -------------------------------------------------------------------------------------------------------


def _start(plan: Plan, children: dict[str, Child], interrupts: Interrupts) -> Ready | None:
    """Redis, then the database, then the processes that need both. None when it was interrupted meanwhile.

    `children` is filled on the way, so that what was started is stopped whatever happens. Raises NotReady.
    """
    deadline = time.monotonic() + READY_WITHIN_S
    _launch(children, Child(redis_server(plan), plan.state))
    if not _until(lambda: redis_answers(plan.redis), children, interrupts, deadline, "Redis does not answer"):
        return None
    prepare(plan.settings)
    for program in processes(plan):
        _launch(children, Child(program, plan.state))
    keys = mint_keys(plan.settings)
    with Client(plan.url, key=keys.tenant_key) as client:
        if not _until(client.healthy, children, interrupts, deadline, "the API does not answer"):
            return None
        found: Document = {}

        def worker_is_there() -> bool:
            found.update(_capabilities(client))
            return any(row["available"] for row in found.get("boundaries", []))

        if not _until(worker_is_there, children, interrupts, deadline, "no worker offers a boundary"):
            return None
    ready = Ready(url=plan.url, keys=keys, redis_url=plan.redis.operator_url, capabilities=found)
    write_client_file(plan.state.path / CLIENT_FILE, ready.document())
    return ready


def _launch(children: dict[str, Child], child: Child) -> None:
    children[child.name] = child
    child.start()


def _until(
    ready: Callable[[], bool], children: Mapping[str, Child], interrupts: Interrupts, deadline: float, otherwise: str
) -> bool:
    """Ask until it is so; -> False when interrupted. What dies while starting is wrong in a way that a restart does not
    mend: NotReady with its log."""
    while not interrupts.count:
        for child in children.values():
            if not child.alive:
                raise NotReady(f"{child.name} {child.how_it_ended} while starting; {child.log} says:\n{child.tail()}")
        if ready():
            return True
        if time.monotonic() > deadline:
            tails = "\n".join(f"{child.log} says:\n{child.tail(4)}" for child in children.values())
            raise NotReady(f"{otherwise} after {READY_WITHIN_S:g} s\n{tails}")
        interrupts.pause(0.1)
    return False


def _capabilities(client: Client) -> Document:
    try:
        return client.capabilities()
    except (Problem, Unreachable):
        return {}


# --- stopping -------------------------------------------------------------------------------------------------------


def _stop(plan: Plan, children: Mapping[str, Child], interrupts: Interrupts) -> None:
    """The worker first, so that its runs end while everything that records it is still there; then the reaper, whose
    last sweep finds what that left; then the rest. Another signal hurries it. The client file goes first: whoever
    listens on that port next must not be sent its keys."""
    asked = interrupts.count
    (plan.state.path / CLIENT_FILE).unlink(missing_ok=True)
    if children:
        _say("stopping")

    def hurry() -> bool:
        return interrupts.count > asked + 1

    if (worker := children.get("worker")) is not None and worker.alive:
        worker.signal(signal.SIGTERM)
        if not worker.stopped_within(RUNS_MAY_END_S, hurry=lambda: interrupts.count > asked):
            _cancel(plan)
            worker.stopped_within(10.0, hurry=hurry)
    for name in ("worker", "reaper", "relay", "webhooks", "api", "redis"):
        if name in children:
            children[name].stop(_say, hurry=hurry)
    plan.state.forget_processes()
    if worker is not None:
        remove_runtime_directory(plan.settings)
    if children:
        _say("stopped")


def _cancel(plan: Plan) -> None:
    """Runs that go on are cancelled, as an operator would: the worker ends them and takes their walls down."""
    try:
        for run_id in cancel_what_runs(plan.settings):
            _say(f"{run_id} was still running and is cancelled")
    except BlastdoorError as error:
        _say(f"runs that go on could not be cancelled, and are killed: {error}")


# --- talking --------------------------------------------------------------------------------------------------------


def _announce(ready: Ready, plan: Plan, *, as_json: bool) -> None:
    walls = [row for row in ready.capabilities["boundaries"] if row["available"]]
    if as_json:
        print_json(ready.document())
        return
    console = make_console()
    state = "" if plan.state.path == default_state_dir().absolute() else f" --state {plan.state.path}"
    print_line(console, ("\nBlastdoor is up.\n", "bold"))
    rows: list[tuple[str, object]] = [
        ("address", ready.url),
        ("tenant", f"{ready.keys.tenant} (untrusted)"),
        ("tenant key", ready.keys.tenant_key),
        *(("wall", _wall(row)) for row in walls),
        ("API", f"{ready.url}/docs"),
        ("all keys", str(plan.state.path / CLIENT_FILE)),
        ("logs", str(plan.state.logs)),
    ]
    print_fields(console, rows)
    print_line(console, "\nIn another terminal:\n")
    for words in ("run examples/scenarios/rule-engine", "runs"):
        console.print(quoted(f"  blastdoor {words}{state}"), soft_wrap=True)
    print_line(console, "\nCtrl-C stops everything.\n")


def _wall(row: Mapping[str, Any]) -> str:
    guarantees = ", ".join(f"{name.replace('_', ' ')} {level}" for name, level in (row["guarantees"] or {}).items())
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    return f"{row['boundary']}: {guarantees}" + (f" ({versions})" if versions else "")


def _say(message: str, style: str = "dim") -> None:
    """On stderr; a terminal that is gone must not keep us from stopping what we started."""
    text = Text.assemble(("blastdoor: ", style), quoted(message, one_line=False))
    try:
        make_console(stderr=True).print(text, soft_wrap=True)
    except OSError:
        return


def _complain(message: str) -> None:
    _say(message, "bold red")
