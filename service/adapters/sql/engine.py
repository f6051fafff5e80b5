"""One database, two dialects: how each begins, locks and tells the time. Vendor errors are translated here, once.

SQLite (the embedded default) in WAL mode; PostgreSQL, READ COMMITTED, when more than one host takes part. Every instant
is the database's own clock, stored as microseconds since the epoch, so that hosts whose clocks differ agree.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects.sqlite.base import SQLiteCompiler
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError, InterfaceError, InternalError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from service.core.errors import BlastdoorError, StorageFull, Unavailable

Synchronous = Literal["FULL", "NORMAL"]
LOCK_TIMEOUT = timedelta(seconds=10)
"""How long a statement waits for another transaction before the caller is told to try again."""
IDLE_TIMEOUT = timedelta(seconds=10)
"""PostgreSQL ends a transaction whose client has said nothing for so long. SQLite has no such thing: whoever stops a
process in the middle of a write stops every writer, until it goes on or dies."""
_VANISHED = {
    "connect_timeout": 5, "keepalives": 1, "keepalives_idle": 5, "keepalives_interval": 3, "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}  # fmt: skip
"""A server that has gone without a word is noticed within 15 s, half a lease: nothing waits for it for ever."""
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class Span(sa.TypeDecorator[timedelta]):
    """A timedelta as whole microseconds."""

    impl = sa.BigInteger
    cache_ok = True

    def process_bind_param(self, value: timedelta | None, dialect: sa.Dialect) -> int | None:
        return None if value is None else value // _MICROSECOND

    def process_result_value(self, value: int | None, dialect: sa.Dialect) -> timedelta | None:
        return None if value is None else timedelta(microseconds=value)


class Instant(sa.TypeDecorator[datetime]):
    """An aware UTC datetime as microseconds since the epoch: the same number in both databases, and no time zones."""

    impl = sa.BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> int | None:
        return None if value is None else (value - EPOCH) // _MICROSECOND

    def process_result_value(self, value: int | None, dialect: sa.Dialect) -> datetime | None:
        return None if value is None else EPOCH + timedelta(microseconds=value)

    def coerce_compared_value(self, op: Any, value: Any) -> sa.types.TypeEngine[Any]:
        return Span() if isinstance(value, timedelta) else self


class db_now(FunctionElement[datetime]):  # noqa: N801 - reads as the SQL function that it is
    """The database's clock: in PostgreSQL to the microsecond (real time, not the transaction's start), in SQLite to the
    millisecond."""

    type = Instant()
    inherit_cache = True  # a subclass of ColumnElement would have no cache key, and every statement be compiled anew


@compiles(db_now, "sqlite")
def _sqlite_now(element: db_now, compiler: SQLCompiler, **kw: Any) -> str:
    # A double holds today's Julian day to 40 µs, so the millisecond that SQLite keeps comes out exact.
    return "CAST(ROUND((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER) * 1000"


@compiles(db_now, "postgresql")
def _postgresql_now(element: db_now, compiler: SQLCompiler, **kw: Any) -> str:
    return "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000000 AS BIGINT)"


class _WithIndexHints(SQLiteCompiler):
    """SQLAlchemy renders `with_hint` for other databases, not for SQLite."""

    def get_from_hint_text(self, table: sa.FromClause, text: str | None) -> str | None:
        return text


class Database:
    """Connections of this process to one database. Opens nothing until it is asked; safe over fork.

    `synchronous` is SQLite's: FULL survives power loss; NORMAL may lose the last commits then, never consistency.
    """

    def __init__(self, url: str, *, synchronous: Synchronous = "FULL") -> None:
        self.url = sa.make_url(url)
        if self.url.get_backend_name() == "postgresql" and self.url.drivername == "postgresql":
            self.url = self.url.set(drivername="postgresql+psycopg")
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self._synchronous = synchronous
        self._opening = threading.Lock()
        self._writing = threading.Lock()
        self._opened: tuple[int, sa.Engine] | None = None
        self._reading: sa.Engine | None = None
        self._inherited: list[sa.Engine] = []

    @property
    def engine(self) -> sa.Engine:
        """This process's engine. A child that inherited one makes its own, and keeps the parent's from being closed:
        closing SQLite files or PostgreSQL sockets here would take them from the parent."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._open()
        assert self._opened is not None
        return self._opened[1]

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """For reading: each statement on its own, at no cost of a transaction. Raises Unavailable."""
        engine = self.engine
        with _translated(), (self._reading or engine).connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """One transaction, committed when the block ends without an exception. Raises Unavailable, StorageFull.

        SQLite takes its one write lock at BEGIN, so that what was read stays true until the commit. Threads of this
        process queue for it here, because SQLite itself waits by sleeping, up to 100 ms at a time.
        """
        engine = self.engine
        with _translated():
            if not self.is_sqlite:
                with engine.begin() as connection:
                    yield connection
                return
            if not self._writing.acquire(timeout=LOCK_TIMEOUT.total_seconds()):
                raise Unavailable("the database is busy")
            try:
                with engine.begin() as connection:
                    yield connection
            finally:
                self._writing.release()

    def close(self) -> None:
        """Close this process's connections; the next use opens them again."""
        with self._opening:
            if self._opened is not None and self._opened[0] == os.getpid():
                self._opened[1].dispose()
                self._opened = self._reading = None

    def _open(self) -> None:
        with self._opening:
            if self._opened is not None:
                if self._opened[0] == os.getpid():
                    return
                self._inherited.append(self._opened[1])
                self._writing = threading.Lock()
            engine = self._sqlite() if self.is_sqlite else self._postgresql()
            # Not SQLAlchemy's AUTOCOMMIT for SQLite: it costs two pragmas each time a connection is given back.
            reading = {"begins": False} if self.is_sqlite else {"isolation_level": "AUTOCOMMIT"}
            self._reading = engine.execution_options(**reading)
            self._opened = (os.getpid(), engine)

    def _sqlite(self) -> sa.Engine:
        engine = sa.create_engine(
            self.url, connect_args={"timeout": LOCK_TIMEOUT.total_seconds()}, pool_size=10, max_overflow=30
        )
        engine.dialect.statement_compiler = _WithIndexHints
        synchronous = self._synchronous

        @event.listens_for(engine, "connect")
        def _prepare(connection: DBAPIConnection, record: object) -> None:
            connection.isolation_level = None  # the driver begins nothing by itself; `_begin` does
            for pragma in ("journal_mode=WAL", f"synchronous={synchronous}", "foreign_keys=ON"):
                connection.execute(f"PRAGMA {pragma}").close()

        @event.listens_for(engine, "begin")
        def _begin(connection: sa.Connection) -> None:
            if connection.get_execution_options().get("begins", True):
                connection.exec_driver_sql("BEGIN IMMEDIATE")

        return engine

    def _postgresql(self) -> sa.Engine:
        engine = sa.create_engine(
            self.url,
            isolation_level="READ COMMITTED",
            pool_size=10,
            max_overflow=30,
            pool_pre_ping=True,
            connect_args=_VANISHED,
        )

        @event.listens_for(engine, "connect")
        def _prepare(connection: DBAPIConnection, record: object) -> None:
            cursor = connection.cursor()
            cursor.execute(f"SET lock_timeout = {LOCK_TIMEOUT // timedelta(milliseconds=1)}")
            # A process that was stopped in the middle of a claim would keep everybody else from claiming.
            cursor.execute(f"SET idle_in_transaction_session_timeout = {IDLE_TIMEOUT // timedelta(milliseconds=1)}")
            cursor.close()
            connection.commit()

        return engine


@contextmanager
def _translated() -> Iterator[None]:
    """Vendor errors in our words. What is neither weather nor a full disk is a defect of ours, and says so."""
    try:
        yield
    except DBAPIError as error:
        if _disk_full(error):
            raise StorageFull("the database has no room left") from error
        if error.connection_invalidated or isinstance(error, OperationalError | InterfaceError | InternalError):
            raise Unavailable("the database cannot be used at the moment") from error
        if getattr(error.orig, "sqlstate", None) == "42501":
            raise BlastdoorError(
                "the database does not allow this user to do that; `python -m service.main migrate`, run by the "
                "tables' owner, makes the tables and gives each process its rights"
            ) from error
        raise BlastdoorError("the database refused a statement") from error
    except PoolTimeout as error:
        raise Unavailable("every connection to the database is in use") from error
    except SQLAlchemyError as error:
        raise BlastdoorError("the database's answer could not be used") from error


def _disk_full(error: DBAPIError) -> bool:
    return getattr(error.orig, "sqlite_errorname", None) == "SQLITE_FULL" or (
        getattr(error.orig, "sqlstate", None) == "53100"
    )
