"""What the migrations make is what the code believes, and two processes may make it at once."""

import multiprocessing
import re
import sqlite3
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from service.adapters.sql.custody import PLAYING
from service.adapters.sql.deliveries import DUE, DUE_OF_ONE, UNFANNED_EVENTS
from service.adapters.sql.documents import AHEAD, RANKS
from service.adapters.sql.engine import Database
from service.adapters.sql.fairness import FAIREST, SOMETHING_TO_CLAIM
from service.adapters.sql.keeping import EXPIRED, EXPIRED_WITH_BLOBS, STORED
from service.adapters.sql.line import QUEUED, UNDESTROYED
from service.adapters.sql.migrate import upgrade
from service.adapters.sql.orders import ORDERS
from service.adapters.sql.outbox import UNSTAMPED
from service.adapters.sql.schema import metadata
from service.adapters.sql.webhooks import ATTEMPTS, DEAD_LETTERS, OLD_DELIVERIES
from service.adapters.sql_store import SqlStore
from service.core.errors import StorageFull, Unavailable
from tests.contract.store_steps import add_run, add_tenant


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_database(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue({"sqlite": "sqlite_database", "postgresql": "postgres_database"}[request.param]))


@pytest.fixture
def migrated(empty_database: str) -> Iterator[sa.Connection]:
    upgrade(empty_database)
    db = Database(empty_database)
    with db.read() as connection:
        yield connection
    db.close()


def test_the_migrated_schema_is_the_one_in_the_code(migrated: sa.Connection) -> None:
    context = MigrationContext.configure(migrated, opts={"compare_type": True, "target_metadata": metadata})
    differences = compare_metadata(context, metadata)

    assert differences == []


def test_the_migrated_indexes_are_the_ones_in_the_code_with_their_conditions(migrated: sa.Connection) -> None:
    """Alembic does not compare what makes an index partial."""
    lists = {
        "sqlite": "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql > ''",
        "postgresql": "SELECT indexname, indexdef FROM pg_indexes",
    }
    made = {str(name): str(made) for name, made in migrated.execute(sa.text(lists[migrated.dialect.name]))}
    for table in metadata.tables.values():
        for index in table.indexes:
            where = index.dialect_options[migrated.dialect.name].get("where")
            expected = "" if where is None else _words(str(where))
            assert _words(made[str(index.name)].partition(" WHERE ")[2]) == expected, index.name


def _words(condition: str) -> str:
    """PostgreSQL spells conditions its own way."""
    spelled = condition.lower().replace("::text", "").replace("= any (array[", "in (").replace("])", ")")
    return re.sub(r"[()\s]", "", spelled)


def test_migrating_twice_changes_nothing(empty_database: str) -> None:
    upgrade(empty_database)
    store = SqlStore(empty_database)
    name = store.installation_id()
    add_tenant(store)
    run = add_run(store)
    store.migrate()
    again = SqlStore(empty_database)

    assert again.installation_id() == name
    assert store.get_run(run.id, "acme") == run
    again.close()
    store.close()


def test_processes_that_migrate_at_once_make_one_installation(empty_database: str) -> None:
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=upgrade, args=(empty_database,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    store = SqlStore(empty_database)

    assert [process.exitcode for process in processes] == [0] * 4
    assert store.installation_id()
    store.close()


def test_a_database_that_cannot_be_reached_is_unavailable(tmp_path: Path) -> None:
    for url in (f"sqlite:///{tmp_path}/absent/x.db", "postgresql+psycopg://nobody@127.0.0.1:1/none"):
        store = SqlStore(url)
        with pytest.raises(Unavailable):
            store.now()
        with pytest.raises(Unavailable):
            upgrade(url)


def test_a_database_that_was_never_migrated_says_so_in_our_words(empty_database: str) -> None:
    store = SqlStore(empty_database)
    with pytest.raises(Exception, match="database") as refusal:
        store.installation_id()
    assert refusal.type.__module__ == "service.core.errors"
    store.close()


def test_a_full_disk_is_no_room_and_what_was_stored_stays(sqlite_store: SqlStore) -> None:
    add_tenant(sqlite_store)
    run = add_run(sqlite_store)
    with sqlite_store._db.read() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
    with sqlite_store._db.write() as connection:
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StorageFull):
        _ = [add_run(sqlite_store) for _ in range(50)]

    assert sqlite_store.get_run(run.id, "acme").id == run.id


