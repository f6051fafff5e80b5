"""The Redis of compose.yaml: a user for each process, what none may do, and Celery's transport without scripts."""

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from kombu import Connection

from service.adapters.celery_queue import CeleryDoorbell, celery_app
from service.adapters.redis_bus import RedisBus
from service.core.errors import Unavailable
from service.core.ids import new_id, new_run_id
from service.core.ports.publishing import OutboxRow
from tests.deployment import ROLES, RedisWithUsers, make_secrets, redis_with_users
from tests.servers import ONCE, NotInstalled, RedisServer

USERS = (*ROLES, "application")
DANGEROUS = [
    ("EVAL", "return 1", "0"), ("SCRIPT", "LOAD", "return 1"), ("FUNCTION", "LIST"), ("CONFIG", "GET", "*"),
    ("MODULE", "LIST"), ("REPLICAOF", "NO", "ONE"), ("FLUSHALL",), ("KEYS", "*"),
    ("ACL", "LIST"), ("CLIENT", "LIST"), ("MONITOR",), ("SAVE",),
]  # fmt: skip
ELSEWHERE = {
    "api": [("XADD", "blastdoor:events", "*", "a", "b"), ("XRANGE", "blastdoor:events", "-", "+"),
            ("BRPOP", "boundary.gvisor", "0.01"), ("HGETALL", "unacked"), ("GET", "other"), ("INFO",)],
    "relay": [("BRPOP", "boundary.gvisor", "0.01"), ("HGETALL", "unacked"), ("DEL", "blastdoor:events"),
              ("XADD", "other", "*", "a", "b")],
    "webhooks": [("LPUSH", "boundary.gvisor", "x"), ("XRANGE", "blastdoor:events", "-", "+"), ("GET", "other"),
                 ("INFO",)],
    "worker": [("XADD", "blastdoor:events", "*", "a", "b"), ("XRANGE", "blastdoor:events", "-", "+"),
               ("GET", "unacked"), ("LPUSH", "other", "x"), ("DEL", "blastdoor:events"), ("INFO",)],
    "reaper": [("BRPOP", "boundary.gvisor", "0.01"), ("XADD", "blastdoor:events", "*", "a", "b"), ("INFO",)],
    "application": [("XADD", "blastdoor:events", "*", "a", "b"), ("XTRIM", "blastdoor:events", "MAXLEN", "0"),
                    ("XDEL", "blastdoor:events", "1-0"), ("DEL", "blastdoor:events"),
                    ("XGROUP", "DESTROY", "blastdoor:events", "g"), ("LPUSH", "boundary.gvisor", "x"),
                    ("PUBLISH", "blastdoor:hint:run", "x"), ("SUBSCRIBE", "blastdoor:hint:run"), ("INFO",)],
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisWithUsers]:
    try:
        with redis_with_users(make_secrets(tmp_path_factory.mktemp("secrets"))) as started:
            yield started
    except NotInstalled as missing:
        pytest.skip(str(missing))


def said(client: "redis.Redis", *words: str) -> str:
    try:
        return repr(client.execute_command(*words))
    except redis.ResponseError as error:
        return f"{type(error).__name__}: {error}"


def is_refused(client: "redis.Redis", *words: str) -> bool:
    return said(client, *words).startswith("NoPermissionError")


@pytest.mark.parametrize("user", USERS)
def test_a_user_may_use_neither_dangerous_commands_nor_the_keys_of_others(
    server: RedisWithUsers, redis_server: RedisServer, user: str
) -> None:
    with server.client(user) as client, redis.Redis.from_url(redis_server.url) as anybody:
        assert client.ping()
        for words in [*DANGEROUS, *ELSEWHERE[user]]:
            assert is_refused(client, *words), (words, said(client, *words))
            if words[0] not in ("MONITOR", "SUBSCRIBE", "SAVE", "FLUSHALL"):  # what the control should not do, either
                assert not is_refused(anybody, *words), f"the control: {words} works where nothing forbids it"


@pytest.mark.parametrize("user", USERS)
def test_of_the_dangerous_and_the_scripting_commands_a_user_has_none(
    server: RedisWithUsers, redis_server: RedisServer, user: str
) -> None:
    """Every command that this Redis has in these categories, by its own judgement."""
    (line,) = (line for line in server.users.splitlines() if line.startswith(f"user {user} "))
    name, rules = new_id("usr"), line.split()[2:]
    with redis.Redis.from_url(redis_server.url, decode_responses=True, protocol=2) as control:
        control.execute_command("ACL", "SETUSER", name, *rules)
        try:
            allowed = {
                command
                for category in ("dangerous", "scripting", "admin")
                for command in control.execute_command("ACL", "CAT", category)
                if _may(control, name, command)
            }
            assert _may(control, name, "ping"), "the control: what it may do is seen"
        finally:
            control.execute_command("ACL", "DELUSER", name)
    assert allowed == ({"info"} if user == "relay" else set())


