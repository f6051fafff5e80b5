"""The relay's decisions, on the shipped fakes and a clock that is moved by hand."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from structlog.testing import capture_logs

from service.adapters.memory import MemoryBus, MemoryStore
from service.core.errors import Conflict, Unavailable
from service.core.ports.publishing import OutboxRow
from service.relay.relay import Relay
from tests.contract.store_steps import add_run, add_tenant, finished_run

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
LEASE = timedelta(seconds=10)


class Time:
    def __init__(self) -> None:
        self.passed = 0.0

    def __call__(self) -> float:
        return self.passed

    def now(self) -> datetime:
        return NOON + timedelta(seconds=self.passed)


class FailingBus(MemoryBus):
    """Fails at the next publication, before or after it has happened."""

    before: Exception | None = None
    after: Exception | None = None
    calls = 0

    def publish(self, rows: Sequence[OutboxRow]) -> None:
        self.calls += 1
        error, self.before = self.before, None
        if error:
            raise error
        super().publish(rows)
        error, self.after = self.after, None
        if error:
            raise error


@pytest.fixture
def clock() -> Time:
    return Time()


@pytest.fixture
def store(clock: Time) -> MemoryStore:
    store = MemoryStore(clock=clock.now)
    add_tenant(store)
    return store


@pytest.fixture
def bus() -> FailingBus:
    return FailingBus()


@pytest.fixture
def relay(store: MemoryStore, bus: FailingBus, clock: Time) -> Relay:
    return Relay(store, bus, owner="one", lease=LEASE, clock=clock)


def settle(relay: Relay, *, steps: int = 50) -> None:
    for _ in range(steps):
        if not relay.step():
            return
    raise AssertionError("it never comes to rest")


def numbers(bus: MemoryBus) -> list[int]:
    return [row.pub_seq for row in bus.rows]


def test_what_is_committed_is_published_in_order(store: MemoryStore, bus: FailingBus, relay: Relay) -> None:
    for _ in range(3):
        finished_run(store)

    settle(relay)

    assert numbers(bus) == list(range(1, 19))
    assert store.unpublished(limit=100) == []


def test_more_than_a_batch_is_published(store: MemoryStore, bus: FailingBus, relay: Relay) -> None:
    for _ in range(100):
        finished_run(store)

    settle(relay)

    assert numbers(bus) == list(range(1, 601))


def test_an_idle_relay_asks_the_bus_for_nothing_until_it_is_time_to_look(
    store: MemoryStore, bus: FailingBus, relay: Relay
) -> None:
    settle(relay)
    bus.away = True

    assert relay.step() is False
    assert relay._state == "leading"


def test_a_lost_stream_is_filled_again_from_the_first_event_though_nothing_new_happens(
    store: MemoryStore, bus: FailingBus, relay: Relay, clock: Time
) -> None:
    finished_run(store)
    settle(relay)
    before = list(bus.rows)
    bus.lose()

    clock.passed += 1
    settle(relay)

    assert bus.rows == before != []


def test_a_lost_stream_is_filled_before_the_next_event(store: MemoryStore, bus: FailingBus, relay: Relay) -> None:
    finished_run(store)
    settle(relay)
    bus.lose()
    add_run(store)

    settle(relay)  # this publication fails
    relay._not_before = 0
    settle(relay)

    assert numbers(bus) == list(range(1, 8))


def test_only_the_lost_tail_is_published_again(store: MemoryStore, bus: FailingBus, relay: Relay, clock: Time) -> None:
    finished_run(store)
    settle(relay)
    assert bus._entries is not None
    for lost in (5, 6):
        del bus._entries[lost]
    bus._last = 4

    clock.passed += 1
    with capture_logs() as logs:
        settle(relay)

    assert numbers(bus) == list(range(1, 7))
    assert [(log["rows"], log["above"]) for log in logs if log["event"] == "republishing"] == [(2, 4)]


def test_another_redis_is_looked_at_again(store: MemoryStore, bus: FailingBus, relay: Relay, clock: Time) -> None:
    finished_run(store)
    settle(relay)
    bus._identity = "another"

    clock.passed += 1
    settle(relay)

    assert store.bus_identity() == "another"
    assert numbers(bus) == list(range(1, 7))


def test_what_the_stream_would_trim_at_once_is_not_published_again(store: MemoryStore, clock: Time) -> None:
    bus = FailingBus(max_length=2)
    relay = Relay(store, bus, owner="one", lease=LEASE, clock=clock)
    finished_run(store)
    settle(relay)
    bus.lose()

    clock.passed += 1
    settle(relay)

    assert numbers(bus) == [3, 4, 5, 6]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_answer_that_never_came_is_not_guessed(
    moment: str, store: MemoryStore, bus: FailingBus, relay: Relay, clock: Time
) -> None:
    finished_run(store)
    setattr(bus, moment, Unavailable("cut off"))

    settle(relay)
    assert store.unpublished(limit=100) != []
    clock.passed += 3
    settle(relay)

    assert numbers(bus) == list(range(1, 7))
    assert store.unpublished(limit=100) == []


def test_events_committed_while_the_bus_is_away_come_after_those_that_waited(
    store: MemoryStore, bus: FailingBus, relay: Relay, clock: Time
) -> None:
    settle(relay)
    bus.away = True
    for _ in range(5):
        finished_run(store)
        clock.passed += 3
        settle(relay)
    bus.away = False
    clock.passed += 3
    settle(relay)

    assert numbers(bus) == list(range(1, 31))


def test_an_outage_is_logged_once_and_its_end_once(
    store: MemoryStore, bus: FailingBus, relay: Relay, clock: Time
) -> None:
    settle(relay)
    with capture_logs() as logs:
        bus.away = True
        for _ in range(20):
            clock.passed += 3
            settle(relay)
        bus.away = False
        clock.passed += 3
        settle(relay)

    assert [(log["event"], log["log_level"]) for log in logs] == [
        ("relay_bus_away", "warning"), ("relay_leading", "info")
    ]  # fmt: skip


def test_a_relay_that_failed_waits_longer_each_time_and_never_longer_than_two_seconds(
    store: MemoryStore, bus: FailingBus, relay: Relay, clock: Time
) -> None:
    bus.away = True
    tried = []
    for _ in range(1000):
        failures = relay._failures
        relay.step()
        if relay._failures > failures:
            tried.append(clock.passed)
        clock.passed += 0.05

    pauses = [later - earlier for earlier, later in pairwise(tried)]
    assert pauses[:5] == pytest.approx([0.25, 0.5, 1, 2, 2], abs=0.06)
    assert max(pauses) == pytest.approx(2, abs=0.06)


def test_a_stream_that_holds_something_else_is_an_alarm_and_nothing_is_skipped(
    store: MemoryStore, bus: FailingBus, relay: Relay, clock: Time
) -> None:
    finished_run(store)
    bus.create_stream()
    foreign = OutboxRow(event_id="evt_x", run_id="run_x", tenant="acme", type="x", pub_seq=9, event={})
    bus.publish([foreign, foreign.model_copy(update={"pub_seq": 9})])
    bus._entries = {3: foreign, **(bus._entries or {})}

    with capture_logs() as logs:
        for _ in range(5):
            settle(relay)
            clock.passed += 3

    assert [log["log_level"] for log in logs if log["event"] == "relay_bus_conflict"] == ["error"]
    assert [row.pub_seq for row in store.unpublished(limit=100)] == [1, 2, 3, 4, 5, 6]


def test_only_one_of_two_leads(store: MemoryStore, bus: FailingBus, relay: Relay, clock: Time) -> None:
    other = Relay(store, bus, owner="other", lease=LEASE, clock=clock)
    settle(relay)
    settle(other)

    assert (relay._state, other._state) == ("leading", "standby")


def test_another_takes_over_when_the_leader_is_silent(
    store: MemoryStore, bus: FailingBus, relay: Relay, clock: Time
) -> None:
    other = Relay(store, bus, owner="other", lease=LEASE, clock=clock)
    settle(relay)
    finished_run(store)
    settle(relay)

    clock.passed += 11
    finished_run(store)
    settle(other)

    assert other._state == "leading"
    assert numbers(bus) == list(range(1, 13))


def test_another_takes_over_soon_after_the_leader_stopped(
    store: MemoryStore, bus: FailingBus, relay: Relay, clock: Time
) -> None:
    other = Relay(store, bus, owner="other", lease=LEASE, clock=clock)
    settle(relay)
    settle(other)

    relay.stop()
    clock.passed += 1
    settle(other)

    assert other._state == "leading"


def test_a_leader_that_was_asleep_does_no_harm(store: MemoryStore, bus: FailingBus, relay: Relay, clock: Time) -> None:
    """It holds rows that it has stamped, and publishes them after another has taken over."""
    settle(relay)
    finished_run(store)
    held = store.stamp("one", limit=100)
    clock.passed += 11
    other = Relay(store, bus, owner="other", lease=LEASE, clock=clock)
    finished_run(store)
    settle(other)

    relay._publish(held)
    settle(relay)
    settle(other)

    assert numbers(bus) == list(range(1, 13))
    assert len({row.event_id for row in bus.rows}) == 12


def test_the_lease_is_renewed_while_the_relay_works(
    store: MemoryStore, bus: FailingBus, relay: Relay, clock: Time
) -> None:
    other = Relay(store, bus, owner="other", lease=LEASE, clock=clock)
    for _ in range(40):
        clock.passed += 1
        settle(relay)
        settle(other)

    assert (relay._state, other._state) == ("leading", "standby")


def test_a_conflict_is_not_mistaken_for_bad_weather() -> None:
    assert not issubclass(Conflict, Unavailable)
