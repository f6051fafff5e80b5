"""D43, D47, D49 and D50: Redis that dies and forgets, consumers that die, connections that hang, clocks that lie.
D49 and D50 with real sandboxes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from examples.main_app.consumer import GROUP, STREAM, Consumer
from examples.main_app.inbox import Customer, Inbox
from service.adapters.celery_queue import queue_name
from service.adapters.redis_bus import RedisBus
from tests.faults.place import ROOT, SCALED, Forks, Place, eventually
from tests.faults.program import PAPER, WITHOUT_LIFETIME
from tests.faults.proxy import Proxy
from tests.faults.scene import Scene, open_scene
from tests.sandboxes import require_gvisor
from tests.servers import PostgresServer
from tests.summary import ran

PASSED = ("passed", None, 1)
SELF_FENCE_S = float(SCALED["BLASTDOOR_SELF_FENCE_S"])
RECOVERS_WITHIN_S = 60.0
OFF = {"ahead": 600.0, "behind": -600.0}

pytestmark = pytest.mark.timeout(240)


def published(scene: Scene) -> list[dict[str, Any]]:
    return [one for one in scene.place.outbox() if not one["event"]["tenant"].startswith("_")]


def test_d43_a_consumer_that_dies_before_it_acknowledges_is_followed_by_another(forks: Forks, tmp_path: Path) -> None:
    with open_scene(forks, tmp_path) as scene:
        place = scene.place
        RedisBus(place.redis.url).create_stream()
        runs = [scene.submit() for _ in range(4)]
        for role in ("relay", "reaper", "worker"):
            place.start(role)
        eventually(place.settled, why=place.told)
        client, inbox = place.redis.client(), Inbox(tmp_path / "inbox.db")
        inbox.add_customer(Customer("acme", "Acme", "link"))
        handled: list[str] = []

        def dies_at_the_third(event: Mapping[str, Any]) -> None:
            if len(handled) == 2:
                raise KeyboardInterrupt  # as the process would end: after the event was read, before it is acknowledged
            handled.append(event["id"])
            inbox.receive(event, by="stream")

        crashed = Consumer(client, name="one", handle=dies_at_the_third, claim_after_ms=1)
        assert crashed.join()
        with pytest.raises(KeyboardInterrupt):
            crashed.step()
        assert client.xpending(STREAM, GROUP)["pending"] == len(published(scene)) - 2, "read, and not acknowledged"

        seen: list[tuple[str, int]] = []

        def receive(event: Mapping[str, Any]) -> None:
            seen.append((event["subject"], int(event["sequence"])))
            handled.append(event["id"])
            inbox.receive(event, by="stream")

        claims_nothing = Consumer(client, name="two", handle=receive, claim_after_ms=10**9)
        assert claims_nothing.step() == 0, "the control: without a claim nobody ever sees them again"
        assert client.xpending(STREAM, GROUP)["pending"] == len(published(scene)) - 2
        survivor = Consumer(client, name="three", handle=receive, claim_after_ms=1)
        time.sleep(0.05)
        while survivor.step():
            pass

        assert client.xpending(STREAM, GROUP)["pending"] == 0
        assert sorted(handled) == sorted(str(one["event"]["id"]) for one in published(scene)), "each once by effect"
        for run in runs:
            numbers = [seq for subject, seq in seen if subject == run]
            assert numbers == sorted(numbers), "in the order of the run"
        assert {shown.phase for shown in inbox.runs_of("acme")} == {"finished"}
        inbox.close()
        client.close()
        assert scene.judged() == []


def test_d47_runs_outlive_a_redis_that_is_killed_and_one_that_forgets(forks: Forks, tmp_path: Path) -> None:
    with open_scene(forks, tmp_path) as scene:
        place = scene.place
        place.start("relay")
        runs = [scene.submit(["sleep", "0.05"]) for _ in range(50)]

        place.redis.send(signal.SIGKILL)
        place.start("worker", BLASTDOOR_WORKER_CONCURRENCY="2")
        reaper = place.start("reaper")
        time.sleep(1)
        place.redis.start()
        eventually(place.redis.answers)
        eventually(lambda: sum(row["phase"] == "finished" for row in place.rows()) >= 10, why=place.told)
        place.redis.flush()
        began = time.monotonic()
        eventually(place.settled, seconds=RECOVERS_WITHIN_S, why=place.told)
        reaper.end()  # so that nobody rings again
        with place.redis.client() as client:  # and what has been rung is heard
            eventually(lambda: not client.llen(queue_name("gvisor")) and not client.hlen("unacked"), why=place.told)
        canary = scene.submit(rings=0)
        time.sleep(2 * float(SCALED["BLASTDOOR_RING_AFTER_S"]))
        assert scene.row(canary)["phase"] == "queued", "the control: it is the reconciler who rings, and nobody else"
        assert "I1" in scene.wrong_so_far()
        place.start("reaper")

        assert scene.ended(canary) == PASSED
        assert time.monotonic() - began < 2 * RECOVERS_WITHIN_S
        assert scene.judged() == []
        assert {(row["outcome"], row["attempt"]) for row in place.rows() if row["id"] in runs} == {("passed", 1)}


def test_d47_a_worker_that_could_not_acknowledge_its_bells_hears_the_next_one(forks: Forks, tmp_path: Path) -> None:
    """Each bell that Redis was not there to be thanked for once cost the worker a place, until it had none and hung."""
    with open_scene(forks, tmp_path) as scene:
        place = scene.place
        worker = place.start("worker")
        first = scene.submit(["sleep", "1"])
        scene.until(first, "running")
        place.redis.send(signal.SIGKILL)
        eventually(lambda: "Couldn't ack" in worker.said(), why=place.told)
        place.redis.start()
        eventually(place.redis.answers)
        place.start("reaper")

        assert [scene.ended(run, seconds=30) for run in (first, scene.submit())] == [PASSED] * 2
        assert scene.judged() == []


def test_d49_a_worker_without_redis_goes_on_and_one_without_the_database_ends_its_own_sandbox(
    forks: Forks, tmp_path: Path, postgres_server: PostgresServer
) -> None:
    require_gvisor()
    ran("database", f"postgresql {postgres_server.version}")
    with ExitStack() as stack:
        database = stack.enter_context(postgres_server.fresh_database())
        scene = stack.enter_context(open_scene(forks, tmp_path, database=database, paper=False))
        to_redis = stack.enter_context(Proxy(scene.place.redis.port))
        to_sql = stack.enter_context(Proxy(postgres_server.port))
        place = scene.place
        place.start("relay")
        worker = place.start(
            "worker",
            BLASTDOOR_REDIS_URL=place.redis.url.replace(f":{place.redis.port}/", f":{to_redis.port}/"),
            BLASTDOOR_DATABASE_URL=database.replace(f":{postgres_server.port}/", f":{to_sql.port}/"),
        )
        first = scene.submit(["sleep", str(2 * SELF_FENCE_S)])
        scene.until(first, "running")
        with to_redis.cut():
            scene.until(first, "finished")
        assert scene.row(first)["outcome"] == "passed", "a run does not need Redis, for longer than a fence waits"

        second = scene.submit(["sleep", "60"], rings=3)
        reaper = place.start("reaper")  # rings again, should that bell have gone to a connection that was cut
        scene.until(second, "running")
        eventually(scene.guests, why=place.told)
        reaper.end()
        with to_sql.cut():
            eventually(lambda: not scene.guests(), seconds=20, why=place.told)
            assert scene.row(second)["phase"] == "running", "no reaper was there: it was the worker itself"
            assert "I1" in scene.wrong_so_far()
            place.start("reaper")
            scene.until(second, "finished")
        began = time.monotonic()

        assert scene.ended(scene.submit()) == PASSED
        assert time.monotonic() - began < RECOVERS_WITHIN_S
        assert scene.ended(second) == ("errored", "worker_lost", 1)
        assert any("lease lost" in line for line in worker.said().splitlines()), worker.said()
        assert scene.judged() == []


@pytest.mark.parametrize("real", ["ahead", "behind"])
def test_d50_clocks_that_are_ten_minutes_off_change_nothing(forks: Forks, tmp_path: Path, real: str) -> None:
    """Two sites, one ahead and one behind; the one that is `real` has real sandboxes. (They are one host: two reapers
    with clocks of their own would each end what the other's probes make.)"""
    require_gvisor()
    with open_scene(forks, tmp_path, paper=False) as scene, ExitStack() as off:
        place = scene.place
        place.start("relay")
        for site, seconds in OFF.items():
            more = {} if site == real else {PAPER: "1"}
            for role in ("worker", "reaper"):
                off.enter_context(_off_by(place, seconds, role=role, site=site, **more))
        eventually(lambda: len(place.query("SELECT id FROM worker")) == 2, why=lambda: _said(place))

        runs = [scene.submit(["sleep", "2"]) for _ in range(4)]

        assert [scene.ended(run) for run in runs] == [PASSED] * 4, _said(place)
        assert {(scene.row(run)["fence"], scene.row(run)["site"]) for run in runs} == {(1, "ahead"), (1, "behind")}
        for site, seconds in OFF.items():
            assert abs(_clock_of(place, site) - seconds - time.time()) < 300, "the control: the clock is really off"
        assert scene.judged() == []


def test_d50_the_control_a_sandbox_that_ends_by_a_clock_that_is_ahead_ends_too_soon(
    forks: Forks, tmp_path: Path
) -> None:
    require_gvisor()
    with (
        open_scene(forks, tmp_path, paper=False) as scene,
        _off_by(scene.place, OFF["ahead"], role="worker", site="here", **{WITHOUT_LIFETIME: "1"}),
    ):
        scene.place.start("reaper")
        eventually(lambda: scene.place.query("SELECT id FROM worker"), why=lambda: _said(scene.place))

        assert scene.ended(scene.submit(["sleep", "5"]))[0] == "errored"


def _said(place: Place) -> str:
    return place.told() + "\n".join(path.read_text()[-3000:] for path in place.directory.glob("off-*.log"))


def _clock_of(place: Place, site: str) -> float:
    """By the last line that its worker has logged."""
    lines = (place.directory / f"off-worker-{site}.log").read_text().splitlines()
    told = [json.loads(line)["timestamp"] for line in lines if line.startswith("{")]
    return datetime.fromisoformat(told[-1]).timestamp()


_SITECUSTOMIZE = """
import datetime, os, time
_off, _time, _time_ns = float(os.environ["CLOCK_OFF_S"]), time.time, time.time_ns
time.time = lambda: _time() + _off
time.time_ns = lambda: _time_ns() + int(_off * 1e9)
_real = datetime.datetime
class _Off(_real):
    @classmethod
    def now(cls, tz=None):
        return _real.fromtimestamp(_time() + _off, tz)
    @classmethod
    def utcnow(cls):
        return _real.now(datetime.UTC).replace(tzinfo=None) + datetime.timedelta(seconds=_off)
class _Meta(type(_real)):
    def __instancecheck__(cls, one):
        return isinstance(one, _real)
datetime.datetime = _Meta("datetime", (_Off,), {})
"""


@contextmanager
def _off_by(place: Place, seconds: float, *, role: str, site: str, **more: str) -> Iterator[None]:
    """A process whose Python clock is off from its first import on; not its monotonic one, and not the database's."""
    directory = place.directory / f"clock-{role}-{site}"
    directory.mkdir()
    (directory / "sitecustomize.py").write_text(_SITECUSTOMIZE)
    environment = place.environment | more | {
        "BLASTDOOR_SITE": site, "BLASTDOOR_RUNTIME_DIR": str(place.runtime_dir(site)), "CLOCK_OFF_S": str(seconds),
        "PYTHONPATH": str(directory),
    }  # fmt: skip
    with (place.directory / f"off-{role}-{site}.log").open("wb") as log:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", sys.executable, "-m", "tests.faults.program", role],
            cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
