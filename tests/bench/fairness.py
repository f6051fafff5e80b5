"""How long a light tenant's runs wait in the queue while another has thousands in it, beside its wait alone.

A whole installation on SQLite and Redis: API, relay, reaper, and a worker that plays two runs at once. Its boundary is
the fake one: a run of 200 ms sleeps so long, and costs no CPU. Light's runs are submitted over HTTP, one at a time, at
moments that know nothing of the others'. A wait is by the database's clock, from the event that a run is queued to the
event that it is claimed.

`light_tenant_wait_s` is the 95th percentile with at least 5,000 runs of the other queued from the first sample to the
last. The limit is the wait alone, and one and a half runs.
"""

import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import sqlalchemy as sa

from service.adapters.celery_queue import CeleryDoorbell
from service.adapters.redis_bus import RedisBus
from service.adapters.sql.schema import outbox, run, worker
from service.adapters.sql_store import SqlStore
from service.core.events import EventType
from service.core.run import Phase
from service.core.tenancy import KeyKind
from service.usecases.keys import mint
from tests.bench.figures import latencies_ms, percentile
from tests.bench.filled import opened
from tests.bench.live import FORM, Client, Document, form, must_pass, progress, scratch
from tests.bench.programs import api, program
from tests.contract.store_steps import add_run, add_tenant
from tests.factories import make_scenario
from tests.servers import run_redis

QUEUED = int(os.environ.get("BENCH_FAIR_QUEUED", "5000"))
SAMPLES = int(os.environ.get("BENCH_FAIR_SAMPLES", "60"))
RUN_S = 0.2
RUNS_OF_LIMIT = 1.5
_SLOTS = 2
_MARGIN = 1.2
"""So many more are queued before the first sample, since they are played meanwhile."""
_AT_ONCE = 100
_LIGHT, _HEAVY = "light", "heavy"
_STEPS = [{"name": "work", "run": ["sleep", str(RUN_S)]}]
_UPLOAD = form(scenario=json.dumps({"name": "a fifth of a second", "steps": _STEPS}))
_WITHIN_S = 60.0


def measure(runsc: Path) -> Document:
    with _installation() as (store, light, doorbell):
        _submit(light, SAMPLES // 10, "warming up")
        alone = _waits_s(store, _submit(light, SAMPLES, "light alone"))
        _fill_the_queue(store, doorbell)
        beside = _waits_s(store, _submit(light, SAMPLES, f"light beside {QUEUED} runs"))
        left = _queued(store)
    if left < QUEUED:
        raise SystemExit(f"{left} runs were left in the queue: it was not {QUEUED} long all the time")
    alone_s, beside_s = percentile(alone, 95), percentile(beside, 95)
    return {
        "light_tenant_wait_s": beside_s,
        "light_tenant_wait": {
            "limit_s": alone_s + RUNS_OF_LIMIT * RUN_S,
            "alone_p95_s": alone_s,
            "more_s": beside_s - alone_s,
            "more_limit_s": RUNS_OF_LIMIT * RUN_S,
            "alone_p50_s": statistics.median(alone),
            "beside_p50_s": statistics.median(beside),
            "beside_max_s": max(beside),
            "samples": len(beside),
            "queued": left,
        },
    }


@contextmanager
def _installation() -> Iterator[tuple[SqlStore, Callable[[], Client], CeleryDoorbell]]:
    """-> its store, what makes a client of light's, and the bell."""
    with ExitStack() as stack:
        directory, redis = stack.enter_context(scratch()), stack.enter_context(run_redis())
        url = f"sqlite:///{directory / 'blastdoor.db'}"
        store = stack.enter_context(opened(url))
        for name in (_LIGHT, _HEAVY):
            add_tenant(store, name=name, concurrent=2 * _SLOTS, queued=1_000_000)
        settings = {
            "database_url": url, "redis_url": redis.url, "state_dir": directory / "state",
            "runtime_dir": directory / "run", "site": "here", "worker_concurrency": _SLOTS,
        }  # fmt: skip
        RedisBus(redis.url).create_stream()
        for role in ("worker", "reaper", "relay"):
            stack.enter_context(program(role, directory, settings=settings))
        address = stack.enter_context(api(directory, settings=settings))
        _wait_for_the_worker(store)
        key = mint(store, kind=KeyKind.TENANT, tenant=_LIGHT).key
        yield store, lambda: Client(address, key), CeleryDoorbell(redis.url)


def _wait_for_the_worker(store: SqlStore) -> None:
    deadline = time.monotonic() + _WITHIN_S
    while not _count(store, sa.select(sa.func.count()).select_from(worker)):
        if time.monotonic() > deadline:
            raise SystemExit("the worker did not start")
        time.sleep(0.05)


def _submit(light: Callable[[], Client], samples: int, what: str) -> list[str]:
    """-> the ids of runs that have ended."""
    chance = random.Random(samples)
    ids = []
    with light() as client:
        for number in range(samples):
            progress(f"{what}: {number + 1}/{samples}")
            ended = client.finished(client.ask("POST", "/v1/runs", _UPLOAD, **FORM))
            must_pass(ended)
            ids.append(ended["id"])
            time.sleep(chance.uniform(0, 2 * RUN_S))
    return ids


def _fill_the_queue(store: SqlStore, doorbell: CeleryDoorbell) -> None:
    """As the API does: stored, then rung for, each of them."""
    scenario = make_scenario(steps=_STEPS)
    while (queued := _queued(store)) < QUEUED * _MARGIN:
        progress(f"filling the queue: {queued}/{QUEUED * _MARGIN:.0f}")
        for _ in range(_AT_ONCE):
            stored = add_run(store, tenant=_HEAVY, scenario=scenario, max_queued=1_000_000)
            doorbell.ring(stored.placement.boundary)


def _waits_s(store: SqlStore, ids: list[str]) -> list[float]:
    told = sa.select(outbox.c.run_id, outbox.c.type, outbox.c.created_at).where(outbox.c.run_id.in_(ids))
    at: dict[str, dict[str, float]] = {EventType.QUEUED: {}, EventType.PROVISIONING: {}}
    with store._db.read() as connection:
        for row in connection.execute(told):
            if row.type in at:
                at[row.type][row.run_id] = row.created_at.timestamp()
    return [ms / 1000 for ms in latencies_ms(at[EventType.QUEUED], at[EventType.PROVISIONING])]


def _queued(store: SqlStore) -> int:
    waiting = sa.select(sa.func.count()).select_from(run)
    return _count(store, waiting.where(run.c.tenant == _HEAVY, run.c.phase == Phase.QUEUED.value))


def _count(store: SqlStore, question: "sa.Select[tuple[int]]") -> int:
    with store._db.read() as connection:
        return connection.scalar(question) or 0
