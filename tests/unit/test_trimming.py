"""What becomes of events that a reader had not taken when the stream grew too long: on the shipped fakes."""

from datetime import UTC, datetime, timedelta
from itertools import count

import pytest
from structlog.testing import capture_logs

from service.adapters.memory import MemoryBus, MemoryStore
from service.core.errors import Unavailable
from service.core.ports.publishing import OutboxRow
from service.relay.relay import Relay
from tests.contract.store_steps import add_tenant, finished_run

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
OF_A_RUN = 6


class World:
    """A stream of 20 entries, and a relay whose clock is moved by a second at each look."""

    def __init__(self) -> None:
        self.passed = 0.0
        self.store = MemoryStore(clock=lambda: NOON + timedelta(seconds=self.passed))
        self.bus = MemoryBus(max_length=20)
        self.relay = self.another("one")
        add_tenant(self.store)

    def another(self, owner: str) -> Relay:
        return Relay(self.store, self.bus, owner=owner, lease=timedelta(seconds=10), clock=lambda: self.passed)

    def tell(self, runs: int) -> None:
        for _ in range(runs):
            finished_run(self.store)
        self.settle()

    def settle(self) -> None:
        """Until nothing happens for two looks."""
        quiet = 0
        for _ in range(1000):
            self.passed += 0.5
            quiet = 0 if self.relay.step() else quiet + 1
            if quiet > 4:
                return
        raise AssertionError("it never comes to rest")

    def read_all(self, group: str) -> list[OutboxRow]:
        """As a reader does that is awake: what is there, again and again while the relay works, until nothing comes."""
        read: list[OutboxRow] = []
        while fresh := self.bus.read(group, count=7):
            read += fresh
            self.settle()
        return read


@pytest.fixture
def world() -> World:
    world = World()
    world.settle()
    return world


def events(rows: list[OutboxRow]) -> set[str]:
    return {row.event_id for row in rows}


def test_who_keeps_up_loses_nothing_and_the_stream_stays_short(world: World) -> None:
    world.bus.join("app")
    read: list[OutboxRow] = []
    for _ in range(20):
        world.tell(2)
        read += world.bus.read("app", count=100)
    world.settle()

    assert [row.pub_seq for row in read] == list(range(1, 40 * OF_A_RUN + 1))
    assert len(world.bus.rows) == 20
    assert world.store.owed() == {}


def test_nothing_goes_that_a_reader_still_needs_while_there_is_room(world: World) -> None:
    world.bus.join("app")
    world.bus.join("quick")
    world.tell(6)
    world.bus.read("quick", count=100)
    world.settle()

    assert [row.pub_seq for row in world.bus.rows] == list(range(1, 37))


def test_what_was_trimmed_unread_comes_again_when_its_reader_has_caught_up(world: World) -> None:
    world.bus.join("app")
    with capture_logs() as logs:
        world.tell(20)
    lost = world.store.owed()["app"]
    everything = {row.event_id for row in world.store.retained(after=0, limit=1000)}

    assert (len(world.bus.rows), lost) == (40, ((1, 80),))
    assert [log["events"] for log in logs if log["event"] == "trimmed_unread"] == [80]
    read = world.read_all("app")
    assert events(read) == everything
    assert len(read) == len(everything) == 20 * OF_A_RUN, "and each once"
    assert [row.pub_seq for row in read] == sorted(row.pub_seq for row in read)
    assert world.store.owed() == {}


def test_control_what_nobody_owes_stays_lost(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.store, "owed", dict)
    world.bus.join("app")
    world.tell(20)

    assert len(events(world.read_all("app"))) == 40


def test_what_was_given_and_never_acknowledged_comes_again_once_and_nothing_else_does(world: World) -> None:
    world.bus.join("app")
    world.tell(1)
    read = world.bus.read("app", count=2)
    held = world.bus.read("app", count=1, acknowledge=False)
    for _ in range(30):
        world.tell(1)
        read += world.bus.read("app", count=100)
    world.settle()

    assert [row.event_id for row in read if row.event_id in events(held)] == [held[0].event_id]
    assert len(read) == len(events(read)) == 31 * OF_A_RUN
    assert world.store.last_stamp() == 31 * OF_A_RUN + 1
    assert len(world.bus.rows) == 20, "what is pending and gone holds nothing up"


def test_of_two_that_sleep_each_gets_what_it_lost_when_it_wakes(world: World) -> None:
    world.bus.join("first")
    world.bus.join("second")
    world.tell(20)
    everything = {row.event_id for row in world.store.retained(after=0, limit=1000)}

    assert events(world.read_all("first")) == everything
    assert events(world.read_all("second")) == everything
    again = world.read_all("first")
    assert events(again) <= everything
    assert len(again) <= 2 * len(everything)
    world.read_all("second")
    assert (world.read_all("first"), world.store.owed()) == ([], {}), "and it comes to rest"


def test_one_that_sleeps_for_ever_is_no_burden_to_the_others(world: World) -> None:
    world.bus.join("asleep")
    world.bus.join("awake")
    read: list[OutboxRow] = []
    for _ in range(50):
        world.tell(2)
        read += world.bus.read("awake", count=100)
    world.settle()

    assert [row.pub_seq for row in read] == list(range(1, 100 * OF_A_RUN + 1)), "each once, and in order"
    assert len(world.bus.rows) == 40
    assert world.store.owed() == {"asleep": ((1, 560),)}, "written down in one line"


def test_what_is_owed_outlives_a_flushall_while_its_reader_is_away(world: World) -> None:
    world.bus.join("app")
    world.tell(20)
    everything = {row.event_id for row in world.store.retained(after=0, limit=1000)}
    world.bus.lose()
    world.settle()

    assert [row.pub_seq for row in world.bus.rows] == list(range(81, 121))
    world.bus.join("app")
    assert events(world.read_all("app")) == everything


def test_nothing_is_trimmed_that_could_not_be_written_down(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.bus.join("app")
    monkeypatch.setattr(world.store, "record_owed", lambda *_: False)
    world.tell(20)

    assert len(world.bus.rows) == 120


@pytest.mark.parametrize("failing", ["trim", "record_owed", "stamp_again"])
def test_a_failure_in_the_middle_of_it_loses_nothing(
    failing: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    party = world.bus if failing == "trim" else world.store
    real, calls = getattr(party, failing), count()

    def fails_every_other_time(*args: object, **more: object) -> object:
        if next(calls) % 2 == 0:
            raise Unavailable("away")
        return real(*args, **more)

    monkeypatch.setattr(party, failing, fails_every_other_time)
    world.bus.join("app")
    world.tell(20)
    everything = {row.event_id for row in world.store.retained(after=0, limit=1000)}

    assert events(world.read_all("app")) == everything
    assert next(calls) > 1, "it did fail"


def test_a_relay_that_no_longer_leads_trims_nothing_that_is_needed(world: World) -> None:
    world.bus.join("app")
    world.tell(5)
    asleep = world.relay
    asleep._leading = True
    world.passed += 11
    world.relay = world.another("two")
    world.settle()
    for _ in range(20):
        finished_run(world.store)
    world.bus.publish(world.store.stamp("two", limit=1000))  # the stream is long, and the new leader is yet to look
    asleep._trimming.step()

    assert len(world.bus.rows) == 150
    assert world.store.owed() == {}
