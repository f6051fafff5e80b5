"""What a hundred thousand stored runs cost whoever lists, reads or claims one, beside a thousand.

Each question is asked of the two databases in turn, so that a slow moment of the machine hits both of a pair; its ratio
is the median over the pairs. `list_ratio_100k` and `claim_ratio_100k` are the worst of SQLite and PostgreSQL, and the
first of all kinds of pages, each asked of the store and over HTTP. The limit is 2.

A claim is taken back before the next one (not measured), so that all find the same queue; for every sixteen runs that
ended one waits, in both databases, so the larger one has the longer queue, too.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from service.adapters.sql_store import SqlStore
from service.core.ports.tenants import WorkerRecord
from service.core.run import Outcome, Phase
from service.core.tenancy import KeyKind
from service.usecases import fetch
from service.usecases.keys import mint
from tests.bench.figures import ratio_of_pairs
from tests.bench.filled import BUSY, QUIET, Databases, databases, fill, opened
from tests.bench.live import Client, Document, progress, scratch
from tests.bench.programs import api
from tests.factories import make_capabilities
from tests.servers import run_redis

SMALL, LARGE = 1_000, int(os.environ.get("BENCH_SCALE_RUNS", "100000"))
PAIRS = int(os.environ.get("BENCH_SCALE_PAIRS", "60"))
LIMIT = 2.0
_QUEUED_SHARE = 16
_PAGE = 20
_HOUR, _FRESH = timedelta(hours=1), timedelta(days=1)
Question = Callable[[], object]
Questions = Mapping[str, Question]
_PAGES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "first": (BUSY, {}),
    "deep": (BUSY, {"cursor": "deep"}),
    "failed": (BUSY, {"outcome": Outcome.FAILED}),
    "queued": (BUSY, {"phase": Phase.QUEUED}),
    "first_of_small_tenant": (QUIET, {}),
    "deep_of_small_tenant": (QUIET, {"cursor": "deep"}),
}


def measure(runsc: Path) -> Document:
    found: dict[str, Document] = {}
    with databases(2) as kinds:
        for kind in kinds:
            found[kind.kind] = _of_one(kind)
    lists = [row["ratio"] for rows in found.values() for name, row in rows.items() if name.startswith("list_")]
    return {
        "list_ratio_100k": max(lists),
        "claim_ratio_100k": max(rows["claim"]["ratio"] for rows in found.values()),
        "scale": {"small": SMALL, "large": LARGE, "limit": LIMIT, "pairs": PAIRS} | found,
    }


def _of_one(kind: Databases) -> Document:
    """Each question's ratio, and its two medians in milliseconds."""
    with ExitStack() as stack:
        stores = [stack.enter_context(opened(url)) for url in kind.urls]
        for store, ended in zip(stores, (SMALL, LARGE), strict=True):
            fill(store, ended=ended, queued=ended // _QUEUED_SHARE)
            _begin_some(store)
        small, large = (_store_questions(store) for store in stores)
        found = {name: _pairs(f"{kind.kind} {name}", small[name], large[name]) for name in small}
        found["claim"] = _claims(f"{kind.kind} claim", *stores)
        with _served(kind.urls, stores) as (small, large):
            found |= {name: _pairs(f"{kind.kind} {name}", small[name], large[name]) for name in small}
    return found


def _begin_some(store: SqlStore) -> None:
    """Two runs are under way, and a worker lives."""
    store.record_worker(WorkerRecord(id="wrk_1", host="h", site="h", capabilities=(make_capabilities(),), slots=2))
    for _ in range(2):
        _claim(store)


def _claim(store: SqlStore) -> tuple[str, int]:
    claim = store.claim(worker_id="wrk_1", site="h", boundaries=["gvisor"], runtimes=["default", "other"], lease=_HOUR)
    assert claim is not None
    return claim.run.id, claim.fence


def _pairs(what: str, small: Question, large: Question) -> Document:
    took: tuple[list[float], list[float]] = ([], [])
    for question in (small, large):
        question()
    for number in range(PAIRS):
        progress(f"{what} {number + 1}/{PAIRS}")
        for times, question in zip(took, (small, large), strict=True):
            times.append(_timed(question))
    return _document(*took)


def _claims(what: str, *stores: SqlStore) -> Document:
    took: tuple[list[float], list[float]] = ([], [])
    for number in range(PAIRS):
        progress(f"{what} {number + 1}/{PAIRS}")
        for times, store in zip(took, stores, strict=True):
            started = time.perf_counter()
            run_id, fence = _claim(store)
            times.append(time.perf_counter() - started)
            store.requeue(run_id, fence, why="measured", counts=False)
            store.record_destroyed(run_id, fence)
    return _document(*took)


def _timed(question: Question) -> float:
    started = time.perf_counter()
    question()
    return time.perf_counter() - started


def _document(small: list[float], large: list[float]) -> Document:
    return {
        "ratio": ratio_of_pairs(small, large),
        "small_ms": statistics.median(small) * 1000,
        "large_ms": statistics.median(large) * 1000,
    }


def _store_questions(store: SqlStore) -> Questions:
    """As the API asks the store, page for page."""

    def page(tenant: str, asked: Mapping[str, Any]) -> Question:
        words = dict(asked) | ({"cursor": _deep_cursor(store, tenant)} if "cursor" in asked else {})
        return lambda: _must_be_full(
            fetch.read_page(store, worker_fresh=_FRESH, tenant=tenant, limit=_PAGE, **words)[0]
        )

    pages = {f"list_{name}": page(tenant, asked) for name, (tenant, asked) in _PAGES.items()}
    return pages | {
        "queued_run": partial(fetch.read_run, store, run_id=_last_queued(store), tenant=BUSY, worker_fresh=_FRESH),
        "waiting": partial(store.waiting, ["gvisor"]),
    }


def _deep_cursor(store: SqlStore, tenant: str) -> str:
    """Where the tenant's oldest page begins."""
    with store._db.read() as connection:
        oldest = connection.exec_driver_sql(
            f"SELECT id FROM run WHERE tenant = '{tenant}' ORDER BY id LIMIT 1 OFFSET {_PAGE}"
        ).scalar_one()
    return fetch.make_cursor(oldest)


def _last_queued(store: SqlStore) -> str:
    return store.list_runs(BUSY, phase=Phase.QUEUED, outcome=None, limit=1, before=None).items[0].id


def _must_be_full(items: Any) -> None:
    if len(items) != _PAGE:
        raise SystemExit(f"a page of {len(items)} runs is compared with one of {_PAGE}")


@contextmanager
def _served(urls: tuple[str, ...], stores: list[SqlStore]) -> Iterator[list[Questions]]:
    """The same over HTTP: an API on each database."""
    with scratch() as directory, run_redis() as redis, ExitStack() as stack:
        questions = []
        for number, (url, store) in enumerate(zip(urls, stores, strict=True)):
            settings = {"database_url": url, "redis_url": redis.url, "state_dir": directory / str(number)}
            address = stack.enter_context(api(directory, settings=settings))
            questions.append(_http_questions(stack, address, store))
        yield questions


def _http_questions(stack: ExitStack, address: str, store: SqlStore) -> Questions:
    clients = {
        tenant: stack.enter_context(Client(address, mint(store, kind=KeyKind.TENANT, tenant=tenant).key))
        for tenant in (BUSY, QUIET)
    }

    def page(tenant: str, asked: Mapping[str, Any]) -> Question:
        words = dict(asked) | ({"cursor": _deep_cursor(store, tenant)} if "cursor" in asked else {})
        query = "&".join(f"{name}={value}" for name, value in ({"limit": _PAGE} | words).items())
        return lambda: _must_be_full(clients[tenant].ask("GET", f"/v1/runs?{query}")["items"])

    pages = {f"list_{name}_http": page(tenant, asked) for name, (tenant, asked) in _PAGES.items()}
    return pages | {"queued_run_http": partial(clients[BUSY].ask, "GET", f"/v1/runs/{_last_queued(store)}")}
