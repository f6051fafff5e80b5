"""The example application's two ends: its reader on a real stream, and its pages."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import redis

from examples.main_app.consumer import BATCH, GROUP, MOST_DELIVERIES, STREAM, Consumer
from examples.main_app.inbox import Customer, Inbox, Shown
from examples.main_app.pages import customer_page, output_page
from service.adapters.redis_bus import RedisBus
from service.core.events import finished_data
from service.core.ports.publishing import OutboxRow
from tests.factories import make_run
from tests.scenes import eventually
from tests.servers import RedisServer

DB = "/5"


# --- the reader -------------------------------------------------------------------------------------------------------


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_server.url.removesuffix("/0") + DB, decode_responses=True) as client:
        client.flushdb()
        yield client


@pytest.fixture
def bus(redis_server: RedisServer, client: redis.Redis) -> RedisBus:
    bus = RedisBus(redis_server.url.removesuffix("/0") + DB)
    bus.create_stream()
    return bus


def publish(bus: RedisBus, *numbers: int) -> None:
    bus.publish(
        [OutboxRow(event_id=f"evt_{n}", run_id="run_1", tenant="acme", type="x", pub_seq=n, event={"id": f"evt_{n}"})
         for n in numbers]
    )  # fmt: skip


def a_consumer(client: redis.Redis, handle: Callable[[Mapping[str, Any]], object], **more: Any) -> Consumer:
    consumer = Consumer(client, name=more.pop("name", "one"), handle=handle, claim_after_ms=1, **more)
    assert consumer.join()
    return consumer


def pending(client: redis.Redis) -> int:
    found: Any = client.xpending(STREAM, GROUP)
    return int(found["pending"])


def test_an_event_that_always_fails_is_put_aside_and_holds_up_no_other(bus: RedisBus, client: redis.Redis) -> None:
    handled: list[str] = []
    tried: list[str] = []
    aside: list[str] = []

    def handle(event: Mapping[str, Any]) -> None:
        tried.append(event["id"])
        if event["id"] == "evt_2":
            raise ValueError("a bug of ours")
        handled.append(event["id"])

    consumer = a_consumer(client, handle, put_aside=lambda event: aside.append(event["id"]))
    publish(bus, 1, 2, 3)
    consumer.step()
    assert (handled, pending(client)) == (["evt_1", "evt_3"], 1)

    deadline = time.monotonic() + 20
    while pending(client) and time.monotonic() < deadline:
        time.sleep(0.005)
        consumer.step()

    assert aside == ["evt_2"]
    assert tried.count("evt_2") == MOST_DELIVERIES + 1
    assert handled == ["evt_1", "evt_3"]


def test_all_that_a_dead_reader_had_is_claimed_however_much_it_is(bus: RedisBus, client: redis.Redis) -> None:
    handled: list[str] = []
    consumer = a_consumer(client, lambda event: handled.append(event["id"]))
    publish(bus, *range(1, 3 * BATCH + 51))
    client.xreadgroup(GROUP, "the dead one", {STREAM: ">"})
    client.xack(STREAM, GROUP, "7-0")
    time.sleep(0.01)

    assert consumer.step() == 3 * BATCH + 49
    assert sorted(handled) == sorted(f"evt_{n}" for n in range(1, 3 * BATCH + 51) if n != 7)
    assert pending(client) == 0


def test_a_reader_that_still_holds_something_does_not_take_it_with_it(bus: RedisBus, client: redis.Redis) -> None:
    def fails(_: object) -> None:
        raise ValueError("not now")

    consumer = a_consumer(client, fails)
    publish(bus, 1)
    consumer.step()

    assert not consumer.leave()
    assert pending(client) == 1
    other = a_consumer(client, lambda _: None, name="two")
    time.sleep(0.01)
    assert other.step() == 1
    assert consumer.leave()
    assert other.leave()
    assert client.xinfo_consumers(STREAM, GROUP) == []
    assert pending(client) == 0


def test_control_a_reader_whose_name_goes_too_early_takes_its_events_with_it(
    bus: RedisBus, client: redis.Redis
) -> None:
    a_consumer(client, lambda _: None)
    publish(bus, 1)
    client.xreadgroup(GROUP, "one", {STREAM: ">"})
    client.xgroup_delconsumer(STREAM, GROUP, "one")

    assert pending(client) == 0
    assert client.xreadgroup(GROUP, "two", {STREAM: ">"}) == []


def test_after_a_flushall_the_group_is_made_again_and_repetitions_are_told_apart(
    bus: RedisBus, client: redis.Redis, redis_server: RedisServer
) -> None:
    handled: list[str] = []
    consumer = a_consumer(client, lambda event: handled.append(event["id"]))
    stopping = threading.Event()
    running = threading.Thread(target=consumer.run, args=(stopping,), kwargs={"say": lambda _: None})
    running.start()
    try:
        publish(bus, 1, 2)
        eventually(lambda: len(handled) == 2)
        client.flushdb()
        again = RedisBus(redis_server.url.removesuffix("/0") + DB)
        again.create_stream()
        publish(again, 1, 2, 3)
        eventually(lambda: handled.count("evt_3") == 1)
    finally:
        stopping.set()
        running.join(10)

    assert handled == ["evt_1", "evt_2", "evt_1", "evt_2", "evt_3"]
    assert client.xinfo_consumers(STREAM, GROUP) == [], "it has left"


# --- the pages --------------------------------------------------------------------------------------------------------

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>\x1b[2J&lt;b&gt;\x00\u202e"


class Page(HTMLParser):
    """What a browser would see: its elements, balanced, and its text."""

    VOID = ("meta", "input", "br", "img")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def inbox(tmp_path: Path) -> Iterator[Inbox]:
    inbox = Inbox(tmp_path / "inbox.db")
    for tenant in ("bakery", "bikes"):
        inbox.add_customer(Customer(tenant, f"{tenant} & co", f"link-of-{tenant}"))
    yield inbox
    inbox.close()


def finished(tenant: str, *, name: str, run: str) -> dict[str, Any]:
    data = json.loads(json.dumps(finished_data(make_run(tenant=tenant)), default=str))
    step = {
        "n": 1, "name": name, "outcome": "failed", "duration_s": 0.5,
        "failures": [{"expectation": name, "expected": name, "actual": name}],
    }  # fmt: skip
    data |= {"phase": "finished", "outcome": "failed", "message": name, "steps": [step]}
    data["scenario"] = {"name": name, "digest": "sha256:0"}
    return {
        "id": f"evt_{run}", "type": "dev.blastdoor.run.finished", "subject": run, "tenant": tenant,
        "sequence": "0000000005", "time": "2026-01-01T12:00:00Z", "data": data,
    }  # fmt: skip


def page_of(inbox: Inbox, tenant: str) -> str:
    customer = inbox.by_link(f"link-of-{tenant}")
    assert customer is not None
    return customer_page(customer, inbox.runs_of(tenant), ["a sample"])


def test_each_customer_sees_its_own_results_and_nobody_elses(inbox: Inbox) -> None:
    for tenant, word in (("bakery", "secret of the bakery"), ("bikes", "secret of the bikes")):
        inbox.receive(finished(tenant, name=word, run=f"run_{tenant}"), by="webhook")
    inbox.receive(finished("a stranger", name="of nobody", run="run_x"), by="stream")

    bakery, bikes = page_of(inbox, "bakery"), page_of(inbox, "bikes")

    assert "secret of the bakery" in bakery
    assert "secret of the bikes" in bikes
    for page, others in ((bakery, "bikes"), (bikes, "bakery")):
        assert others not in page
        assert "of nobody" not in page
    assert inbox.by_link("link-of-nobody") is None


def test_what_comes_from_outside_is_text_on_every_page(inbox: Inbox) -> None:
    inbox.receive(finished("bakery", name=HOSTILE, run="run_1"), by="stream")
    customer = Customer("bakery", HOSTILE, "link")
    for html in (
        page_of(inbox, "bakery"), output_page(customer, "What step 1 printed", HOSTILE),
        customer_page(customer, [Shown("run_2", HOSTILE, None, None)], [HOSTILE]),
    ):  # fmt: skip
        page = Page(html)

        assert page.open == []
        assert "<script>alert(1)</script>" in page.text, "it is there, as text"
        assert not {tag for tag, _ in page.elements} & {"script", "img", "b", "iframe"}
        assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
        assert "\x00" not in html
        assert "\x1b" not in html
        assert "\u202e" not in html


def test_control_a_page_that_escapes_nothing_is_seen() -> None:
    tags = {tag for tag, _ in Page(f"<p>{HOSTILE}</p>").elements}

    assert {"script", "img"} <= tags


def test_a_page_loads_itself_again_only_while_something_is_under_way(inbox: Inbox) -> None:
    inbox.submitted("run_1", "bakery")
    assert 'http-equiv="refresh"' in page_of(inbox, "bakery")
    inbox.receive(finished("bakery", name="x", run="run_1"), by="stream")
    gone = {"id": "evt_9", "type": "dev.blastdoor.boundary.destroyed", "sequence": "0000000006", "data": {}}
    inbox.receive(finished("bakery", name="x", run="run_1") | gone, by="stream")

    assert 'http-equiv="refresh"' not in page_of(inbox, "bakery")
