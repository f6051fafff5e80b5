"""The servers that other tests stand on: real, closed to strangers, fresh, and gone afterwards."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psycopg
import pytest
import redis
from sqlalchemy import create_engine, text

from tests.servers import LOOPBACK, ONCE, NotInstalled, PostgresServer, RedisServer, run_postgres, run_redis

ROOT = Path(__file__).parents[2]


def test_redis_keeps_what_it_is_given(redis_server: RedisServer) -> None:
    with redis.Redis.from_url(redis_server.url) as client:
        client.set("colour", "green", ex=60)
        assert client.get("colour") == b"green"


def test_redis_answers_nobody_without_the_password(redis_server: RedisServer) -> None:
    with (
        redis.Redis(host=LOOPBACK, port=redis_server.port, retry=ONCE) as stranger,
        pytest.raises(redis.AuthenticationError),
    ):
        stranger.ping()


def test_passwords_stand_on_no_command_line(redis_server: RedisServer, postgres_server: PostgresServer) -> None:
    for server in (redis_server, postgres_server):
        assert server.password not in Path(f"/proc/{server.pid}/cmdline").read_text()


def test_servers_listen_on_loopback_only(redis_server: RedisServer, postgres_server: PostgresServer) -> None:
    table = [
        line.split() for file in ("tcp", "tcp6") for line in Path(f"/proc/net/{file}").read_text().splitlines()[1:]
    ]
    listening = {row[1] for row in table if row[3] == "0A"}

    for server in (redis_server, postgres_server):
        assert [address for address in listening if address.endswith(f":{server.port:04X}")] == [
            f"0100007F:{server.port:04X}"
        ]


def test_a_stopped_redis_leaves_no_process_and_no_port() -> None:
    with run_redis() as server:
        assert _is_alive(server.pid)

    assert not _is_alive(server.pid)
    with redis.Redis.from_url(server.url, retry=ONCE) as client, pytest.raises(redis.ConnectionError):
        client.ping()


def test_a_redis_that_a_test_has_killed_is_cleaned_up_all_the_same() -> None:
    with run_redis() as server:
        os.kill(server.pid, signal.SIGKILL)


def test_postgres_databases_are_empty_and_separate(postgres_server: PostgresServer) -> None:
    with postgres_server.fresh_database() as one, postgres_server.fresh_database() as other:
        assert one != other
        _execute(one, "CREATE TABLE run (id text)")
        assert _execute(one, "SELECT count(*) FROM run") == 0
        assert _execute(other, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == 0


def test_a_postgres_database_is_dropped_even_when_someone_is_still_connected(postgres_server: PostgresServer) -> None:
    with postgres_server.fresh_database() as url:
        left_open = psycopg.connect(url.replace("+psycopg", ""))

    with pytest.raises(psycopg.OperationalError):
        left_open.execute("SELECT 1")
    left_open.close()
    name = url.rpartition("/")[2].partition("?")[0]
    still_there = f"SELECT count(*) FROM pg_database WHERE datname = '{name}'"
    assert _execute(postgres_server.url("postgres"), still_there) == 0
    with postgres_server.fresh_database() as control:
        name = control.rpartition("/")[2].partition("?")[0]
        still_there = f"SELECT count(*) FROM pg_database WHERE datname = '{name}'"
        assert _execute(postgres_server.url("postgres"), still_there) == 1


def test_postgres_answers_nobody_without_the_password(postgres_server: PostgresServer) -> None:
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(f"host={LOOPBACK} port={postgres_server.port} user=postgres password=wrong")


def test_a_stopped_postgres_leaves_no_process() -> None:
    with run_postgres() as server:
        assert _is_alive(server.pid)

    assert not _is_alive(server.pid)


def test_each_test_gets_its_own_sqlite_file(sqlite_database: str) -> None:
    assert not Path(sqlite_database.removeprefix("sqlite:///")).exists()
    assert _execute(sqlite_database, "SELECT 1") == 1


def test_the_postgres_fixture_gives_a_database_to_work_in(postgres_database: str) -> None:
    assert _execute(postgres_database, "SELECT 1") == 1


@pytest.mark.parametrize("run", ["run_redis", "run_postgres"])
def test_servers_end_with_a_test_process_that_is_killed(run: str) -> None:
    program = f"from tests.servers import {run}\nwith {run}() as s: print(s.pid, flush=True); input()"
    owner = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        working_directory = Path(os.readlink(f"/proc/{pid}/cwd"))
        assert _is_alive(pid)
        owner.kill()

    assert _ends(pid)
    left_behind = Path(tempfile.gettempdir(), working_directory.relative_to(tempfile.gettempdir()).parts[0])
    shutil.rmtree(left_behind)  # nobody was left to do it


def test_a_server_that_is_not_installed_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)

    with pytest.raises(NotInstalled, match=r"redis-server is not installed \(Debian: redis-server\)"), run_redis():
        pass


def _execute(url: str, statement: str) -> object:
    engine = create_engine(url)
    try:
        with engine.begin() as connection:
            result = connection.execute(text(statement))
            return result.scalar() if result.returns_rows else None
    finally:
        engine.dispose()


def _is_alive(pid: int) -> bool:
    """A process that has ended and waits for its parent is not alive."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except (FileNotFoundError, ProcessLookupError):
        return False


def _ends(pid: int) -> bool:
    for _ in range(200):
        if not _is_alive(pid):
            return True
        time.sleep(0.05)
    return False
