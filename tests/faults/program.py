"""The product's processes, as the tests of faults start them: what runs is `workers.app`, `service.main` and
`service.relay.__main__`; only the registry of boundaries differs where PAPER is set.

`python -m tests.faults.program ROLE` is one of them. `python -m tests.faults.program --fork` has imported everything
and forks one for each request on its standard input (a JSON line: role, env, log), and answers with its pid: a start
costs milliseconds instead of seconds, and many can be afforded.
"""

import ctypes
import importlib
import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

from service.adapters.failpoints import act
from service.adapters.sql.engine import Database
from service.core.failpoints import Action, Failpoint, install, parse

ROLES = ("worker", "reaper", "api", "relay")
PAPER = "PAPER"
FAULT_FILE = "FAULT_FILE"
"""Of the environment: a file with one failpoint, `NAME:ACTION`, that may be written while the process runs. The process
that reaches it takes the file, and acts."""
_PR_SET_PDEATHSIG = 1


def run(role: str) -> int:
    """With the settings of the environment. -> the exit status."""
    if os.environ.get(PAPER):
        from service.core.boundary import BoundaryKind
        from workers import registry

        registry.DRIVERS = dict.fromkeys(BoundaryKind, "tests.faults.paper:PaperBoundary")
    if path := os.environ.get(FAULT_FILE):
        _know_databases()
        install(lambda point: _act_once(point, path))
    if role == "api":
        from service.main import main as serve

        return serve(["serve"])
    if role == "relay":
        from service.relay.__main__ import main as relay

        relay()
        return 0
    from workers.app import start

    return start(role)


@contextmanager
def _holding_no_lock(*, stops: bool, in_a_transaction: bool) -> Iterator[None]:
    """SQLite has one write lock: if the thread that keeps the lease held it when the process stops, all others would
    stop too. That is another fault than the one that was asked for."""
    with ExitStack() as held:
        if stops and not in_a_transaction:
            for database in list(_DATABASES):
                held.enter_context(database._writing)
        yield


_DATABASES: "WeakSet[Database]" = WeakSet()


def _know_databases() -> None:
    made = Database.__init__

    def make(self: Database, *args: Any, **more: Any) -> None:
        made(self, *args, **more)
        _DATABASES.add(self)

    Database.__init__ = make  # type: ignore[method-assign]


def _act_once(point: Failpoint, path: str) -> None:
    try:
        with open(path) as file:
            (armed,) = parse(file.read())
        if armed.point is not point:
            return
        os.rename(path, f"{path}.{os.getpid()}")
    except FileNotFoundError:
        return
    with _holding_no_lock(stops=armed.action is Action.STOP, in_a_transaction=point.value.endswith("before_commit")):
        act(armed)


_MODULES = (
    "celery.apps.worker", "celery.concurrency.prefork", "kombu.transport.redis", "uvicorn.loops.uvloop",
    "uvicorn.protocols.http.httptools_impl", "service.adapters.celery_bell", "service.adapters.sql.migrate",
    "service.main", "service.relay.__main__", "sqlalchemy.dialects.sqlite", "tests.faults.paper", "workers.app",
    "workers.boundaries.gvisor.driver", "workers.boundaries.gvisor.probe",
)  # fmt: skip


def _serve_forks() -> int:
    """Until the end of the requests."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how they ended; they shall not be zombies
    for name in _MODULES:
        importlib.import_module(name)
    print("ready", flush=True)
    while line := sys.stdin.readline():
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become(request)
        print(pid, flush=True)
    return 0


def _become(request: dict[str, Any]) -> None:
    status = 1
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.environ.clear()
        os.environ.update(request["env"])
        random.seed()
        sys.argv = ["program", request["role"]]
        status = run(request["role"])
    except SystemExit as asked:
        status = asked.code if isinstance(asked.code, int) else 1
    except BaseException:  # noqa: BLE001 - whatever it was, this process is at its end
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)


if __name__ == "__main__":
    os.environ["REMAP_SIGTERM"] = "SIGQUIT"  # as `python -m workers` does, before celery is imported
    sys.exit(_serve_forks() if sys.argv[1:] == ["--fork"] else run(sys.argv[1]))
