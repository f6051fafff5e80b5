"""The relay as a process, between a real database and a real Redis, either of which may go away at any moment."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import redis

from service.adapters.memory import MemoryBus, MemoryHints, MemoryStore
from service.core.events import STREAM
from service.relay.relay import Relay, run
from tests.contract.store_steps import add_run, add_tenant, finished_run
from tests.integration.relay_world import (
    EVENTS_OF_A_RUN,
    WITHIN_S,
    Entry,
    World,
    allow_connections,
    eventually,
    faults,
    redis_again,
    stop_between_transactions,
)
from tests.servers import PostgresServer, RedisServer, run_redis


class TestTheCheckItself:
    """Positive controls: each fault is planted, and must be found."""

    @pytest.fixture
    def good(self) -> list[Entry]:
        return [
            Entry(f"{n}-0", {"id": f"evt_{n}", "subject": f"run_{(n - 1) // 6}", "sequence": f"{(n - 1) % 6 + 1:010d}"})
            for n in range(1, 13)
        ]

    def test_a_good_stream_has_no_faults(self, good: list[Entry]) -> None:
        assert faults(good, runs=2) == []

    def test_a_gap_is_found(self, good: list[Entry]) -> None:
        assert faults(good[:3] + good[4:], runs=2) == ["run_0 is told as [1, 2, 3, 5, 6]"]

    def test_a_missing_end_is_found(self, good: list[Entry]) -> None:
        assert faults(good[:-1], runs=2) == ["run_1 is told as [1, 2, 3, 4, 5]"]

    def test_a_missing_run_is_found(self, good: list[Entry]) -> None:
        assert faults(good[:6], runs=2) == ["1 runs are told of, not 2"]

    def test_a_duplicate_is_found(self, good: list[Entry]) -> None:
        again = Entry("13-0", good[4].event)

        assert "evt_5 comes twice" in faults([*good, again], runs=2)

    def test_wrong_order_is_found(self, good: list[Entry]) -> None:
        good[2], good[3] = Entry("3-0", good[3].event), Entry("4-0", good[2].event)

        assert faults(good, runs=2) == ["run_0 is told as [1, 2, 4, 3, 5, 6]"]

    def test_ids_that_do_not_rise_are_found(self, good: list[Entry]) -> None:
        good[2], good[3] = good[3], good[2]

        assert "3-0 comes after 4-0" in faults(good, runs=2)


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """To be flushed and killed."""
    with run_redis() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgres"])
def world(request: pytest.FixtureRequest, own_redis: RedisServer, tmp_path: Path) -> Iterator[World]:
    with ExitStack() as stack:
        database = request.getfixturevalue(f"{request.param}_database")
        yield World(database, own_redis.url, directory=tmp_path, stack=stack)


@pytest.fixture
def small_world(sqlite_database: str, own_redis: RedisServer, tmp_path: Path) -> Iterator[World]:
    """For what does not depend on the database."""
    with ExitStack() as stack:
        yield World(sqlite_database, own_redis.url, directory=tmp_path, stack=stack)


def test_each_event_is_published_once_and_in_order(world: World) -> None:
    world.tell(5)
    world.start_relay()
    world.wait_for(5)
    world.tell(5)

    entries = world.wait_for(10)

    assert faults(entries, runs=10) == []
    assert [entry.number for entry in entries] == list(range(1, 61))
    eventually(lambda: world.store.unpublished(limit=100) == [])


def test_a_relay_that_is_killed_again_and_again_publishes_all_the_same(world: World) -> None:
    told = threading.Thread(target=world.tell, args=(60,))
    told.start()
    for _ in range(4):
        relay = world.start_relay()
        world.wait_for_more(than=world.length(), unless=lambda: not told.is_alive())
        relay.kill()
        relay.wait()
    told.join()
    world.start_relay()

    assert faults(world.wait_for(60), runs=60) == []


def test_of_two_relays_one_leads_and_the_other_takes_over_when_it_is_killed(world: World) -> None:
    first = world.start_relay()
    eventually(lambda: "relay_leading" in world.said(1))
    world.start_relay()
    eventually(lambda: "relay_standby" in world.said(2))
    world.tell(5)
    world.wait_for(5)

    first.kill()
    world.tell(5)
    entries = world.wait_for(10)

    assert faults(entries, runs=10) == []
    eventually(lambda: world.said(2) == ["relay_standby", "relay_leading"])


def test_a_relay_that_sleeps_past_its_lease_does_no_harm(world: World) -> None:
    first = world.start_relay()
    eventually(lambda: "relay_leading" in world.said(1))
    told = threading.Thread(target=world.tell, args=(40,))
    told.start()
    eventually(lambda: world.length() > 10)
    stop_between_transactions(first, world)
    world.start_relay()
    eventually(lambda: "relay_leading" in world.said(2))
    first.send_signal(signal.SIGCONT)
    told.join()

    assert faults(world.wait_for(40), runs=40) == []
    eventually(lambda: world.said(1)[-1] == "relay_standby")


def test_after_flushall_everything_is_published_again_with_the_same_ids(world: World) -> None:
    world.start_relay()
    world.tell(5)
    before = world.wait_for(5)

    world.redis.flushall()

    assert world.wait_for(5) == before
    world.tell(1)
    assert faults(world.wait_for(6), runs=6) == []


def test_flushall_in_the_middle_of_it_all_loses_nothing(world: World) -> None:
    world.start_relay()
    told = threading.Thread(target=world.tell, args=(40,))
    told.start()
    for _ in range(5):
        eventually(lambda: world.length() > 6)
        world.redis.flushall()
    told.join()

    assert faults(world.wait_for(40), runs=40) == []


def test_a_stream_that_ends_below_the_last_number_gets_its_tail_again(world: World) -> None:
    """As from a copy that is some seconds old: the same Redis by its `run_id`, and not all that was on it."""
    world.start_relay()
    world.tell(3)
    world.wait_for(3)
    old: Any = redis.Redis.from_url(world.redis_url).dump(STREAM)
    world.tell(4)
    before = world.wait_for(7)

    world.redis.restore(STREAM, 0, old, replace=True)
    assert world.length() < len(before), "it was shorter"
    after = world.wait_for(7)

    assert after == before
    assert faults(after, runs=7) == []
    assert [line["above"] for line in world.log() if line["event"] == "republishing"] == [3 * EVENTS_OF_A_RUN]


def test_a_consumer_that_makes_the_stream_first_hides_no_loss(small_world: World) -> None:
    world = small_world
    relay = world.start_relay()
    world.tell(3)
    world.wait_for(3)
    stop_between_transactions(relay, world)
    world.redis.flushall()
    world.redis.xgroup_create(STREAM, "app", id="0", mkstream=True)
    world.tell(1)
    relay.send_signal(signal.SIGCONT)

    assert faults(world.wait_for(4), runs=4) == []


def test_redis_is_killed_and_comes_back_empty(world: World, own_redis: RedisServer) -> None:
    relay = world.start_relay()
    world.tell(5)
    before = world.wait_for(5)
    configuration = Path(os.readlink(f"/proc/{own_redis.pid}/cwd")) / "redis.conf"

    os.kill(own_redis.pid, signal.SIGKILL)
    world.tell(1)
    eventually(lambda: "relay_bus_away" in world.said())
    time.sleep(1)
    with redis_again(configuration):
        entries = world.wait_for(6)

    assert entries[:30] == before
    assert faults(entries, runs=6) == []
    story = ["relay_leading", "relay_bus_away", "republishing", "relay_leading"]
    eventually(lambda: [said for said in world.said() if "hints" not in said] == story)
    assert relay.poll() is None


def test_a_database_that_is_away_for_a_while_is_waited_for(
    postgres_server: PostgresServer, postgres_database: str, own_redis: RedisServer, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        world = World(postgres_database, own_redis.url, directory=tmp_path, stack=stack)
        relay = world.start_relay()
        world.tell(2)
        world.wait_for(2)
        allow_connections(postgres_server, postgres_database, False)
        eventually(lambda: "relay_store_away" in world.said())
        time.sleep(1)
        allow_connections(postgres_server, postgres_database, True)
        world.store.close()
        world.tell(2)

        assert faults(world.wait_for(4), runs=4) == []
        eventually(lambda: world.said() == ["relay_leading", "relay_store_away", "relay_leading"])
        assert relay.poll() is None


@pytest.mark.parametrize("state", ["leading", "standby", "bus_away"])
def test_sigterm_stops_it_cleanly_and_soon(state: str, small_world: World, own_redis: RedisServer) -> None:
    first = small_world.start_relay()
    eventually(lambda: "relay_leading" in small_world.said(1))
    relay, number = first, 1
    if state == "standby":
        relay, number = small_world.start_relay(), 2
    if state == "bus_away":
        os.kill(own_redis.pid, signal.SIGKILL)
        small_world.tell(1)
    eventually(lambda: f"relay_{state}" in small_world.said(number))

    relay.send_signal(signal.SIGTERM)

    assert relay.wait(timeout=15) == 0  # generous: the machine may be busy
    assert small_world.said(number)[-1] == "relay_stopped"
    assert small_world.store.lead("another", lease=timedelta(seconds=1)) is (state != "standby")


def test_a_consumer_group_reads_each_event_once_and_in_the_order_of_each_run(world: World) -> None:
    world.start_relay()
    eventually(lambda: world.redis.exists(STREAM) == 1)
    world.redis.xgroup_create(STREAM, "app", id="0")
    told = threading.Thread(target=world.tell, args=(20,))
    told.start()
    read: list[Entry] = []
    deadline = time.monotonic() + WITHIN_S
    while len(read) < 20 * EVENTS_OF_A_RUN and time.monotonic() < deadline:
        found: Any = world.redis.xreadgroup("app", "one", {STREAM: ">"}, count=16, block=100)
        for _, entries in found:
            read += [Entry(entry_id, json.loads(fields["event"])) for entry_id, fields in entries]
            world.redis.xack(STREAM, "app", *(entry_id for entry_id, _ in entries))
    told.join()

    assert faults(read, runs=20) == []
    pending: Any = world.redis.xpending(STREAM, "app")
    assert pending["pending"] == 0


def test_a_hint_brings_an_event_to_its_consumer_long_before_the_next_poll(small_world: World) -> None:
    world = small_world
    world.start_relay()
    eventually(lambda: world.redis.exists(STREAM) == 1)
    eventually(lambda: bool(world.redis.pubsub_channels()))
    took = []
    for _ in range(20):
        add_run(world.store)
        began = time.monotonic()
        last = world.redis.xinfo_stream(STREAM)["last-generated-id"]
        world.hints.hint("outbox", "run_1")
        while not world.redis.xread({STREAM: last}, block=1000):
            pass
        took.append(time.monotonic() - began)

    assert sorted(took)[10] < 0.1


class TestTheLoop:
    """In this process, on the shipped fakes."""

    def test_a_hint_wakes_it_at_once_and_it_gives_up_the_lead_when_it_stops(self) -> None:
        store, bus, hints = MemoryStore(), MemoryBus(), MemoryHints()
        add_tenant(store)
        with _looping(Relay(store, bus, owner="one", lease=timedelta(seconds=10)), hints, poll_s=5) as stop:
            eventually(lambda: store.bus_identity() is not None and bool(hints._listeners))
            time.sleep(0.05)
            add_run(store)
            began = time.monotonic()
            hints.hint("outbox", "run_1")
            eventually(lambda: len(bus.rows) == 1)
            took = time.monotonic() - began
            stop()
            hints.hint("outbox", "run_1")

        assert took < 1
        assert store.lead("other", lease=timedelta(seconds=10))

    def test_without_hints_it_looks_by_itself(self) -> None:
        store, bus, hints = MemoryStore(), MemoryBus(), MemoryHints()
        hints.lost = True
        add_tenant(store)
        with _looping(Relay(store, bus, owner="one", lease=timedelta(seconds=10)), hints, poll_s=0.02) as stop:
            finished_run(store)
            eventually(lambda: len(bus.rows) == EVENTS_OF_A_RUN)
            stop()


@contextmanager
def _looping(relay: Relay, hints: MemoryHints, *, poll_s: float) -> Iterator[Callable[[], None]]:
    stopped = threading.Event()
    loop = threading.Thread(
        target=run, args=(relay, hints), kwargs={"stopping": stopped.is_set, "poll": timedelta(seconds=poll_s)}
    )
    loop.start()
    try:
        yield stopped.set
    finally:
        stopped.set()
        loop.join(timeout=10)
    assert not loop.is_alive()
