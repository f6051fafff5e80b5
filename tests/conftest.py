"""Fixtures that more than one folder uses: real servers, started once, and a fresh database for each test."""

import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.servers import NotInstalled, PostgresServer, RedisServer, run_postgres, run_redis
from tests.stack import NoStack, Stack, run_stack
from tests.summary import ran

# How long an example takes says something of the machine, not of the code.
settings.register_profile("blastdoor", deadline=None)
settings.load_profile("blastdoor")

# A shell that starts the tests in the background has them ignore it, and whatever they start as well.
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["pytester", "tests.ground_rules"]


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """A Redis of our own, with a password, that keeps nothing; a test that breaks it takes `run_redis` instead."""
    try:
        with run_redis() as server:
            ran("redis", server.version)
            yield server
    except NotInstalled as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A PostgreSQL of our own; a test that breaks it takes `run_postgres` instead."""
    try:
        with run_postgres() as server:
            yield server
    except NotInstalled as missing:
        pytest.skip(str(missing))


@pytest.fixture
def postgres_database(postgres_server: PostgresServer) -> Iterator[str]:
    """The SQLAlchemy URL of an empty database, dropped after the test whoever is still connected."""
    with postgres_server.fresh_database() as url:
        ran("database", f"postgresql {postgres_server.version}")
        yield url


@pytest.fixture
def sqlite_database(tmp_path: Path) -> str:
    """The SQLAlchemy URL of a file that does not exist yet."""
    ran("database", f"sqlite {sqlite3.sqlite_version}")
    return f"sqlite:///{tmp_path / 'blastdoor.sqlite3'}"


@pytest.fixture(scope="session")
def running_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One real `blastdoor up` for the session; when it has stopped and anything is left of it, the session fails."""
    try:
        with run_stack(tmp_path_factory.mktemp("stack")) as stack:
            yield stack
    except NoStack as missing:
        pytest.skip(str(missing))


@pytest.fixture
def stack(running_stack: Stack) -> Stack:
    ran("boundary", "gvisor")
    ran("database", f"sqlite {sqlite3.sqlite_version}")
    return running_stack
