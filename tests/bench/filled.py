"""A database as it looks after a month: thousands of runs that ended, and a queue.

A few runs go through the store as all runs do; the others are copies of their rows under other ids, at other times and
of other tenants, since playing a hundred thousand takes an hour. The newest quarter still has its events.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from service.adapters.sql.schema import outbox, run, run_blob, run_input, run_result
from service.adapters.sql_store import SqlStore
from service.core.ids import uuid7
from service.core.run import Outcome, Phase, Result
from tests.bench.live import progress, scratch
from tests.contract.store_steps import add_run, add_tenant, bring_to
from tests.factories import make_result, make_step_result
from tests.servers import run_postgres

BUSY, QUIET = "busy", "quiet"
"""Of the ten tenants, one that has two runs of five, and waits; and one that has one of twenty-five, and waits for
nothing."""
_OTHERS = tuple(f"other{n}" for n in range(8))
_TWICE = (BUSY, BUSY, *_OTHERS[:3], BUSY, BUSY, *_OTHERS[3:6])
_TURNS = (*_TWICE, BUSY, BUSY, *_OTHERS[6:], QUIET, *_TWICE)
_QUEUED_TURNS = (BUSY, _OTHERS[0], BUSY, _OTHERS[1], _OTHERS[2])
_TEMPLATES = "templates"
_MONTH = timedelta(days=30)
_QUEUED_SINCE = timedelta(minutes=5)
_AT_ONCE = 5_000
_INSTANTS = ("created_at", "queued_at", "started_at", "finished_at", "boundary_destroyed_at")
Row = dict[str, Any]


@dataclass(frozen=True)
class Databases:
    """Stores over fresh, migrated databases of one kind; by `more` there are as many as wanted."""

    kind: str
    urls: tuple[str, ...]


@contextmanager
def databases(count: int) -> Iterator[list[Databases]]:
    """As many of each kind. Both write without waiting for a disk: what is compared is not the disk."""
    with ExitStack() as stack:
        directory = stack.enter_context(scratch())
        server = stack.enter_context(run_postgres())
        yield [
            Databases("sqlite", tuple(f"sqlite:///{directory / f'{n}.db'}" for n in range(count))),
            Databases("postgresql", tuple(stack.enter_context(server.fresh_database()) for _ in range(count))),
        ]


@contextmanager
def opened(url: str) -> Iterator[SqlStore]:
    store = SqlStore(url, synchronous="NORMAL")
    store.migrate()
    try:
        yield store
    finally:
        store.close()


def fill(store: SqlStore, *, ended: int, queued: int) -> None:
    """One in nine of the ended runs failed, the others passed."""
    for name in (BUSY, QUIET, *_OTHERS):
        add_tenant(store, name=name, concurrent=4, queued=1_000_000)
    add_tenant(store, name=_TEMPLATES)
    passed, failed = (_play(store, outcome) for outcome in (Outcome.PASSED, Outcome.FAILED))
    waiting = _leave_queued(store)
    now = datetime.now(UTC)
    rows = [
        _copy(failed if n % 9 == 8 else passed, at=now - _MONTH * (1 - n / ended), tenant=_TURNS[n % len(_TURNS)])
        for n in range(ended)
    ]
    rows += [
        _copy(waiting, at=now - _QUEUED_SINCE * (1 - n / queued), tenant=_QUEUED_TURNS[n % len(_QUEUED_TURNS)])
        for n in range(queued)
    ]
    for start in range(0, len(rows), _AT_ONCE):
        progress(f"filling {store._db.url.get_backend_name()}: {start}/{len(rows)}")
        with store._db.write() as connection:
            connection.execute(sa.insert(run), rows[start : start + _AT_ONCE])
    with store._db.write() as connection:
        for template in (passed, failed):
            _copy_what_belongs_to(connection, template, since=now - _MONTH / 4)
        _copy_input(connection, passed, run.c.phase == Phase.QUEUED.value)
    _settle(store)


def _play(store: SqlStore, outcome: Outcome) -> Row:
    """-> the row of a run of three steps that printed something, with a bundle and a file that it left."""
    submitted = add_run(store, tenant=_TEMPLATES, bundle="sha256:" + "c" * 64, metadata={"order": "17"})
    steps = tuple(make_step_result(n=n, text="all is well, and nothing but well\n" * 20) for n in (1, 2, 3))
    result: Result = make_result(outcome=outcome, steps=steps, outputs={"1.stdout": "sha256:" + "d" * 64})
    held = bring_to(store, Phase.COLLECTING)
    assert held.run.id == submitted.id
    store.finish(held.run.id, held.fence, result)
    store.record_destroyed(held.run.id, held.fence)
    return _row(store, held.run.id)


def _leave_queued(store: SqlStore) -> Row:
    submitted = add_run(store, tenant=_TEMPLATES)
    row = _row(store, submitted.id)
    store.request_cancel(submitted.id, None, by="tenant")
    return row


def _row(store: SqlStore, run_id: str) -> Row:
    with store._db.read() as connection:
        return dict(connection.execute(sa.select(run).where(run.c.id == run_id)).one()._mapping)


def _copy(template: Row, *, at: datetime, tenant: str) -> Row:
    later = at - template["created_at"]
    moved = {name: template[name] + later for name in _INSTANTS if template[name] is not None}
    return template | moved | {"id": f"run_{uuid7(int(at.timestamp() * 1000)).hex}", "tenant": tenant}


def _copy_what_belongs_to(connection: sa.Connection, template: Row, *, since: datetime) -> None:
    of_it = sa.and_(run.c.outcome == template["outcome"], run.c.tenant != _TEMPLATES)
    _copy_input(connection, template, of_it)
    results = (
        sa.select(run.c.id, run_result.c.result)
        .join_from(run, run_result, sa.true())
        .where(of_it, run_result.c.run_id == template["id"])
    )
    connection.execute(sa.insert(run_result).from_select(["run_id", "result"], results))
    blobs = sa.select(run.c.id, run_blob.c.digest, run.c.tenant, run_blob.c.bytes).join_from(run, run_blob, sa.true())
    blobs = blobs.where(of_it, run_blob.c.run_id == template["id"])
    connection.execute(sa.insert(run_blob).from_select(["run_id", "digest", "tenant", "bytes"], blobs))
    told = {column.name: column for column in outbox.c if column.name not in ("id", "pub_seq")} | {
        "event_id": run.c.id + sa.literal("-") + sa.cast(outbox.c.seq, sa.Text()),
        "run_id": run.c.id, "tenant": run.c.tenant, "created_at": run.c.finished_at,
        "published": sa.true(), "fanned": sa.true(),
    }  # fmt: skip
    last = sa.select(sa.func.coalesce(sa.func.max(outbox.c.pub_seq), 0)).scalar_subquery()
    told["pub_seq"] = last + sa.func.row_number().over(order_by=(run.c.id, outbox.c.seq))
    events = sa.select(*(column.label(name) for name, column in told.items())).join_from(run, outbox, sa.true())
    events = events.where(of_it, run.c.created_at >= since, outbox.c.run_id == template["id"])
    connection.execute(sa.insert(outbox).from_select(list(told), events))


def _copy_input(connection: sa.Connection, template: Row, of_it: sa.ColumnElement[bool]) -> None:
    inputs = sa.select(run.c.id, run_input.c.scenario, run_input.c.bundle).join_from(run, run_input, sa.true())
    inputs = inputs.where(of_it, run.c.tenant != _TEMPLATES, run_input.c.run_id == template["id"])
    connection.execute(sa.insert(run_input).from_select(["run_id", "scenario", "bundle"], inputs))


def _settle(store: SqlStore) -> None:
    """What PostgreSQL does by itself within a minute; SQLite keeps no statistics, and does nothing."""
    if not store._db.is_sqlite:
        with store._db.read() as connection:
            connection.exec_driver_sql("VACUUM ANALYZE")