def test_sqlite_is_set_up_to_survive_power_loss(sqlite_database: str) -> None:
    store = SqlStore(sqlite_database)
    store.migrate()
    pragmas = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
    with store._db.write() as connection:
        found = [connection.exec_driver_sql(f"PRAGMA {pragma}").scalar_one() for pragma in pragmas]
    store.close()

    assert found == ["wal", 2, 1, 10_000]


def test_a_writer_elsewhere_is_waited_for_and_then_it_is_unavailable(
    sqlite_store: SqlStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_tenant(sqlite_store)
    with sqlite_store._db.read() as connection:
        path = connection.exec_driver_sql("PRAGMA database_list").one()[2]
    sqlite_store.close()
    monkeypatch.setattr("service.adapters.sql.engine.LOCK_TIMEOUT", timedelta(milliseconds=50))
    impatient = SqlStore(f"sqlite:///{path}")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable):
        add_run(impatient)
    other.execute("ROLLBACK")

    assert add_run(impatient).queue_position == 1
    other.close()
    impatient.close()


@pytest.mark.parametrize(
    ("statement", "indexes"),
    [
        (FAIREST, {"ix_run_claimable", "ix_run_tenant_phase_id"}),
        (SOMETHING_TO_CLAIM, {"ix_run_claimable", "ix_run_tenant_phase_id"}),
        (QUEUED, {"ix_run_queued"}),
        (UNDESTROYED, {"ix_run_not_known_gone"}),
        (AHEAD, {"ix_run_queue"}),
        (RANKS, {"ix_run_queue"}),
        (UNSTAMPED, {"ix_outbox_unstamped"}),
        (STORED, {"ix_run_blob_tenant_digest_bytes"}),
        (UNFANNED_EVENTS, {"ix_outbox_unfanned"}),
        (DUE, {"ix_webhook_delivery_pending"}),
        (DUE_OF_ONE, {"ix_webhook_delivery_pending"}),
        (ATTEMPTS, {"ix_webhook_attempt_endpoint_id_id"}),
        (DEAD_LETTERS, {"ix_webhook_delivery_dead"}),
        (OLD_DELIVERIES, {"ix_webhook_delivery_settled"}),
        (EXPIRED, {"ix_run_finished_at"}),
        (EXPIRED_WITH_BLOBS, {"ix_run_keeps_blobs"}),
        (ORDERS, {"ix_cleanup_action_ordered"}),
        (PLAYING, {"ix_run_lease_until"}),
    ],
    ids=[
        "claim",
        "waiting",
        "leases",
        "undestroyed",
        "ahead",
        "ranks",
        "stamp",
        "stored",
        "fan-out",
        "due",
        "due of one",
        "attempts",
        "dead letters",
        "old deliveries",
        "expired",
        "with blobs",
        "orders",
        "playing",
    ],
)
def test_sqlite_asks_the_small_indexes_and_not_every_run(
    sqlite_store: SqlStore, statement: sa.Select[Any], indexes: set[str]
) -> None:
    """Else it walks all runs, or a whole queue for each tenant: nothing that a test with ten runs would notice."""
    asked = re.sub(r"__\[POSTCOMPILE_\w+\]", "?", str(statement.compile(sqlite_store._db.engine)))
    with sqlite_store._db.read() as connection:
        plan = [row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {asked}", ("",) * asked.count("?"))]
    used = {index for line in plan for index in re.findall(r"INDEX (ix_\w+)", line)}

    assert used == indexes, plan
    assert not [
        line for line in plan if re.fullmatch(r"SCAN (run|run_blob|outbox|mine|next_|own|soonest|webhook_\w+)", line)
    ], plan
