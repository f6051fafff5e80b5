"""Deliveries to real receivers: what is signed, when it is tried again, and where it never goes."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, ip_address
from pathlib import Path

import pytest
from cryptography.fernet import Fernet

from service.adapters import http_hooks
from service.adapters.http_hooks import HttpHooks
from service.adapters.memory import MemoryStore
from service.adapters.redis_bus import RedisHints
from service.adapters.sealing import FernetBox
from service.adapters.sql.migrate import upgrade
from service.adapters.sql_store import SqlStore
from service.client import verify_webhook
from service.core.webhooks.addresses import Address
from service.core.webhooks.models import Attempt, Owner
from service.core.webhooks.schedule import SCHEDULE
from service.core.webhooks.urls import read_pairs
from service.relay.webhooks.dispatcher import Dispatcher
from service.usecases.webhooks import WithSecret, create_webhook, rotate_webhook
from tests.contract.store_steps import add_run, add_tenant
from tests.factories import make_run, make_scenario
from tests.receivers import (
    Flood,
    Receiver,
    answering,
    canary_on_a_webhook_port,
    dripping,
    eventually,
    hanging,
    receiving,
)
from tests.servers import RedisServer

ACME = Owner(tenant="acme")
KEY = Fernet.generate_key().decode()
PUBLIC = IPv4Address("93.184.215.14")


@dataclass
class World:
    """A store whose time is moved by hand, and a dispatcher that sends for real."""

    now: datetime = field(default_factory=lambda: datetime.now(UTC))
    box: FernetBox = field(default_factory=lambda: FernetBox([KEY]))

    def __post_init__(self) -> None:
        self.made = MemoryStore(clock=lambda: self.now)
        add_tenant(self.made)

    def endpoint(self, url: str) -> WithSecret:
        return create_webhook(self.made, self.box, owner=ACME, url=url, types=["*"])

    def log(self, endpoint: WithSecret) -> Sequence[Attempt]:
        return self.made.list_attempts(endpoint.endpoint.id, ACME, limit=100, before=None).items[::-1]

    def deliver(self, *allowed: Receiver, **more: object) -> None:
        """All that is due now, to the end of each attempt."""
        with self.dispatcher(*allowed, **more) as dispatcher:
            asyncio.run(_whole(dispatcher))

    @contextmanager
    def dispatcher(self, *allowed: Receiver, **more: object) -> Iterator[Dispatcher]:
        pairs = read_pairs(",".join(receiver.pair for receiver in allowed))
        hooks = HttpHooks(excepted=pairs, **more)  # type: ignore[arg-type]
        try:
            yield Dispatcher(self.made, hooks, self.box)
        finally:
            hooks.close()


async def _whole(dispatcher: Dispatcher) -> None:
    while await dispatcher.step() or dispatcher.in_flight:  # noqa: ASYNC110 - `step` is what is waited for
        await asyncio.sleep(0.005)
    await dispatcher.step()


async def _until(dispatcher: Dispatcher, true: Callable[[], bool], *, within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, "not within the time"
        await dispatcher.step()
        await asyncio.sleep(0.005)


@pytest.fixture
def world() -> World:
    return World()


def test_a_delivery_continues_the_trace_of_its_run(world: World) -> None:
    traced = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    scenario = make_scenario()
    run = make_run(tenant="acme", scenario=scenario)
    with receiving() as receiver:
        world.endpoint(receiver.url)
        world.made.submit(run, scenario, None, max_queued=9, traceparent=traced)
        world.deliver(receiver)
    assert receiver.hits[0].headers["traceparent"] == traced


def test_a_delivery_is_the_event_signed(world: World) -> None:
    with receiving() as receiver:
        made = world.endpoint(receiver.url)
        run = add_run(world.made)
        world.deliver(receiver)
    (hit,) = receiver.hits
    event = verify_webhook(made.secret, hit.headers, hit.body)
    assert (event["subject"], event["type"]) == (run.id, "dev.blastdoor.run.queued")
    assert hit.headers["webhook-id"] == event["id"]
    assert hit.headers["content-type"] == "application/cloudevents+json"
    assert hit.headers["host"] == receiver.pair
    assert [(line.status, line.error) for line in world.log(made)] == [(204, None)]


def test_d42_four_failures_then_success_by_the_schedule(world: World) -> None:
    with receiving(*[answering(500)] * 4, answering(200)) as receiver:
        made = world.endpoint(receiver.url)
        add_run(world.made)
        for _ in range(5):
            world.deliver(receiver)
            world.deliver(receiver)  # nothing comes before its time
            if (next_at := world.log(made)[-1].next_at) is not None:
                world.now = next_at
    log = world.log(made)
    assert [line.status for line in log] == [500, 500, 500, 500, 200]
    waits = [(line.next_at - line.at) for line in log if line.next_at is not None]
    assert all(abs(wait / planned - 1) <= 0.2 for wait, planned in zip(waits, SCHEDULE[1:5], strict=True)), waits
    assert len({hit.headers["webhook-id"] for hit in receiver.hits}) == 1
    assert len({hit.headers["webhook-timestamp"] for hit in receiver.hits}) == 5
    assert len({hit.headers["webhook-signature"] for hit in receiver.hits}) == 5
    assert len({hit.body for hit in receiver.hits}) == 1


def test_d42_gone_disables_the_endpoint(world: World) -> None:
    with receiving(answering(410)) as receiver:
        made = world.endpoint(receiver.url)
        add_run(world.made)
        world.deliver(receiver)
        add_run(world.made)
        world.deliver(receiver)
    assert len(receiver.hits) == 1
    shown = world.made.get_endpoint(made.endpoint.id, ACME)
    assert (shown.enabled, shown.disabled_reason) == (False, "gone")
    assert [letter.status for letter in world.made.dead_letters(limit=9, before=None).items] == [410]


def test_d42_retry_after_is_kept_to(world: World) -> None:
    with receiving(answering(429, Retry_After="120"), answering(200)) as receiver:
        made = world.endpoint(receiver.url)
        add_run(world.made)
        world.deliver(receiver)
        (line,) = world.log(made)
        assert line.next_at is not None
        assert timedelta(seconds=120) <= line.next_at - line.at <= timedelta(seconds=140)
        world.now = line.next_at
        world.deliver(receiver)
    assert [line.status for line in world.log(made)] == [429, 200]


def test_what_fails_to_the_end_is_a_dead_letter_and_can_be_replayed(world: World) -> None:
    with receiving(*[answering(503)] * len(SCHEDULE), answering(200)) as receiver:
        made = world.endpoint(receiver.url)
        add_run(world.made)
        for _ in SCHEDULE:
            world.deliver(receiver)
            world.now = world.log(made)[-1].next_at or world.now
        (letter,) = world.made.dead_letters(limit=9, before=None).items
        assert (letter.attempts, letter.status) == (len(SCHEDULE), 503)
        world.made.replay_delivery(letter.id, endpoint_id=made.endpoint.id, owner=ACME)
        world.deliver(receiver)
    assert world.log(made)[-1].status == 200
    assert len({hit.headers["webhook-id"] for hit in receiver.hits}) == 1
    assert not world.made.dead_letters(limit=9, before=None).items


def test_one_that_hangs_delays_nobody_else_and_is_given_back_at_the_end(world: World) -> None:
    with receiving(hanging) as bad, receiving() as good:
        hung, well = world.endpoint(bad.url), world.endpoint(good.url)
        for _ in range(12):
            add_run(world.made)

        async def play() -> None:
            with world.dispatcher(bad, good) as dispatcher:
                await _until(dispatcher, lambda: len(good.hits) == 12 and len(bad.hits) == 4)
                await _until(dispatcher, lambda: len(world.log(well)) == 12)
                assert dispatcher.in_flight == 4, "as many as one endpoint may have, and they still hang"
                await dispatcher.stop(within=timedelta(0))
                assert dispatcher.in_flight == 0

        asyncio.run(play())
        assert world.log(hung) == ()
        assert len(world.made.claim_deliveries({hung.endpoint.id: 99}, lease=timedelta(seconds=1))) == 12


def test_a_receiver_can_hold_an_attempt_only_for_so_long_and_make_it_read_only_so_much(world: World) -> None:
    flood = Flood()
    with receiving(hanging) as mute, receiving(dripping) as drip, receiving(flood) as big:
        made = [world.endpoint(receiver.url) for receiver in (mute, drip, big)]
        add_run(world.made)
        began = time.monotonic()
        world.deliver(mute, drip, big, timeout=timedelta(seconds=0.7))
        assert time.monotonic() - began < 15
    assert [(world.log(one)[0].status, world.log(one)[0].error) for one in made] == [
        (None, "timeout"), (None, "timeout"), (200, None),
    ]  # fmt: skip
    assert 0 < flood.sent < 2**26, "what the sockets hold, and no gigabyte"


@pytest.mark.parametrize("status", [301, 302, 307])
def test_d09_a_redirect_is_a_failure_and_is_not_followed(world: World, status: int) -> None:
    with receiving() as canary, receiving(answering(status, Location=canary.url)) as receiver:
        made = world.endpoint(receiver.url)
        add_run(world.made)
        world.deliver(receiver, canary)
        assert [(line.status, line.error) for line in world.log(made)] == [(status, "redirect")]
        assert (len(receiver.hits), len(canary.hits)) == (1, 0)

        world.endpoint(canary.url)
        add_run(world.made)
        world.deliver(receiver, canary)
        assert len(canary.hits) == 1, "control: it would have been hit"


@pytest.mark.parametrize("answers", [["127.0.0.1"], [str(PUBLIC), "127.0.0.1"], ["::ffff:127.0.0.1"]])
def test_d10_a_name_that_leads_inside_by_now_is_not_connected_to(
    world: World, answers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def rebound(host: str, port: int) -> Sequence[Address]:
        assert host == "rebind.example.com"
        return [ip_address(answer) for answer in answers]

    with canary_on_a_webhook_port() as (port, hits):
        made = world.endpoint(f"https://rebind.example.com:{port}/hooks")
        add_run(world.made)
        world.deliver(resolver=rebound)
        assert [(line.status, line.error) for line in world.log(made)] == [(None, "blocked_address")]
        assert hits == []

        monkeypatch.setattr(http_hooks, "judge_answers", lambda *_: None)
        answers[:] = ["127.0.0.1"]
        world.now = world.log(made)[-1].next_at or world.now
        world.deliver(resolver=rebound, timeout=timedelta(seconds=5))
        assert world.log(made)[-1].error in ("tls", "connect", "protocol")
        eventually(lambda: len(hits) == 1)  # control: unjudged, it would have been hit


def test_after_a_rotation_either_secret_verifies(world: World) -> None:
    with receiving() as receiver:
        made = world.endpoint(receiver.url)
        again = rotate_webhook(world.made, world.box, endpoint_id=made.endpoint.id, owner=ACME)
        add_run(world.made)
        world.deliver(receiver)
        world.now += timedelta(hours=25)
        add_run(world.made)
        world.deliver(receiver)
    both, after = receiver.hits
    assert verify_webhook(made.secret, both.headers, both.body) == verify_webhook(again.secret, both.headers, both.body)
    assert len(both.headers["webhook-signature"].split()) == 2
    assert len(after.headers["webhook-signature"].split()) == 1


def test_a_secret_that_cannot_be_opened_is_said_and_tried_again(world: World) -> None:
    with receiving() as receiver:
        made = world.endpoint(receiver.url)
        add_run(world.made)
        mine, world.box = world.box, FernetBox([Fernet.generate_key().decode()])
        world.deliver(receiver)
        (line,) = world.log(made)
        assert (line.error, receiver.hits) == ("secret_unreadable", [])
        assert line.next_at is not None
        world.now, world.box = line.next_at, mine
        world.deliver(receiver)
    assert len(receiver.hits) == 1


def test_the_database_has_no_secret_in_clear(sqlite_database: str) -> None:
    upgrade(sqlite_database)
    store, box = SqlStore(sqlite_database), FernetBox([KEY])
    add_tenant(store)
    made = create_webhook(store, box, owner=ACME, url="https://a.example.com/", types=["*"])
    again = rotate_webhook(store, box, endpoint_id=made.endpoint.id, owner=ACME)
    store.close()
    path = Path(sqlite_database.removeprefix("sqlite:///"))
    kept = b"".join(each.read_bytes() for each in path.parent.glob(path.name + "*"))
    for secret in (made.secret, again.secret):
        assert secret.encode() not in kept
        assert secret.removeprefix("whsec_").encode() not in kept
    reopened = SqlStore(sqlite_database)
    with reopened._db.read() as connection:
        row = connection.exec_driver_sql("SELECT secret, old_secret FROM webhook_endpoint").one()
    reopened.close()
    assert [box.unseal(sealed) for sealed in row] == [again.secret, made.secret], "control: they are there, sealed"
    assert row[0].encode() in kept


# --- the process ------------------------------------------------------------------------------------------------------


def _start(database: str, redis_url: str, log: Path, **more: str) -> "subprocess.Popen[bytes]":
    environment = {
        "PATH": os.environ["PATH"], "BLASTDOOR_DATABASE_URL": database, "BLASTDOOR_REDIS_URL": redis_url, **more,
    }  # fmt: skip
    with log.open("ab") as stream:
        return subprocess.Popen([sys.executable, "-m", "service.relay.webhooks"], env=environment, stderr=stream)


def test_the_process_delivers_survives_kill_9_and_ends_politely(
    sqlite_database: str, redis_server: RedisServer, tmp_path: Path
) -> None:
    upgrade(sqlite_database)
    store, box, log = SqlStore(sqlite_database), FernetBox([KEY]), tmp_path / "log"
    add_tenant(store)
    with ExitStack() as stack:
        stack.callback(store.close)
        receiver = stack.enter_context(receiving(hanging, answering(204)))
        made = create_webhook(store, box, owner=ACME, url=receiver.url, types=["*"])
        settings = {"BLASTDOOR_SECRETS_KEY": KEY, "BLASTDOOR_WEBHOOK_ALLOW": receiver.pair}

        def start() -> "subprocess.Popen[bytes]":
            process = _start(sqlite_database, redis_server.url, log, **settings)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        first = start()
        add_run(store)
        RedisHints(redis_server.url).hint("outbox", "x")
        eventually(lambda: len(receiver.hits) == 1)
        first.kill()
        first.wait()
        assert store.list_attempts(made.endpoint.id, ACME, limit=9, before=None).pending == 1
        with store._db.write() as connection:  # the lease ends
            connection.exec_driver_sql(
                "UPDATE webhook_delivery SET next_at = (SELECT created_at FROM webhook_endpoint)"
            )
        second = start()
        eventually(lambda: len(store.list_attempts(made.endpoint.id, ACME, limit=9, before=None).items) == 1)
        assert [hit.headers["webhook-id"] for hit in receiver.hits] == [receiver.hits[0].headers["webhook-id"]] * 2
        receiver.script[:] = [hanging]
        add_run(store)
        eventually(lambda: len(receiver.hits) == 3)
        began = time.monotonic()
        second.send_signal(signal.SIGTERM)
        assert second.wait(20) == 0, log.read_text()
        assert time.monotonic() - began < 10
        assert len(store.claim_deliveries({made.endpoint.id: 9}, lease=timedelta(seconds=1))) == 1, "given back"


def test_the_process_without_a_key_says_so_and_ends(
    sqlite_database: str, redis_server: RedisServer, tmp_path: Path
) -> None:
    upgrade(sqlite_database)
    process = _start(sqlite_database, redis_server.url, tmp_path / "log")
    assert process.wait(30) == 1
    assert "BLASTDOOR_SECRETS_KEY" in (tmp_path / "log").read_text()
