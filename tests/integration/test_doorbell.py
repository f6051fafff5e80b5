"""The doorbell over a real Redis, a real worker that hears it, and messages that somebody else put on the queue."""

import base64
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from service.adapters.celery_queue import WORKER_ENVIRONMENT, CeleryDoorbell, celery_app
from service.core.errors import Unavailable
from tests.servers import RedisServer, run_redis

QUEUE = "boundary.gvisor"
EMBED: dict[str, Any] = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
RING_AGAIN = {"task": "workers.ring", "args": [], "kwargs": {}, "options": {"queue": QUEUE}, "immutable": False}
WITHIN_S = 20.0


class Hearing:
    """A worker of queue `boundary.gvisor` in a process of its own, and what it was made to do."""

    def __init__(self, url: str, log: Path) -> None:
        self.url = url
        self.doorbell = CeleryDoorbell(url)
        self.redis = redis.Redis.from_url(url, decode_responses=True)
        self._log = log

    def lines(self) -> list[str]:
        return self._log.read_text().splitlines()

    def wait_for(self, line: str, *, times: int) -> None:
        eventually(lambda: self.lines().count(line) >= times)

    def a_bell(self) -> dict[str, Any]:
        """One as it is on the queue, caught where no worker listens."""
        self.doorbell.ring("nobody")
        item: Any = self.redis.rpop("boundary.nobody")
        return dict(json.loads(item))


def eventually(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not true():
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.02)


@contextmanager
def hearing(url: str, directory: Path, *, ring_s: float = 0) -> Iterator[Hearing]:
    answered, log = directory / "answered", directory / "log"
    answered.touch()
    environment = {
        "PATH": os.environ["PATH"], "BLASTDOOR_REDIS_URL": url, "RING_S": str(ring_s), **WORKER_ENVIRONMENT
    }  # fmt: skip
    argv = [sys.executable, "-W", "ignore", "-m", "tests.integration.bell_worker", "gvisor", str(answered)]
    with log.open("wb") as output:
        worker = subprocess.Popen(argv, env=environment, stdout=output, stderr=output)
    heard = Hearing(url, answered)
    try:
        heard.doorbell.ring("gvisor")
        heard.wait_for("answered", times=1)
        answered.write_text("")
        yield heard
    finally:
        heard.redis.close()
        worker.send_signal(signal.SIGKILL if sys.exc_info()[0] else signal.SIGTERM)
        worker.wait(timeout=40)
        print(log.read_text())


@pytest.fixture(scope="module")
def heard(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hearing]:
    url = redis_server.url.removesuffix("/0") + "/5"
    with hearing(url, tmp_path_factory.mktemp("worker")) as worker:
        yield worker


class Planted:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self._path,)


def _message(bell: dict[str, Any], *, body: object = None, raw: bytes | None = None, **changed: Any) -> dict[str, Any]:
    """The bell with another body, or with some headers or parts changed."""
    if body is not None or raw is not None:
        bell["body"] = base64.b64encode(json.dumps(body).encode() if raw is None else raw).decode()
    bell["headers"]["id"] = str(uuid.uuid4())
    for name, value in changed.items():
        part = name.replace("_", "-")
        if part in bell:
            bell[part] = value
        else:
            bell["headers"][name] = value
    return bell


HOSTILE: dict[str, Callable[[dict[str, Any], Path], Any]] = {
    "a pickle": lambda bell, planted: _message(
        bell, raw=pickle.dumps(Planted(planted)), content_type="application/x-python-serialize"
    ),
    "a pickle in a body's place": lambda bell, planted: _message(
        bell, raw=pickle.dumps(([Planted(planted)], {}, EMBED)), content_type="application/x-python-serialize",
        content_encoding="binary",
    ),
    "YAML": lambda bell, planted: _message(
        bell, raw=f"!!python/object/apply:os.mkdir ['{planted}']".encode(), content_type="application/x-yaml"
    ),
    "an unknown task": lambda bell, planted: _message(bell, task="os.system", body=[[f"touch {planted}"], {}, EMBED]),
    "a task of Celery's own": lambda bell, _: _message(bell, task="celery.map", body=[[RING_AGAIN, [[]]], {}, EMBED]),
    "arguments": lambda bell, _: _message(bell, body=[["x"], {}, EMBED]),
    "keyword arguments": lambda bell, _: _message(bell, body=[[], {"x": 1}, EMBED]),
    "a callback": lambda bell, _: _message(bell, body=[[], {}, EMBED | {"callbacks": [RING_AGAIN]}]),
    "a chain": lambda bell, _: _message(bell, body=[[], {}, EMBED | {"chain": [RING_AGAIN]}]),
    "a start time": lambda bell, _: _message(bell, eta="2099-01-01T00:00:00+00:00"),
    "a time limit": lambda bell, _: _message(bell, timelimit=[0.001, 0.001]),
    "an expiry that is none": lambda bell, _: _message(bell, expires={}),
    "a name that is not hashable": lambda bell, _: _message(bell, task=["workers.ring"]),
    "the old protocol": lambda bell, _: _message(
        bell, body={"task": "workers.ring", "id": "x", "args": [], "kwargs": {}}, headers={}
    ),
    "no body": lambda bell, _: _message(bell, body=5),
    "a compressed body": lambda bell, _: _message(bell, compression="zlib"),
    "deep nesting": lambda bell, _: _message(bell, raw=b"[" * 100_000),
    "an expired bell": lambda bell, _: _message(bell, expires="2001-01-01T00:00:00+00:00"),
}  # fmt: skip


