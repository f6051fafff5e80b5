"""One installation under faults: its database, a Redis that can die and come back, and processes that are killed,
stopped and started again. Whatever becomes of pytest, all of it ends with it."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import redis
import sqlalchemy as sa

from service.adapters.sql_store import SqlStore
from tests.faults.program import REDIS_CONFIGURATION, WRITES
from tests.servers import LOOPBACK, ONCE, NotInstalled, _free_port
from tests.sweep import Found, swept

ROOT = Path(__file__).parents[2]
WITHIN_S = 60.0
WRITES_FILE = "writes.jsonl"
SCALED = {
    "BLASTDOOR_ENVIRONMENT": "test",
    "BLASTDOOR_WORKER_CONCURRENCY": "1",
    "BLASTDOOR_LEASE_S": "2",
    "BLASTDOOR_HEARTBEAT_S": "0.4",
    "BLASTDOOR_SELF_FENCE_S": "1.4",
    "BLASTDOOR_CANCEL_POLL_S": "0.2",
    "BLASTDOOR_RING_AFTER_S": "1",
    "BLASTDOOR_HOUSEKEEPING_S": "0.4",
    "BLASTDOOR_PROBE_S": "2",
    "BLASTDOOR_WORKER_FRESH_S": "600",
    "BLASTDOOR_RELAY_LEASE_S": "1.5",
    "BLASTDOOR_WEBHOOK_LEASE_S": "2",
    "BLASTDOOR_CANARY_S": "86400",
}
REAL = {"BLASTDOOR_ENVIRONMENT": "test", "BLASTDOOR_CANARY_S": "86400", "BLASTDOOR_WORKER_FRESH_S": "600"}
"""Every time as it is shipped. The API goes on placing runs while no worker can say that it lives."""


def eventually(look: Callable[[], Any], *, seconds: float = WITHIN_S, why: Callable[[], object] = lambda: "") -> Any:
    """The first answer that is true."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {why()}"
        time.sleep(0.05)
    return found


def is_up(url: str) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(f"{url}/healthz", trust_env=False, timeout=2).status_code == 200
    return False


