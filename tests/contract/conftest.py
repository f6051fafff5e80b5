"""The three stores, empty and migrated. Schemas are made once: SQLite's file is copied, PostgreSQL is emptied."""

import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from service.adapters.memory import MemoryStore
from service.adapters.sql.migrate import upgrade
from service.adapters.sql.schema import installation, metadata, relay_state
from service.adapters.sql_store import SqlStore
from tests.roles import roled_store
from tests.servers import PostgresServer
from tests.summary import ran

Store = MemoryStore | SqlStore


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def store(request: pytest.FixtureRequest) -> Store:
    """Each test runs three times, once on each."""
    chosen: Store = request.getfixturevalue(f"{request.param}_store")
    return chosen


@pytest.fixture(params=["sqlite", "postgresql"])
def sql_store(request: pytest.FixtureRequest) -> SqlStore:
    """For what only real databases can show."""
    chosen: SqlStore = request.getfixturevalue(f"{request.param}_store")
    return chosen


@pytest.fixture
def memory_store() -> MemoryStore:
    ran("database", "memory")
    return MemoryStore()


@pytest.fixture
def sqlite_store(tmp_path: Path, _migrated_file: Path) -> Iterator[SqlStore]:
    ran("database", f"sqlite {sqlite3.sqlite_version}")
    path = tmp_path / "blastdoor.sqlite3"
    shutil.copy(_migrated_file, path)
    store = SqlStore(f"sqlite:///{path}", synchronous="NORMAL")
    yield store
    store.close()


@pytest.fixture
def postgresql_store(postgres_server: PostgresServer, _migrated_postgres: SqlStore) -> SqlStore:
    ran("database", f"postgresql {postgres_server.version}")
    kept = {installation.name, relay_state.name}
    tables = ", ".join(table.name for table in metadata.sorted_tables if table.name not in kept)
    with _migrated_postgres._db.write() as connection:
        connection.execute(sa.text(f"TRUNCATE {tables}"))
        connection.execute(
            sa.update(relay_state).values(owner=None, lease_until=None, last_stamp=0, bus_identity=None, owed="{}")
        )
    return _migrated_postgres


@pytest.fixture(scope="session")
def _migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("schema") / "migrated.sqlite3"
    upgrade(f"sqlite:///{path}")  # the last connection that closes leaves all in the one file
    return path


@pytest.fixture(scope="session")
def _migrated_postgres(postgres_server: PostgresServer) -> Iterator[SqlStore]:
    """Each question is asked under the role of a process that asks it, so what a role lacks shows here."""
    with roled_store(postgres_server) as store:
        yield store
