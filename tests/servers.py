"""Real servers for tests: processes of our own on loopback, in directories of their own, gone when the test is.

Each is started through `setpriv --pdeathsig`, so that even a killed pytest leaves none behind. PostgreSQL refuses to
run as root and then runs as the user `postgres` that its package made.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psycopg
import redis
from psycopg import sql
from redis.backoff import NoBackoff
from redis.retry import Retry

LOOPBACK = "127.0.0.1"
READY_WITHIN_S = 30.0
STOPPED_WITHIN_S = 10.0
ONCE = Retry(NoBackoff(), retries=0)  # the client's own waits are longer than a start
T = TypeVar("T")


class NotInstalled(Exception):
    """A server's program is not on this machine."""


@dataclass(frozen=True)
class RedisServer:
    port: int
    password: str
    pid: int
    version: str

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@{LOOPBACK}:{self.port}/0"


@dataclass(frozen=True)
class PostgresServer:
    port: int
    password: str
    pid: int
    version: str

    def url(self, database: str) -> str:
        """For SQLAlchemy, by way of psycopg 3."""
        return f"postgresql+psycopg://postgres:{self.password}@{LOOPBACK}:{self.port}/{database}"

    @contextmanager
    def fresh_database(self) -> Iterator[str]:
        """-> the URL of an empty database that lives as long as the block."""
        name = sql.Identifier(f"test_{secrets.token_hex(8)}")
        with psycopg.connect(_conninfo(self.port, self.password), autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(name))
            try:
                yield self.url(name.as_string().strip('"'))
            finally:
                connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))


@contextmanager
def run_redis() -> Iterator[RedisServer]:
    """A Redis that asks for a password and writes nothing to disk."""
    program = _program("redis-server", package="redis-server")
    password, port = secrets.token_urlsafe(24), _free_port()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bd-redis-")))
        configuration = directory / "redis.conf"
        configuration.touch(mode=0o600)  # before the password is in it
        configuration.write_text(
            f"bind {LOOPBACK}\nport {port}\ndir {directory}\nrequirepass {password}\n"
            'save ""\nappendonly no\ndaemonize no\n'
        )
        argv = [program, str(configuration)]
        process = stack.enter_context(_process(argv, stop=signal.SIGTERM, log=directory / "log"))
        client = stack.enter_context(redis.Redis(host=LOOPBACK, port=port, password=password, retry=ONCE))
        _wait_until(client.ping, process, log=directory / "log", not_yet=redis.ConnectionError)
        version = str(client.info("server")["redis_version"])
        yield RedisServer(port=port, password=password, pid=process.pid, version=version)


@contextmanager
def run_postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL that asks for a password, and trades safety against power loss for speed."""
    password, port = secrets.token_urlsafe(24), _free_port()
    initdb = _program("initdb", package="postgresql", also_in=_postgres_programs())
    postgres = _program("postgres", package="postgresql", also_in=_postgres_programs())
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bd-postgres-")))
        data, password_file = directory / "data", directory / "password"
        password_file.touch(mode=0o600)
        password_file.write_text(password)
        user = _user_for_postgres()
        if user:
            for path in (directory, password_file):
                shutil.chown(path, user=user, group=user)
        options = ["--username=postgres", f"--pwfile={password_file}", "--auth=scram-sha-256"]
        made = subprocess.run(
            [*_as_user(user), initdb, *options, "--encoding=UTF8", "--locale=C", "--no-sync", f"--pgdata={data}"],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert made.returncode == 0, made.stdout
        settings = {
            "listen_addresses": LOOPBACK, "port": port, "unix_socket_directories": directory, "max_connections": 200,
            "shared_buffers": "32MB", "fsync": "off", "synchronous_commit": "off", "full_page_writes": "off",
        }  # fmt: skip
        argv = [
            postgres,
            "-D",
            str(data),
            *(word for key, value in settings.items() for word in ("-c", f"{key}={value}")),
        ]
        log = directory / "log"
        process = stack.enter_context(_process(argv, stop=signal.SIGQUIT, log=log, user=user, cwd=directory))
        version = _wait_until(
            lambda: _postgres_version(port, password), process, log=log, not_yet=psycopg.OperationalError
        )
        yield PostgresServer(port=port, password=password, pid=process.pid, version=version)


def _postgres_version(port: int, password: str) -> str:
    with psycopg.connect(_conninfo(port, password)) as connection:
        major, minor = divmod(connection.info.server_version, 10_000)
        return f"{major}.{minor}"


def _conninfo(port: int, password: str) -> str:
    return f"host={LOOPBACK} port={port} user=postgres dbname=postgres password={password}"


def _postgres_programs() -> list[str]:
    """Debian keeps them by major version and off the PATH; the newest first."""
    return [str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]


def _user_for_postgres() -> str | None:
    return "postgres" if os.geteuid() == 0 else None


def _program(name: str, *, package: str, also_in: Sequence[str] = ()) -> str:
    found = shutil.which(name, path=os.pathsep.join([*also_in, os.environ.get("PATH", os.defpath)]))
    if found is None:
        raise NotInstalled(f"{name} is not installed (Debian: {package})")
    return found


def _as_user(user: str | None) -> list[str]:
    return ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"] if user else []


@contextmanager
def _process(
    argv: Sequence[str], *, stop: signal.Signals, log: Path, user: str | None = None, cwd: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run it, and end this very process afterwards: by the polite signal, then by force."""
    prefix = _as_user(user) or ["setpriv"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*prefix, "--pdeathsig", stop.name.removeprefix("SIG"), *argv],
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={"PATH": os.defpath, "LANG": "C.UTF-8"},
        )
    try:
        yield process
    finally:
        process.send_signal(stop)
        try:
            process.wait(STOPPED_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until(ready: Callable[[], T], process: subprocess.Popen[bytes], *, log: Path, not_yet: type[Exception]) -> T:
    """The first answer of a server that has just been started, or its log when there is none."""
    deadline = time.monotonic() + READY_WITHIN_S
    while True:
        try:
            return ready()
        except not_yet as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{process.args!r} is not ready:\n{log.read_text()}") from error
            time.sleep(0.02)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])
