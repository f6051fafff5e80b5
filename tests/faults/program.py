"""The product's processes, as the tests of faults start them: what runs is `workers.app`, `service.main` and
`service.relay.__main__`; only the registry of boundaries differs where PAPER is set.

`python -m tests.faults.program ROLE` is one of them. `python -m tests.faults.program --fork` has imported everything
and forks one for each request on its standard input (a JSON line: role, env, log), and answers with its pid: a start
costs milliseconds instead of seconds, and many can be afforded.
"""

import ctypes
import functools
import importlib
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

from service.adapters.failpoints import act
from service.adapters.sql.engine import Database
from service.adapters.sql_store import SqlStore
from service.core.errors import LeaseLost
from service.core.failpoints import Action, Failpoint, install, parse

PAPER, REDIS_CONFIGURATION = "PAPER", "REDIS_CONFIGURATION"
WRITES = "WRITES"
"""Of the environment: a file in which each attempt of a worker to write as the owner of a run is noted."""
WITHOUT_LIFETIME = "WITHOUT_LIFETIME"
"""Of the environment, for a positive control: boundaries end by the host's clock."""
FAULT_FILE = "FAULT_FILE"
"""Of the environment: a file with one failpoint, `NAME:ACTION`, that may be written while the process runs. The process
that reaches it takes the file, and acts."""
_PR_SET_PDEATHSIG = 1


def run(role: str) -> int:
    """With the settings of the environment. -> the exit status."""
    if role == "redis":
        os.execvp("redis-server", ["redis-server", os.environ[REDIS_CONFIGURATION]])
    if os.environ.get(PAPER):
        from service.core.boundary import BoundaryKind
        from workers import registry

        registry.DRIVERS = dict.fromkeys(BoundaryKind, "tests.faults.paper:PaperBoundary")
    if path := os.environ.get(WRITES):
        _note_writes(path)
    if os.environ.get(WITHOUT_LIFETIME):
        _forget_lifetimes()
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
    if role == "webhooks":
        from service.relay.webhooks.__main__ import main as webhooks

        webhooks()
    from workers.app import start

    return start(role)


def _note_writes(path: str) -> None:
    for name in ("mark_running", "mark_collecting", "finish", "requeue"):
        setattr(SqlStore, name, _noted(getattr(SqlStore, name), path))


def _noted(write: Callable[..., Any], path: str) -> Callable[..., Any]:
    """With the fence of who acted on the run just before, 0 for nobody: since fences rise, a write under another one
    must be refused, whatever came in between."""

    @functools.wraps(write)
    def noted(self: SqlStore, run_id: str, fence: int, *args: Any, **more: Any) -> Any:
        view = self.lease_of(run_id)
        held = view.fence if view is not None and view.is_active else 0
        try:
            answer = write(self, run_id, fence, *args, **more)
        except LeaseLost:
            _append(path, run=run_id, fence=fence, held=held, accepted=False, what=write.__name__)
            raise
        _append(path, run=run_id, fence=fence, held=held, accepted=True, what=write.__name__)
        return answer

    return noted


def _append(path: str, **entry: Any) -> None:
    line = json.dumps({"kind": "write", "at": time.time(), "pid": os.getpid()} | entry) + "\n"
    with open(path, "ab", buffering=0) as file:  # one write: several processes append
        file.write(line.encode())


def _forget_lifetimes() -> None:
    from workers import run_scenario

    made = run_scenario.BoundarySpec
    run_scenario.BoundarySpec = lambda **words: made(**words | {"lifetime": None})  # type: ignore[assignment,misc]


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
    "service.main", "service.relay.__main__", "service.relay.webhooks.__main__", "sqlalchemy.dialects.sqlite",
    "tests.faults.paper", "workers.app",
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
