"""What holds in a full database, too: the same places in the queue by either way of asking, and nothing read in whole.

Filled as the benchmark fills it, only less; the benchmark says how fast it is.
"""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from service.adapters.sql.documents import AHEAD, LISTED, RANKS, SHOWN
from service.adapters.sql.fairness import FAIREST, SOMETHING_TO_CLAIM
from service.adapters.sql.line import UNDESTROYED
from service.adapters.sql.schema import run
from service.adapters.sql.waiting import QUEUED_OF
from service.adapters.sql_store import SqlStore
from service.core.run import Phase
from tests.bench.filled import BUSY, QUIET, fill
from tests.contract.store_steps import DAY, claimed
from tests.servers import PostgresServer

_QUEUED = 300
_OFFERED = {"b_boundaries": ["gvisor", "microvm"], "b_runtimes": ["default", "python"]}
_page = LISTED.where(run.c.tenant == BUSY).order_by(run.c.id.desc()).limit(20)
_some = "run_" + "8" * 32
_SPAN = {"b_boundaries": ["gvisor"], "b_oldest": _some, "b_newest": _some, "b_run_ids": [_some]}
STATEMENTS: dict[str, tuple[sa.Select[Any], dict[str, Any]]] = {
    "claim": (FAIREST, _OFFERED),
    "waiting": (SOMETHING_TO_CLAIM, _OFFERED),
    "list": (_page, {}),
    "deep list": (_page.where(run.c.id < _some), {}),
    "list of a phase": (_page.where(run.c.phase == "queued"), {}),
    "one run": (SHOWN.where(run.c.id == _some), {}),
    "ahead": (AHEAD, _SPAN),
    "ranks": (RANKS, _SPAN),
    "why it waits": (QUEUED_OF, {"b_run_ids": [_some]}),
    "undestroyed": (UNDESTROYED, {"b_site": "host-1", "b_limit": 100}),
}
UNINDEXED = sa.select(run.c.id).where(run.c.traceparent == "none")


@pytest.fixture
def full_store(sql_store: SqlStore) -> SqlStore:
    fill(sql_store, ended=2_000, queued=_QUEUED)
    return sql_store


def test_a_run_stands_in_the_queue_where_the_list_says_it_does(full_store: SqlStore) -> None:
    seen: dict[str, int | None] = {}
    before: str | None = None
    while True:
        page = full_store.list_runs(None, phase=Phase.QUEUED, outcome=None, limit=70, before=before)
        seen |= {one.id: one.queue_position for one in page.items}
        before = page.next_before
        if before is None:
            break

    assert sorted(place for place in seen.values() if place) == list(range(1, _QUEUED + 1))
    assert [place for _, place in sorted(seen.items())] == list(range(1, _QUEUED + 1)), "the oldest is the first"
    for run_id in sorted(seen)[::50]:
        assert full_store.get_run(run_id, None).queue_position == seen[run_id]


def test_what_is_in_it_is_as_the_store_would_have_stored_it(full_store: SqlStore) -> None:
    """Else the benchmark would measure something else."""
    (ended,) = full_store.list_runs(QUIET, phase=None, outcome=None, limit=1, before=None).items
    assert (ended.phase, len(ended.steps), ended.tenant) == (Phase.FINISHED, 3, QUIET)
    assert full_store.get_run(ended.id, QUIET) == ended
    assert len(full_store.queue_views([claimed(full_store).run.id], worker_fresh=DAY)) == 0
    assert full_store.undestroyed("host-1") == []
    assert len(full_store.read_news(ended.id, QUIET, after=(0, 0), limit=10).phases) == 5


@pytest.fixture(scope="module")
def full_postgres(postgres_server: PostgresServer) -> Iterator[SqlStore]:
    with postgres_server.fresh_database() as url:
        store = SqlStore(url)
        store.migrate()
        fill(store, ended=2_000, queued=_QUEUED)
        yield store
        store.close()


def plan_of(store: SqlStore, statement: sa.Select[Any], words: dict[str, Any]) -> str:
    compiled = statement.params(words).compile(store._db.engine, compile_kwargs={"literal_binds": True})
    with store._db.read() as connection:
        rows = connection.exec_driver_sql(f"EXPLAIN {compiled}".replace("%", "%%"))
        return "\n".join(str(row[0]) for row in rows)


@pytest.mark.parametrize("name", list(STATEMENTS))
def test_postgresql_does_not_read_all_runs_either(full_postgres: SqlStore, name: str) -> None:
    """SQLite's plans are in `test_store_schema.py`: there the indexes are prescribed."""
    plan = plan_of(full_postgres, *STATEMENTS[name])

    assert "run" in plan
    assert not re.search(r"Seq Scan on run\b", plan), plan
    assert "Sort Key: mine.id" not in plan, f"a tenant's whole queue is sorted for one claim:\n{plan}"


def test_a_plan_that_reads_all_runs_is_seen(full_postgres: SqlStore) -> None:
    assert re.search(r"Seq Scan on run\b", plan_of(full_postgres, UNINDEXED, {}))