def _may(control: "redis.Redis", user: str, command: str) -> bool:
    about: Any = control.execute_command("COMMAND", "INFO", command)
    (row,) = about.values() if isinstance(about, dict) else about
    arity = abs(row["arity"] if isinstance(row, dict) else row[1])
    words = command.split("|")
    answer = control.execute_command("ACL", "DRYRUN", user, *words, *["1"] * (arity - len(words)))
    return "permissions to run" not in str(answer)


def test_nobody_gets_in_without_a_name_and_a_password(server: RedisWithUsers) -> None:
    for words in ({}, {"password": server.variables["REDIS_API_PASSWORD"]}, {"username": "api", "password": "wrong"}):
        with redis.Redis(port=server.port, retry=ONCE, **words) as client, pytest.raises(redis.AuthenticationError):
            client.ping()
    with redis.Redis(port=server.port, username="health", password="anything", retry=ONCE) as client:
        assert client.ping()
        assert is_refused(client, "INFO")
        assert is_refused(client, "GET", "boundary.gvisor")


def test_passwords_are_kept_as_hashes_and_are_in_no_command_line(server: RedisWithUsers) -> None:
    command = Path(f"/proc/{server.pid}/cmdline").read_text()
    for user in USERS:
        password = server.variables[f"REDIS_{user.upper()}_PASSWORD"]
        assert password not in server.users
        assert hashlib.sha256(password.encode()).hexdigest() in server.users
        assert password not in command
    assert "redis-server" in command


def test_what_is_acknowledged_is_on_the_disk_and_nothing_is_evicted(server: RedisWithUsers) -> None:
    with server.client("relay") as client:
        about: Any = client.info()
    assert (about["aof_enabled"], about["maxmemory_policy"]) == (1, "noeviction")


def test_the_relay_publishes_and_the_application_reads_in_a_group(server: RedisWithUsers) -> None:
    bus = RedisBus(server.url("relay"))
    bus.create_stream()
    row = OutboxRow(event_id="evt_1", run_id=new_run_id(), tenant="acme", type="t", pub_seq=1, event={"id": "evt_1"})
    bus.publish([row])
    with server.client("application") as client:
        client.xgroup_create("blastdoor:events", "shop", id="0")
        ((_, ((number, fields),)),) = client.xreadgroup("shop", "one", {"blastdoor:events": ">"})
        claimed = client.xautoclaim("blastdoor:events", "shop", "two", 0, "0-0")
        assert json.loads(fields["event"]) == {"id": "evt_1"}
        assert claimed[1][0][0] == number == "1-0"
        assert client.xpending("blastdoor:events", "shop")["pending"] == 1
        assert client.xack("blastdoor:events", "shop", number) == 1
    assert bus.last_published() == 1
    with pytest.raises(Unavailable, match="NoPermission"):
        RedisBus(server.url("application")).publish([row.model_copy(update={"pub_seq": 2})])


@pytest.mark.parametrize("user", ["api", "relay", "reaper"])
def test_a_bell_that_its_worker_died_with_is_put_back_without_a_script(server: RedisWithUsers, user: str) -> None:
    CeleryDoorbell(server.url(user)).ring("gvisor")
    app = celery_app(server.url("worker"))
    with app.connection_for_read() as connection, connection.channel() as channel:
        _taken_long_ago(server, channel, tag := new_id("tag"))

        channel.qos.restore_visible(interval=1)

        with server.client("worker") as client:
            assert client.llen("boundary.gvisor") == 1
            assert client.hget("unacked", tag) is None
            client.brpop(["boundary.gvisor"], 1)
    own = Connection(server.url("worker"), transport_options={"visibility_timeout": 60})
    with own, own.channel() as channel, pytest.raises(redis.exceptions.NoPermissionError):
        channel.qos.restore_visible(interval=1)  # the control: kombu's own transport does it with a script
    with server.client("worker") as client:
        client.delete("unacked_mutex")


def _taken_long_ago(server: RedisWithUsers, channel: Any, tag: str) -> None:
    with server.client("worker") as client:
        _, message = client.brpop(["boundary.gvisor"], 5)
        queue = "boundary.gvisor"
        client.sadd("_kombu.binding.boundary.gvisor", f"{queue}{channel.sep}{channel.sep}{queue}")
        client.hset("unacked", tag, json.dumps([json.loads(message), queue, queue]))
        client.zadd("unacked_index", {tag: time.time() - 10 * channel.visibility_timeout})
