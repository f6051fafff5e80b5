"""A stream that is kept short, and readers that sleep: real relays, a real Redis, consumer groups of an application."""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from service.core.events import STREAM
from tests.integration.relay_world import EVENTS_OF_A_RUN, WITHIN_S, World, eventually, stop_between_transactions
from tests.servers import RedisServer, run_redis

SHORT = 30
GROUP = "app"


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    with run_redis() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgres"])
def world(request: pytest.FixtureRequest, own_redis: RedisServer, tmp_path: Path) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(
            request.getfixturevalue(f"{request.param}_database"), own_redis.url, directory=tmp_path, stack=stack
        )


@pytest.fixture
def small_world(sqlite_database: str, own_redis: RedisServer, tmp_path: Path) -> Iterator[World]:
    """For what does not depend on the database."""
    with ExitStack() as stack:
        yield World(sqlite_database, own_redis.url, directory=tmp_path, stack=stack)


def start(world: World) -> Any:
    relay = world.start_relay(BLASTDOOR_STREAM_ENTRIES=str(SHORT))
    eventually(lambda: world.redis.exists(STREAM) == 1)
    return relay


class Reader:
    """One member of the group, that takes what is there and remembers it, with how often."""

    def __init__(self, world: World) -> None:
        self._redis = world.redis
        self.seen: dict[str, int] = {}
        self.deleted: list[str] = []

    def take(self, *, count: int = 16, acknowledge: bool = True) -> list[str]:
        found: Any = self._redis.xreadgroup(GROUP, "one", {STREAM: ">"}, count=count)
        return self._handle([entry for _, entries in found for entry in entries], acknowledge=acknowledge)

    def claim(self) -> list[str]:
        """What is pending, through the whole list."""
        events, cursor = [], "0-0"
        while True:
            answer: Any = self._redis.xautoclaim(STREAM, GROUP, "two", 0, cursor, count=50)
            cursor, claimed, deleted = answer
            events += self._handle(claimed, acknowledge=True)
            self.deleted += deleted
            if cursor == "0-0":
                return events

    def take_until(self, wanted: set[str]) -> None:
        deadline = time.monotonic() + WITHIN_S
        while not wanted <= set(self.seen) and time.monotonic() < deadline:
            if not self.take():
                time.sleep(0.02)

    def _handle(self, entries: list[Any], *, acknowledge: bool) -> list[str]:
        events = []
        for entry_id, fields in entries:
            event = json.loads(fields["event"])["id"]
            events.append(event)
            if acknowledge:
                self.seen[event] = self.seen.get(event, 0) + 1
                self._redis.xack(STREAM, GROUP, entry_id)
        return events


def everything(world: World) -> set[str]:
    return {row.event_id for row in world.store.retained(after=0, limit=10_000)}


def is_all_there(world: World, *, runs: int) -> bool:
    return world.store.last_stamp() >= runs * EVENTS_OF_A_RUN and world.store.unpublished(limit=1) == []


def test_a_reader_that_slept_through_three_lengths_of_the_stream_gets_every_event(world: World) -> None:
    start(world)
    world.redis.xgroup_create(STREAM, GROUP, id="0")
    world.tell(16)
    eventually(lambda: is_all_there(world, runs=16) and world.length() == 2 * SHORT)
    lost = everything(world) - {entry.event["id"] for entry in world.entries()}
    assert len(lost) == 36, "the stream was trimmed while nobody had read it"
    reader = Reader(world)

    reader.take_until(everything(world))

    assert set(reader.seen) == everything(world)
    assert set(reader.seen.values()) == {1}
    eventually(lambda: world.store.owed() == {})
    assert "trimmed_unread" in world.said()


def test_an_event_that_was_given_to_a_reader_that_died_comes_again_though_it_was_trimmed(small_world: World) -> None:
    world = small_world
    start(world)
    world.redis.xgroup_create(STREAM, GROUP, id="0")
    reader = Reader(world)
    world.tell(1)
    eventually(lambda: is_all_there(world, runs=1))
    held = reader.take(count=2, acknowledge=False)
    for runs in range(2, 14):
        world.tell(1)
        eventually(lambda runs=runs: is_all_there(world, runs=runs))  # type: ignore[misc]
        reader.take(count=100)
    eventually(lambda: "trimmed_unread" in world.said())
    reader.claim()

    reader.take_until(everything(world))

    assert len(held) == 2
    assert reader.deleted == ["1-0", "2-0"], "the stream had them no more when they were claimed"
    assert set(held) <= set(reader.seen)
    assert set(reader.seen) == everything(world)
    assert {event for event, times in reader.seen.items() if times > 1} == set(), "and nothing else comes again"


def test_a_leader_that_sleeps_past_its_lease_trims_nothing_when_it_wakes(small_world: World) -> None:
    world = small_world
    first = start(world)
    eventually(lambda: "relay_leading" in world.said(1))
    world.redis.xgroup_create(STREAM, GROUP, id="0")
    world.tell(5)
    eventually(lambda: is_all_there(world, runs=5))
    stop_between_transactions(first, world)
    start(world)
    eventually(lambda: "relay_leading" in world.said(2))
    world.tell(11)
    eventually(lambda: is_all_there(world, runs=16) and world.length() == 2 * SHORT)
    owed = world.store.owed()

    first.send_signal(signal.SIGCONT)
    eventually(lambda: world.said(1)[-1] == "relay_standby")

    assert "trimmed_unread" not in world.said(1)
    assert world.store.owed() == owed != {}
    assert world.length() == 2 * SHORT
    reader = Reader(world)
    reader.take_until(everything(world))
    assert set(reader.seen) == everything(world)
