"""What every bus promises, kept by a real Redis and by the shipped fake; and what hints promise, which is little."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import redis

from service.adapters.memory import MemoryBus, MemoryHints
from service.adapters.redis_bus import RedisBus, RedisHints
from service.core.errors import Conflict, Unavailable
from service.core.events import STREAM
from service.core.ports.publishing import Bus, Hints, OutboxRow
from tests.servers import RedisServer, run_redis

DB = "/3"
HINT_WITHIN_S = 5.0


def _row(pub_seq: int, *, event_id: str | None = None, tenant: str = "acme", text: str = "") -> OutboxRow:
    event: dict[str, Any] = {"id": event_id or f"evt_{pub_seq}", "sequence": f"{pub_seq:010d}", "data": {"text": text}}
    return OutboxRow(
        event_id=str(event["id"]),
        run_id="run_1",
        tenant=tenant,
        type="dev.blastdoor.run.queued",
        pub_seq=pub_seq,
        event=event,
    )


def _rows(*pub_seqs: int) -> list[OutboxRow]:
    return [_row(pub_seq) for pub_seq in pub_seqs]


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_server.url.removesuffix("/0") + DB, decode_responses=True) as client:
        client.flushdb()
        yield client


class InMemory:
    def __init__(self) -> None:
        self.bus = MemoryBus()

    def read(self) -> list[str]:
        return [row.event_id for row in self.bus.rows]

    def lose(self) -> None:
        self.bus.lose()

    def join(self, group: str) -> None:
        self.bus.join(group)

    def take(self, group: str, *, count: int, acknowledge: bool = True) -> list[str]:
        return [row.event_id for row in self.bus.read(group, count=count, acknowledge=acknowledge)]


class InRedis:
    def __init__(self, url: str, client: redis.Redis) -> None:
        self.bus = RedisBus(url)
        self._client = client

    def read(self) -> list[str]:
        return [json.loads(fields["event"])["id"] for _, fields in entries(self._client)]

    def lose(self) -> None:
        self._client.flushdb()

    def join(self, group: str) -> None:
        self._client.xgroup_create(STREAM, group, id="0")

    def take(self, group: str, *, count: int, acknowledge: bool = True) -> list[str]:
        found: Any = self._client.xreadgroup(group, "one", {STREAM: ">"}, count=count)
        fresh = [entry for _, entries in found for entry in entries]
        if acknowledge:
            self._client.xack(STREAM, group, *(entry_id for entry_id, _ in fresh))
        return [json.loads(fields["event"])["id"] for _, fields in fresh]


def entries(client: redis.Redis) -> list[tuple[str, dict[str, str]]]:
    found: Any = client.xrange(STREAM)
    return [(entry_id, fields) for entry_id, fields in found]


@pytest.fixture(params=["memory", "redis"])
def kept(request: pytest.FixtureRequest) -> InMemory | InRedis:
    if request.param == "memory":
        return InMemory()
    server: RedisServer = request.getfixturevalue("redis_server")
    client: redis.Redis = request.getfixturevalue("client")
    return InRedis(server.url.removesuffix("/0") + DB, client)


@pytest.fixture
def bus(kept: InMemory | InRedis) -> Bus:
    kept.bus.create_stream()
    return kept.bus


class TestEveryBus:
    def test_there_is_no_stream_until_it_is_made(self, kept: InMemory | InRedis) -> None:
        assert kept.bus.last_published() is None

        kept.bus.create_stream()

        assert kept.bus.last_published() == 0

    def test_nothing_is_published_where_there_is_no_stream(self, kept: InMemory | InRedis) -> None:
        with pytest.raises(Unavailable):
            kept.bus.publish(_rows(1))

        assert kept.bus.last_published() is None

    def test_events_are_read_in_the_order_of_their_numbers(self, bus: Bus, kept: InMemory | InRedis) -> None:
        bus.publish(_rows(1, 2))
        bus.publish(_rows(3))

        assert kept.read() == ["evt_1", "evt_2", "evt_3"]
        assert bus.last_published() == 3

    def test_publishing_again_adds_nothing(self, bus: Bus, kept: InMemory | InRedis) -> None:
        bus.publish(_rows(1, 2))
        bus.publish(_rows(1, 2, 3))

        assert kept.read() == ["evt_1", "evt_2", "evt_3"]

    def test_another_event_under_a_taken_number_is_an_error(self, bus: Bus, kept: InMemory | InRedis) -> None:
        bus.publish(_rows(1, 2))

        with pytest.raises(Conflict) as raised:
            bus.publish([_row(2, event_id="evt_other")])

        assert raised.value.code == "bus_conflict"
        assert kept.read() == ["evt_1", "evt_2"]

    def test_internal_tenants_events_are_not_on_the_stream(self, bus: Bus, kept: InMemory | InRedis) -> None:
        bus.publish([_row(1), _row(2, tenant="_canary"), _row(3)])

        assert kept.read() == ["evt_1", "evt_3"]

    def test_making_the_stream_again_leaves_what_is_there(self, bus: Bus, kept: InMemory | InRedis) -> None:
        bus.publish(_rows(1))
        bus.create_stream()

        assert kept.read() == ["evt_1"]

    def test_a_lost_stream_takes_everything_again(self, bus: Bus, kept: InMemory | InRedis) -> None:
        bus.publish(_rows(1, 2))
        kept.lose()

        assert bus.last_published() is None
        bus.create_stream()
        bus.publish(_rows(1, 2, 3))
        assert kept.read() == ["evt_1", "evt_2", "evt_3"]

    def test_publishing_nothing_is_no_error(self, bus: Bus) -> None:
        bus.publish([])

        assert bus.last_published() == 0

    def test_it_says_how_far_its_readers_are(self, bus: Bus, kept: InMemory | InRedis) -> None:
        bus.publish(_rows(1, 2, 3, 4))
        for group in ("ahead", "behind", "holding"):
            kept.join(group)
        kept.take("ahead", count=4)
        kept.take("behind", count=1)
        kept.take("holding", count=3, acknowledge=False)
        stream = bus.stream()

        assert stream is not None
        assert (stream.length, stream.first, stream.last) == (4, 1, 4)
        assert {reader.group: (reader.delivered, reader.pending) for reader in stream.readers} == {
            "ahead": (4, None), "behind": (1, None), "holding": (3, 1)
        }  # fmt: skip
        assert list(bus.pending("holding", first=2, below=9)) == [2, 3]
        assert list(bus.pending("ahead", first=1, below=9)) == list(bus.pending("nobody", first=1, below=9)) == []

    def test_there_are_no_readers_where_there_is_no_stream(self, kept: InMemory | InRedis) -> None:
        assert kept.bus.stream() is None

    def test_trimming_takes_what_is_below_and_numbers_go_on(self, bus: Bus, kept: InMemory | InRedis) -> None:
        bus.publish(_rows(1, 2, 3))
        kept.join("app")
        kept.take("app", count=2, acknowledge=False)
        bus.trim(3)
        trimmed = bus.stream()
        bus.trim(4)
        empty = bus.stream()
        bus.publish(_rows(4))

        assert trimmed is not None
        assert (trimmed.length, trimmed.first, trimmed.last, trimmed.readers[0].pending) == (1, 3, 3, None)
        assert empty is not None
        assert (empty.length, empty.first, empty.last) == (0, 4, 3)
        assert kept.read() == ["evt_4"]
        assert kept.take("app", count=9) == ["evt_4"]

    def test_it_says_who_it_is(self, bus: Bus) -> None:
        assert bus.identity() == bus.identity() != ""


class TestRedis:
    @pytest.fixture
    def bus(self, redis_server: RedisServer, client: redis.Redis) -> RedisBus:
        bus = RedisBus(redis_server.url.removesuffix("/0") + DB)
        bus.create_stream()
        return bus

    def test_an_entry_has_the_fields_of_the_contract_and_the_number_as_its_id(
        self, bus: RedisBus, client: redis.Redis
    ) -> None:
        bus.publish([_row(7, text="ünï\x00\n")])

        ((entry_id, fields),) = entries(client)
        assert entry_id == "7-0"
        assert set(fields) == {"event", "tenant", "type"}
        assert (fields["tenant"], fields["type"]) == ("acme", "dev.blastdoor.run.queued")
        assert json.loads(fields["event"])["data"] == {"text": "ünï\x00\n"}

    def test_a_stream_that_lost_its_tail_takes_no_later_event(self, bus: RedisBus, client: redis.Redis) -> None:
        """Without the look before each batch, 3 would be accepted, and 1 and 2 refused for ever."""
        bus.publish(_rows(1, 2))
        client.delete(STREAM)
        client.xgroup_create(STREAM, "a consumer was faster", id="0", mkstream=True)

        with pytest.raises(Unavailable, match="lost its tail"):
            bus.publish(_rows(3))

        assert entries(client) == []
        assert bus.last_published() == 0
        bus.publish(_rows(1, 2, 3))
        assert [entry_id for entry_id, _ in entries(client)] == ["1-0", "2-0", "3-0"]

    def test_the_stream_is_lost_between_the_look_and_the_addition(
        self, bus: RedisBus, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bus.publish(_rows(1, 2))
        look = bus._check_top

        def lose_it_after_the_look(watched: Any) -> None:
            look(watched)
            client.delete(STREAM)
            client.xgroup_create(STREAM, "a consumer was faster", id="0", mkstream=True)

        monkeypatch.setattr(bus, "_check_top", lose_it_after_the_look)
        with pytest.raises(Unavailable):
            bus.publish(_rows(3))

        assert entries(client) == []

    def test_another_relay_that_was_faster_is_no_error(self, bus: RedisBus, client: redis.Redis) -> None:
        bus.publish(_rows(1))
        other = RedisBus(str(_url(client)))
        other.publish(_rows(1, 2, 3))

        bus.publish(_rows(2, 3, 4))

        assert [entry_id for entry_id, _ in entries(client)] == ["1-0", "2-0", "3-0", "4-0"]

    def test_an_event_that_was_trimmed_away_counts_as_published(self, bus: RedisBus, client: redis.Redis) -> None:
        bus.publish(_rows(1, 2, 3))
        client.xtrim(STREAM, maxlen=1, approximate=False)

        bus.publish(_rows(1, 2, 3))

        assert [entry_id for entry_id, _ in entries(client)] == ["3-0"]

    def test_a_stream_that_somebody_else_wrote_on_is_an_error(self, bus: RedisBus, client: redis.Redis) -> None:
        client.xadd(STREAM, {"event": "not json"}, id="5-0")

        with pytest.raises(Conflict):
            bus.publish(_rows(5))

    def test_a_hole_that_somebody_made_is_an_error(self, bus: RedisBus, client: redis.Redis) -> None:
        bus.publish(_rows(1, 2, 3))
        client.xdel(STREAM, "2-0")

        with pytest.raises(Conflict):
            bus.publish(_rows(2))

    def test_publishing_trims_nothing(self, client: redis.Redis) -> None:
        bus = RedisBus(str(_url(client)), max_length=10)
        bus.create_stream()
        for first in range(1, 1001, 50):
            bus.publish(_rows(*range(first, first + 50)))

        assert client.xlen(STREAM) == 1000

    def test_more_is_pending_than_is_asked_for_at_once(self, bus: RedisBus, client: redis.Redis) -> None:
        bus.publish(_rows(*range(1, 2502)))
        client.xgroup_create(STREAM, "app", id="0")
        client.xreadgroup("app", "one", {STREAM: ">"})
        client.xack(STREAM, "app", "7-0")

        assert bus.pending("app", first=1, below=2501) == [*range(1, 7), *range(8, 2501)]

    def test_a_busy_consumer_group_does_not_get_in_the_way(self, bus: RedisBus, client: redis.Redis) -> None:
        client.xgroup_create(STREAM, "app", id="0")
        stop = threading.Event()
        read: list[str] = []

        def consume() -> None:
            with redis.Redis.from_url(str(_url(client)), decode_responses=True) as own:
                while not stop.is_set():
                    for _, found in own.xreadgroup("app", "one", {STREAM: ">"}, count=10, block=20) or []:
                        for entry_id, _ in found:
                            own.xack(STREAM, "app", entry_id)
                            read.append(entry_id)

        consumer = threading.Thread(target=consume)
        consumer.start()
        for pub_seq in range(1, 301):
            bus.publish(_rows(pub_seq))
        deadline = time.monotonic() + 10
        while len(read) < 300 and time.monotonic() < deadline:
            time.sleep(0.01)
        stop.set()
        consumer.join()

        assert read == [f"{n}-0" for n in range(1, 301)]

    @pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL], ids=["hangs", "is dead"])
    def test_every_question_is_answered_in_time_when_redis(self, how: signal.Signals) -> None:
        with run_redis() as server:
            bus = RedisBus(server.url)
            bus.create_stream()
            os.kill(server.pid, how)
            questions: list[Callable[[], object]] = [
                bus.identity, bus.last_published, bus.create_stream, lambda: bus.publish(_rows(1))
            ]  # fmt: skip
            for question in questions:
                began = time.monotonic()
                with pytest.raises(Unavailable):
                    question()
                assert time.monotonic() - began < 5
            os.kill(server.pid, signal.SIGCONT)


def _url(client: redis.Redis) -> str:
    about = client.connection_pool.connection_kwargs
    return f"redis://:{about['password']}@{about['host']}:{about['port']}/{about['db']}"


@pytest.fixture(params=["memory", "redis"])
def hints(request: pytest.FixtureRequest) -> Hints:
    if request.param == "memory":
        return MemoryHints()
    server: RedisServer = request.getfixturevalue("redis_server")
    return RedisHints(server.url)


class TestEveryHints:
    def test_a_hint_reaches_who_listens_to_its_topic(self, hints: Hints) -> None:
        heard = hints.listen(["run"], poll_s=0.05)
        next(heard)

        hints.hint("outbox", "run_0")
        hints.hint("run", "run_1")

        assert _next_hint(heard) == ("run", "run_1")

    def test_a_listener_is_woken_to_look_even_when_nothing_is_said(self, hints: Hints) -> None:
        heard = hints.listen(["run"], poll_s=0.05)

        assert [next(heard) for _ in range(3)] == [None, None, None]


class TestRedisHints:
    def test_a_hint_costs_little_and_raises_nothing_while_redis_hangs(self) -> None:
        with run_redis() as server:
            hints = RedisHints(server.url)
            hints.hint("run", "run_1")
            os.kill(server.pid, signal.SIGSTOP)
            began = time.monotonic()
            for _ in range(100):
                hints.hint("run", "run_1")
            took = time.monotonic() - began
            os.kill(server.pid, signal.SIGCONT)

        assert took < 1

    def test_a_listener_outlives_redis_and_looks_on_time_while_it_is_away(self) -> None:
        with run_redis() as server:
            heard = RedisHints(server.url).listen(["run"], poll_s=0.1)
            next(heard)
            os.kill(server.pid, signal.SIGKILL)
            at = []
            for _ in range(10):
                assert next(heard) is None
                at.append(time.monotonic())

        assert max(later - earlier for earlier, later in pairwise(at)) < 0.5

    def test_a_listener_hears_again_when_the_connection_was_cut(self, redis_server: RedisServer) -> None:
        hints = RedisHints(redis_server.url)
        heard = hints.listen(["run"], poll_s=0.05)
        next(heard)
        with redis.Redis.from_url(redis_server.url) as client:
            client.client_kill_filter(_type="pubsub")
        next(heard)
        deadline = time.monotonic() + HINT_WITHIN_S
        answer = None
        while answer is None and time.monotonic() < deadline:
            hints.hint("run", "run_2")
            answer = next(heard)

        assert answer == ("run", "run_2")

    def test_bytes_that_are_no_text_do_not_end_the_listening(self, redis_server: RedisServer) -> None:
        hints = RedisHints(redis_server.url)
        heard = hints.listen(["run"], poll_s=0.05)
        next(heard)
        with redis.Redis.from_url(redis_server.url) as client:
            client.publish("blastdoor:hint:run", b"\xff\xfe")
        hints.hint("run", "run_3")

        assert _next_hint(heard) == ("run", "\\xff\\xfe")
        assert _next_hint(heard) == ("run", "run_3")


def _next_hint(heard: Iterator[tuple[str, str] | None]) -> tuple[str, str] | None:
    deadline = time.monotonic() + HINT_WITHIN_S
    for hint in heard:
        if hint is not None or time.monotonic() > deadline:
            return hint
    return None
