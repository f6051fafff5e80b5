"""How long an event takes from the commit that makes it true to whoever waits for it, in a whole installation.

`event_commit_to_consumer`: until a member of a consumer group has read it from the Redis Stream. Every transition of
every run counts (queued, provisioning, running, collecting, finished, boundary destroyed). When a row was committed is
seen from outside: a process of its own looks at the database about every millisecond, and what a look finds is taken to
have been committed just after the look before it began. So no figure is too small; it may be two looks too large.

The observers are processes of their own, so that neither waits for the other; all clocks are the host's monotonic one.
"""

import json
import os
import queue
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import redis

from service.core.events import STREAM
from tests.bench import sse
from tests.bench.figures import latencies_ms, of_latencies
from tests.bench.live import Document, Service, progress, running, submit

RUNS = int(os.environ.get("BENCH_EVENT_RUNS", "40"))
_LOOK_EVERY_S = 0.001
_BLOCK_MS = 200
_SETTLE_S = 2.0
"""After the last run: its boundary is destroyed, and that too is told."""
_GROUP = "bench"
_PROCESSES = get_context("fork")
_NEW_ROWS = "SELECT id, event_id, tenant FROM outbox WHERE id > ? AND NOT internal ORDER BY id"
Times = dict[str, float]
Observer = Callable[[Event], Times]


def measure(runsc: Path) -> Document:
    with running() as service:
        _submit_runs(service, 2, "warming up")
        return _to_consumer(service) | sse.to_watcher(service)


def _to_consumer(service: Service) -> Document:
    with redis.Redis.from_url(service.ready["redis_url"]) as bus:
        bus.xgroup_create(STREAM, _GROUP, id="0")
    with observing(_reader(service.ready["redis_url"])) as arrived:
        with observing(commit_watch(service.state / "blastdoor.db")) as committed:
            _submit_runs(service, RUNS, "events to a consumer")
            time.sleep(_SETTLE_S)
        time.sleep(_SETTLE_S)
    return of_latencies("event_commit_to_consumer", latencies_ms(committed, arrived))


def _submit_runs(service: Service, runs: int, what: str) -> None:
    with service.client() as client:
        for number in range(runs):
            progress(f"{what} {number + 1}/{runs}")
            submit(client)


def commit_watch(database: Path, *, tenant: str | None = None) -> Observer:
    """Event ids of the rows that appear in the outbox, by when they were committed at the earliest. Of
    one tenant or of all."""

    def watch(stop: Event) -> Times:
        seen: Times = {}
        with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, isolation_level=None)) as connection:
            ((last,),) = connection.execute("SELECT coalesce(max(id), 0) FROM outbox").fetchall()
            before = time.monotonic()
            while not stop.is_set():
                now = time.monotonic()
                for row_id, event_id, whose in connection.execute(_NEW_ROWS, (last,)).fetchall():
                    last = row_id
                    if tenant in (None, whose):
                        seen[event_id] = before
                before = now
                time.sleep(_LOOK_EVERY_S)
        return seen

    return watch


def _reader(url: str) -> Observer:
    """Event ids, by when a member of the group had them in hand. Acknowledged as they should be."""

    def read(stop: Event) -> Times:
        seen: Times = {}
        with redis.Redis.from_url(url) as bus:
            while not stop.is_set():
                answer: Any = bus.xreadgroup(_GROUP, "one", {STREAM: ">"}, count=16, block=_BLOCK_MS)
                now = time.monotonic()
                for _, entries in answer:
                    for entry_id, fields in entries:
                        seen.setdefault(json.loads(fields[b"event"])["id"], now)
                        bus.xack(STREAM, _GROUP, entry_id)
        return seen

    return read


@contextmanager
def observing(observe: Observer) -> Iterator[Times]:
    """A process that observes while the block runs; what it saw is there afterwards."""
    stop, found, times = _PROCESSES.Event(), _PROCESSES.Queue(), Times()
    observer = _PROCESSES.Process(target=lambda: found.put(observe(stop)), daemon=True)
    observer.start()
    try:
        yield times
    finally:
        stop.set()
        with suppress(queue.Empty):
            times |= found.get(timeout=10)
        observer.join()
    if observer.exitcode != 0:
        raise SystemExit("an observer failed")
