"""A database, a Redis and relays as processes, to be flushed, stopped and killed; and the check of what came out."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psycopg
import redis

from service.adapters.redis_bus import RedisHints
from service.adapters.sql.migrate import upgrade
from service.adapters.sql_store import SqlStore
from service.core.events import STREAM
from tests.contract.store_steps import add_tenant, finished_run
from tests.servers import ONCE, PostgresServer

EVENTS_OF_A_RUN = 6
WITHIN_S = 20.0
LEASE_S = 1.0


@dataclass(frozen=True)
class Entry:
    """One event as a consumer sees it."""

    id: str
    event: Mapping[str, Any]

    @property
    def number(self) -> int:
        return int(self.id.removesuffix("-0"))


def faults(entries: Sequence[Entry], *, runs: int) -> list[str]:
    """What is wrong with a stream that should tell the whole story of so many finished runs, each event once."""
    found = [f"{later.id} comes after {earlier.id}" for earlier, later in pairwise(entries)
             if later.number <= earlier.number]  # fmt: skip
    stories: defaultdict[str, list[int]] = defaultdict(list)
    seen: set[str] = set()
    for entry in entries:
        if entry.event["id"] in seen:
            found.append(f"{entry.event['id']} comes twice")
        seen.add(entry.event["id"])
        stories[entry.event["subject"]].append(int(entry.event["sequence"]))
    for run_id, sequence in stories.items():
        if sequence != list(range(1, EVENTS_OF_A_RUN + 1)):
            found.append(f"{run_id} is told as {sequence}")
    if len(stories) != runs:
        found.append(f"{len(stories)} runs are told of, not {runs}")
    return found


class World:
    """A database with one tenant, a Redis, and relays that can be started and killed."""

    def __init__(self, database: str, redis_url: str, *, directory: Path, stack: ExitStack) -> None:
        self.database = database
        self.redis_url = redis_url
        self._directory = directory
        self._stack = stack
        upgrade(database)
        self.store = SqlStore(database)
        stack.callback(self.store.close)
        add_tenant(self.store, concurrent=10)
        self.redis = stack.enter_context(redis.Redis.from_url(redis_url, decode_responses=True, retry=ONCE))
        self.hints = RedisHints(redis_url)
        self._relays = 0

    def start_relay(self, **settings: str) -> "subprocess.Popen[bytes]":
        self._relays += 1
        environment = {
            "PATH": os.environ["PATH"], "BLASTDOOR_DATABASE_URL": self.database, "BLASTDOOR_REDIS_URL": self.redis_url,
            "BLASTDOOR_RELAY_LEASE_S": str(LEASE_S), **settings,
        }  # fmt: skip
        log = self._stack.enter_context((self._directory / f"relay-{self._relays}").open("wb"))
        relay = subprocess.Popen([sys.executable, "-m", "service.relay"], env=environment, stderr=log)
        self._stack.callback(_end, relay)
        return relay

    def log(self, number: int = 1) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self._directory / f"relay-{number}").read_text().splitlines()]

    def said(self, number: int = 1) -> list[str]:
        """But for what it says of its work beside the relaying: here is no worker that canaries could go to."""
        return [line["event"] for line in self.log(number) if not line["event"].startswith("canary_")]

    def tell(self, runs: int) -> None:
        """Finish so many runs, and give no hint: the relay finds out by itself."""
        for _ in range(runs):
            finished_run(self.store)

    def entries(self) -> list[Entry]:
        found: Any = self.redis.xrange(STREAM)
        return [Entry(entry_id, json.loads(fields["event"])) for entry_id, fields in found]

    def wait_for(self, runs: int) -> list[Entry]:
        eventually(lambda: self.length() >= runs * EVENTS_OF_A_RUN)
        return self.entries()

    def wait_for_more(self, *, than: int, unless: Callable[[], bool]) -> None:
        eventually(lambda: self.length() > than or unless())

    def is_locked(self) -> bool:
        """Whether somebody is in the middle of writing what a relay writes."""
        try:
            if self.database.startswith("sqlite"):
                with closing(sqlite3.connect(self.database.removeprefix("sqlite:///"), timeout=0.02)) as connection:
                    connection.execute("BEGIN IMMEDIATE")
            else:
                with psycopg.connect(self.database.replace("+psycopg", "")) as session:
                    session.execute("SELECT 1 FROM relay_state, outbox FOR UPDATE NOWAIT")
        except (sqlite3.OperationalError, psycopg.errors.LockNotAvailable):
            return True
        return False

    def length(self) -> int:
        try:
            return int(str(self.redis.xlen(STREAM)))
        except redis.RedisError:
            return 0


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()


def eventually(true: Callable[[], bool], *, within_s: float = WITHIN_S) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.01)


def stop_between_transactions(relay: "subprocess.Popen[bytes]", world: World) -> None:
    """One that is stopped inside a transaction stops whoever writes to the same rows, or to the same SQLite: that is
    the database's to cure, and not what is tested here."""

    def stopped() -> bool:
        relay.send_signal(signal.SIGSTOP)
        if not world.is_locked():
            return True
        relay.send_signal(signal.SIGCONT)
        return False

    eventually(stopped)


@contextmanager
def redis_again(configuration: Path) -> Iterator[None]:
    argv = ["setpriv", "--pdeathsig", "TERM", "redis-server", str(configuration)]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        _end(process)


def allow_connections(server: PostgresServer, url: str, allowed: bool) -> None:
    name = url.rpartition("/")[2]
    conninfo = f"host=127.0.0.1 port={server.port} user=postgres dbname=postgres password={server.password}"
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS {str(allowed).lower()}')
        if not allowed:
            connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