class Forks:
    """`tests.faults.program --fork`, for a session."""

    def __init__(self) -> None:
        self._asking = threading.Lock()
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", sys.executable, "-m", "tests.faults.program", "--fork"],
            cwd=ROOT, env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._said() == "ready"

    def fork(self, role: str, *, env: Mapping[str, str], log: Path) -> int:
        assert self._process.stdin is not None
        with self._asking:
            print(json.dumps({"role": role, "env": dict(env), "log": str(log)}), file=self._process.stdin, flush=True)
            return int(self._said())

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def _said(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


class Program:
    """One process of the product, by a handle that never names another one's pid."""

    def __init__(self, forks: Forks, role: str, *, env: Mapping[str, str], log: Path) -> None:
        self.role, self.log = role, log
        self.pid = forks.fork(role, env=env, log=log)
        try:
            self._fd: int | None = os.pidfd_open(self.pid)
        except ProcessLookupError:
            self._fd = None

    @property
    def running(self) -> bool:
        return _state(self.pid) not in ("", "Z") and self.send(0)

    @property
    def stopped(self) -> bool:
        return _state(self.pid) == "T"

    def send(self, number: int) -> bool:
        """-> False when it is gone."""
        if self._fd is None:
            return False
        try:
            signal.pidfd_send_signal(self._fd, number)
        except ProcessLookupError:
            return False
        return True

    def pool(self) -> list[int]:
        """A worker's children that play runs: those it has forked and that run the same program."""
        if not self.running:
            return []
        with suppress(OSError):
            own = Path(f"/proc/{self.pid}/cmdline").read_bytes()
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
            return [int(pid) for pid in children if _read(f"/proc/{pid}/cmdline") == own]
        return []

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def events(self, name: str) -> list[dict[str, Any]]:
        """Its log lines with this event."""
        lines = (json.loads(line) for line in self.said().splitlines() if line.startswith("{"))
        return [line for line in lines if line.get("event") == name]

    def end(self, *, polite_s: float = 10.0) -> None:
        """SIGTERM, then SIGKILL to all of its session."""
        self.ask_to_end()
        deadline = time.monotonic() + polite_s
        while self.running and time.monotonic() < deadline:
            time.sleep(0.05)
        self.kill()

    def ask_to_end(self) -> None:
        for pid in self.pool():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self.send(signal.SIGTERM)
        self.send(signal.SIGCONT)

    def kill(self) -> None:
        """It and its children. One that is gone had children that see its end, and its number may be another's now."""
        if self.running:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _state(pid: int) -> str:
    return _read(f"/proc/{pid}/stat").rpartition(b") ")[2][:1].decode()


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


class FragileRedis:
    """A Redis with an append-only file, on a port of its own, that is killed and started again."""

    _program: Program | None

    def __init__(self, forks: Forks, directory: Path, *, fsync: str = "everysec") -> None:
        if shutil.which("redis-server") is None:
            raise NotInstalled("redis-server is not installed")
        self.directory, self.port, self.password = directory, _free_port(), secrets.token_urlsafe(16)
        directory.mkdir(parents=True, exist_ok=True)
        self._configuration = directory / "redis.conf"
        self._configuration.touch(mode=0o600)
        self._configuration.write_text(
            f"bind {LOOPBACK}\nport {self.port}\ndir {directory}\nrequirepass {self.password}\n"
            f'save ""\nappendonly yes\nappendfsync {fsync}\ndaemonize no\n'
        )
        self._forks, self._program, self._starting = forks, None, threading.Lock()
        self.start()
        eventually(self.answers, seconds=20, why=lambda: (directory / "log").read_text()[-2000:])

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@{LOOPBACK}:{self.port}/0"

    def client(self) -> "redis.Redis":
        return redis.Redis.from_url(self.url, decode_responses=True, socket_timeout=2, retry=ONCE)

    def start(self) -> None:
        """From any thread: it dies with the program that forks, not with the thread that asked. It may be stopped or
        killed again before it has answered."""
        with self._starting:
            if not self._program_runs():
                if self._program is not None:
                    self._program.kill()
                env = {"PATH": os.environ["PATH"], REDIS_CONFIGURATION: str(self._configuration)}
                self._program = Program(self._forks, "redis", env=env, log=self.directory / "log")

    def answers(self) -> bool:
        with self.client() as client:
            try:
                return bool(client.ping())
            except redis.RedisError:
                return False

    def send(self, number: signal.Signals) -> None:
        assert self._program is not None
        self._program.send(number)
        if number is signal.SIGKILL:
            eventually(lambda: not self._program_runs())

    def _program_runs(self) -> bool:
        return self._program is not None and self._program.running

    def flush(self) -> None:
        with self.client() as client, suppress(redis.RedisError):
            client.flushall()

    def end(self) -> None:
        if self._program is not None:
            self._program.end()


@dataclass
class Place:
    """`environment`: what its processes have in common; each site has a runtime directory of its own."""

    forks: Forks
    directory: Path
    store: SqlStore
    engine: sa.Engine
    redis: FragileRedis
    environment: dict[str, str]
    programs: list[Program] = field(default_factory=list)

    @property
    def installation(self) -> str:
        return self.store.installation_id()

    def runtime_dir(self, site: str) -> Path:
        return self.directory / "run" / site

    def start(self, role: str, *, site: str = "here", **environment: str) -> Program:
        env = self.environment | {
            "BLASTDOOR_SITE": site, "BLASTDOOR_RUNTIME_DIR": str(self.runtime_dir(site)),
        } | environment  # fmt: skip
        log = self.directory / f"{role}-{site}-{len(self.programs)}.log"
        program = Program(self.forks, role, env=env, log=log)
        self.programs.append(program)
        return program

    def told(self) -> str:
        """What a failing test needs: the ends of all logs."""
        return "\n".join(f"--- {one.log.name}\n{one.said()[-3000:]}" for one in self.programs)

    def rows(self) -> list[dict[str, Any]]:
        """Every run, as the database has it."""
        query = (
            "SELECT id, tenant, phase, outcome, reason, attempt, fence, destroyed_fence, lease_owner, site FROM run "
            "ORDER BY id"
        )
        return self.query(query)

    def outbox(self, run_id: str | None = None) -> list[dict[str, Any]]:
        """Every event, oldest first: run_id, seq, event (a dict), pub_seq, published."""
        rows = self.query("SELECT run_id, seq, event, pub_seq, published FROM outbox ORDER BY run_id, seq")
        return [row | {"event": json.loads(row["event"])} for row in rows if run_id in (None, row["run_id"])]

    def types_told(self, run_id: str) -> list[str]:
        return [str(row["event"]["type"]).removeprefix("dev.blastdoor.") for row in self.outbox(run_id)]

    def settled(self) -> bool:
        """Every run is finished, what it had is known to be gone, and all of it was published."""
        rows = self.query(
            "SELECT (SELECT count(*) FROM run WHERE phase <> 'finished' OR fence <> destroyed_fence) AS runs, "
            "(SELECT count(*) FROM outbox WHERE published IS NOT TRUE AND tenant NOT LIKE '\\_%' ESCAPE '\\') AS events"
        )
        return rows[0]["runs"] == 0 and rows[0]["events"] == 0

    def left(self, *, within_s: float) -> list[str]:
        """What carries this installation's mark on this machine, once nothing more goes away."""
        found: list[Found] = swept(self.installation, within_s=within_s)
        home = self.directory / "run"
        stands = list(home.glob(f"*/{self.installation}/paper/*/*")) if home.is_dir() else []
        stands += list(home.glob(f"*/{self.installation}/bd-*")) if home.is_dir() else []
        return [str(one) for one in found] + [f"label {path.name}" for path in stands]

    def end(self) -> None:
        for program in self.programs:
            program.ask_to_end()
        for program in self.programs:
            program.end(polite_s=5)
        self.redis.end()
        self.engine.dispose()
        self.store.close()

    def query(self, query: str) -> list[dict[str, Any]]:
        with self.engine.connect() as connection:
            return [dict(row._mapping) for row in connection.execute(sa.text(query))]


@contextmanager
def run_place(
    forks: Forks, directory: Path, *, database: str | None = None, settings: Mapping[str, str] | None = None,
    paper: bool = True, fsync: str = "everysec",
) -> Iterator[Place]:  # fmt: skip
    """Database and Redis; no process yet."""
    directory.mkdir(parents=True, exist_ok=True)
    url = database or f"sqlite:///{directory / 'blastdoor.db'}"
    store = SqlStore(url)
    store.migrate()
    server = FragileRedis(forks, directory / "redis", fsync=fsync)
    environment = {
        "PATH": os.environ["PATH"],
        "LANG": "C.UTF-8",
        "BLASTDOOR_STATE_DIR": str(directory / "state"),
        "BLASTDOOR_DATABASE_URL": url,
        "BLASTDOOR_REDIS_URL": server.url,
        WRITES: str(directory / WRITES_FILE),
        **({"PAPER": "1"} if paper else {}),
        **(SCALED if settings is None else settings),
    }
    place = Place(forks, directory, store, sa.create_engine(url), server, environment)
    try:
        yield place
    finally:
        place.end()