def test_a_bell_is_answered_once(heard: Hearing) -> None:
    before = heard.lines().count("answered")

    heard.doorbell.ring("gvisor")

    heard.wait_for("answered", times=before + 1)
    _assert_quiet(heard)
    assert heard.lines().count("answered") == before + 1


def test_a_bell_made_by_hand_is_answered_so_the_hostile_ones_are_refused_for_what_they_carry(heard: Hearing) -> None:
    before = heard.lines().count("answered")

    heard.redis.lpush(QUEUE, json.dumps(_message(heard.a_bell())))

    heard.wait_for("answered", times=before + 1)


@pytest.mark.parametrize("what", HOSTILE)
def test_a_message_that_is_not_a_bell_runs_nothing_and_the_next_bell_is_answered(
    what: str, heard: Hearing, tmp_path: Path
) -> None:
    planted, before = tmp_path / "planted", heard.lines()

    heard.redis.lpush(QUEUE, json.dumps(HOSTILE[what](heard.a_bell(), planted)))
    heard.doorbell.ring("gvisor")

    heard.wait_for("answered", times=before.count("answered") + 1)
    _assert_quiet(heard)
    assert heard.lines() == [*before, "rung [] {}", "answered"]
    assert not planted.exists()


def test_the_planted_pickle_would_have_worked(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Planted(tmp_path / "planted")))

    assert (tmp_path / "planted").exists()


def test_a_message_names_its_queue_and_nothing_of_ours(heard: Hearing) -> None:
    bell = heard.a_bell()

    assert json.loads(base64.b64decode(bell["body"])) == [[], {}, EMBED]
    assert bell["properties"]["delivery_info"] == {"exchange": "", "routing_key": "boundary.nobody"}


def test_workers_take_no_commands_and_send_no_events(heard: Hearing) -> None:
    keys: Any = heard.redis.keys("*")

    assert [key for key in keys if "pidbox" in key or "celeryev" in key] == []
    assert heard.redis.pubsub_channels() == []
    assert heard.redis.pubsub_numpat() == 0


def test_a_busy_worker_takes_no_bell_that_another_could_answer(redis_server: RedisServer, tmp_path: Path) -> None:
    url = redis_server.url.removesuffix("/0") + "/6"
    with hearing(url, tmp_path, ring_s=1) as heard:
        heard.doorbell.ring("gvisor")
        heard.wait_for("rung [] {}", times=1)
        heard.doorbell.ring("gvisor")
        time.sleep(0.3)

        assert heard.redis.llen(QUEUE) == 1
        assert heard.redis.hlen("unacked") == 1

        heard.wait_for("answered", times=2)


def test_the_timeouts_of_redelivery_are_in_force_on_the_connection(redis_server: RedisServer) -> None:
    app = celery_app(redis_server.url)
    with app.connection_for_read() as connection:
        channel = connection.default_channel

        assert channel.visibility_timeout == app.conf.broker_transport_options["visibility_timeout"]
        assert (channel.unacked_restore_interval, channel.unacked_restore_throttle) == (10, 1)
        assert (channel.socket_keepalive, channel.health_check_interval) == (True, 25)


def test_a_bell_rings_after_redis_dropped_every_connection_and_every_key(redis_server: RedisServer) -> None:
    url = redis_server.url.removesuffix("/0") + "/7"
    doorbell = CeleryDoorbell(url)
    with redis.Redis.from_url(url) as client:
        doorbell.ring("gvisor")
        client.flushdb()
        client.client_kill_filter(_type="normal", skipme=True)

        doorbell.ring("gvisor")

        assert client.llen(QUEUE) == 1


def test_many_threads_ring_at_once_and_no_bell_is_lost(redis_server: RedisServer) -> None:
    url = redis_server.url.removesuffix("/0") + "/8"
    doorbell = CeleryDoorbell(url)

    def ring() -> None:
        for _ in range(20):
            doorbell.ring("gvisor")

    threads = [threading.Thread(target=ring) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    with redis.Redis.from_url(url) as client:
        assert client.llen(QUEUE) == 160


def test_a_forked_child_rings_on_a_connection_of_its_own(redis_server: RedisServer) -> None:
    url = redis_server.url.removesuffix("/0") + "/9"
    doorbell = CeleryDoorbell(url)
    doorbell.ring("gvisor")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            doorbell.ring("gvisor")
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    doorbell.ring("gvisor")

    assert status == 0
    with redis.Redis.from_url(url) as client:
        assert client.llen(QUEUE) == 3


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL], ids=["hangs", "is dead"])
def test_ringing_fails_within_two_seconds_when_redis(how: signal.Signals) -> None:
    with run_redis() as server:
        doorbell = CeleryDoorbell(server.url)
        doorbell.ring("gvisor")
        os.kill(server.pid, how)
        try:
            began = time.monotonic()
            with pytest.raises(Unavailable):
                doorbell.ring("gvisor")
            assert time.monotonic() - began < 2
        finally:
            os.kill(server.pid, signal.SIGCONT)
        if how is signal.SIGSTOP:
            doorbell.ring("gvisor")


def _assert_quiet(heard: Hearing) -> None:
    """Nothing is left on the queue, and nothing waits to be delivered again."""
    eventually(lambda: heard.redis.llen(QUEUE) == 0 and heard.redis.hlen("unacked") == 0)
