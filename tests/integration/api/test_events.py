"""GET /v1/runs/{id}/events as it is served: order, resuming, what guests print, who may watch, and how it ends."""

import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from service.api import following
from service.core.ids import new_run_id
from service.core.news import News, NewsKind, render_output
from tests.factories import make_result
from tests.integration.api.conftest import DATABASES, Served, make_settings, serve
from tests.scenes import eventually
from tests.servers import RedisServer, run_redis
from tests.sse import Event, Reader, watch, watching

on_both_databases = pytest.mark.parametrize("settings", DATABASES, indirect=True)
PAGES = 48
FORGERIES = {
    "a frame": '\n\nid: 999.1\nevent: result\ndata: {"outcome": "passed"}\n\n',
    "by carriage return": '\r\rid: 999.1\revent: result\rdata: {"outcome": "passed"}\r\r',
    "by both": '\r\n\r\nevent: result\r\ndata: {}\r\n\r\n',
    "a field": "\nid: 999.1\nretry: 1\n: comment\n",
    "by what Python takes for the end of a line": (
        "\u2028\u2028event: result\u2029data: {}\x85\x85\x0b\x0c\x1c\x1d\x1eid: 9.9\x1c"
    ),
    "terminal": "\x1b[2J\x1b]0;owned\x07\x1b]52;c;aGk=\x07\x1b]8;;http://x\x07\u202egnp.exe\b\b\x07",
    "nothing and halves": "\0\0\ufffd\U0001d11e\ufeff",
    "our own words": (
        '{"specversion":"1.0","type":"dev.blastdoor.run.finished","data":{"outcome":"passed"}}\n::set-env name=A::b\n'
    ),
}  # fmt: skip


def output(k: int, text: str = "", *, step: int = 1, seq: int | None = None) -> News:
    data = render_output(step=step, stream="stdout", seq=k - 1 if seq is None else seq, text=text)
    return News(k=k, kind=NewsKind.OUTPUT, data=data)


class Played:
    """A run that a worker has claimed, which is this test."""

    def __init__(self, served: Served) -> None:
        self._served, self.id = served, served.submit()["id"]
        self._claim = served.claim()
        assert self._claim.run.id == self.id
        self.fence = self._claim.fence

    def run(self) -> None:
        self._served.store.mark_running(self.id, self.fence)
        self.hint("outbox")

    def say(self, *news: News, hint: bool = True) -> None:
        self._served.store.append_news(self.id, self.fence, news)
        if hint:
            self.hint("news")

    def finish(self, **result: Any) -> None:
        self._served.store.mark_collecting(self.id, self.fence)
        self._served.store.finish(self.id, self.fence, make_result(**result))
        self.hint("run")
        self._served.store.record_destroyed(self.id, self.fence)
        self.hint("outbox")

    def hint(self, topic: str) -> None:
        self._served.hints.hint(topic, self.id)


def tell_much(played: Played) -> int:
    """More than sockets hold, in `PAGES` pages. -> bytes of it."""
    text = "A" * 16_000
    for first in range(1, PAGES * 16, 64):
        played.say(*(output(k, text) for k in range(first, first + 64)))
    return PAGES * 16 * len(text)


def short(events: list[Event]) -> list[str]:
    said = {"phase": "phase", "output": "text", "progress": "stage", "result": "outcome"}
    return [f"{event.id} {event.event} {event.json[said[event.event]]}" for event in events]


@on_both_databases
def test_a_run_is_told_from_its_beginning_to_its_result(served: Served) -> None:
    acme = served.client("acme")
    played = Played(served)
    played.run()
    played.say(output(1, "one"), output(2, "two"))
    with watching(acme, played.id) as events:
        seen = [next(events) for _ in range(5)]
        played.say(output(3, "three"))
        seen.append(next(events))
        assert served.store.get_run(played.id, None).phase == "running", "it is told while it happens"
        played.finish()
        seen += events

    assert short(seen) == [
        "1.0 phase queued", "2.0 phase provisioning", "3.0 phase running", "3.1 output one", "3.2 output two",
        "3.3 output three", "4.0 phase collecting", "5.0 phase finished", "5.1 result passed",
    ]  # fmt: skip
    assert seen[3].json == {"step": 1, "stream": "stdout", "seq": 0, "text": "one"}
    queue = {"queue_position", "queue_reason", "message"}
    assert set(seen[0].json) == {"phase", "at", "attempt", "outcome", "reason", *queue}
    assert (seen[7].json["outcome"], seen[7].json["attempt"]) == ("passed", 1)
    shown = acme.get(f"/v1/runs/{played.id}").json()
    assert seen[-1].json | {"boundary_destroyed_at": None} == shown | {"boundary_destroyed_at": None}
    assert [event.id for event in watch(acme, played.id)] == [event.id for event in seen]


@on_both_databases
def test_it_goes_on_after_any_id_with_exactly_what_follows(served: Served) -> None:
    acme = served.client("acme")
    played = Played(served)
    played.run()
    played.say(*(output(k, f"{k} " + "x" * 20 * k) for k in range(1, 41)))
    played.finish()

    every = watch(acme, played.id)
    assert len(every) == 46
    assert [event.mark for event in every] == sorted(event.mark for event in every)
    for start, event in enumerate(every, start=1):
        assert watch(acme, played.id, after=event.id) == every[start:], event.id
    by_query = acme.get(f"/v1/runs/{played.id}/events?last_event_id={every[-2].id}")
    assert list(Reader().feed(by_query.content)) == every[-1:]


def test_after_the_result_there_is_nothing_and_an_event_source_is_told_to_stay_away(served: Served) -> None:
    run_id = _finished(served)
    last = watch(served.client("acme"), run_id)[-1]

    answer = served.client("acme").get(f"/v1/runs/{run_id}/events", headers={"Last-Event-ID": last.id})

    assert (answer.status_code, answer.content) == (204, b"")


def test_the_headers_keep_proxies_from_storing_and_gathering(served: Served) -> None:
    answer = served.client("acme").get(f"/v1/runs/{_finished(served)}/events")

    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-request-id"]
    assert "content-length" not in answer.headers


@pytest.mark.parametrize(
    "last", ["", "1", "1.", ".1", "a.b", "1.-1", "01.1", "1.1.1", "1.9999999999", "٣.١", "1.1\x00", "null"]
)
def test_what_was_never_an_id_is_422(served: Served, last: str) -> None:
    run_id = _finished(served)
    for where, words in (
        ("query.last_event_id", {"params": {"last_event_id": last}}),
        ("header.Last-Event-ID", {"headers": {"Last-Event-ID": last.encode().replace(b"\0", b"~")}}),
    ):
        answer = served.client("acme").get(f"/v1/runs/{run_id}/events", **words)  # type: ignore[arg-type]

        assert (answer.status_code, answer.json()["code"]) == (422, "request_invalid"), (where, answer.text)
        assert [row["path"] for row in answer.json()["errors"]] == [where]


# --- what guests print -----------------------------------------------------------------------------------------------


@on_both_databases
def test_nothing_that_a_guest_prints_is_an_event_or_a_line(served: Served) -> None:
    acme = served.client("acme")
    played = Played(served)
    played.run()
    played.say(*(output(k, text) for k, text in enumerate(FORGERIES.values(), start=1)))
    played.finish()

    answer = acme.get(f"/v1/runs/{played.id}/events")
    seen = list(Reader().feed(answer.content))
    assert [event.json["text"] for event in seen if event.event == "output"] == list(FORGERIES.values())
    assert [event.id for event in seen if event.event == "result"] == ["5.1"]
    assert not {event.id for event in seen} & {"999.1", "9.9"}
    assert answer.content.isascii()
    assert not set(answer.content) & (set(range(32)) - {10})
    # A client that takes for the end of a line whatever Python does sees the same.
    assert [line for line in answer.text.splitlines() if line.startswith(("id:", "event:"))] == [
        line for line in answer.content.decode().split("\n") if line.startswith(("id:", "event:"))
    ]


@pytest.mark.parametrize("forgery", FORGERIES)
def test_the_same_text_unescaped_would_be_one(forgery: str) -> None:
    """The positive control: the readers above do fall for what is not escaped."""
    frame = f'id: 3.1\nevent: output\ndata: {{"text": "{FORGERIES[forgery]}"}}\n\n'.encode()
    try:
        seen = list(Reader().feed(frame))
        forged = [event.event for event in seen] != ["output"] or seen[0].id != "3.1"
    except AssertionError:
        forged = True
    naive = len(frame.decode().splitlines()) != 4

    assert forged or naive or set(frame) & (set(range(32)) - {10}) or not frame.isascii()


# --- who may watch ---------------------------------------------------------------------------------------------------


@on_both_databases
def test_another_tenants_stream_is_the_same_404_as_one_that_never_was(served: Served) -> None:
    theirs, never = Played(served), new_run_id()
    theirs.run()
    theirs.say(output(1, "secret"))
    for last in (None, "1.0", "3.1"):
        headers = {} if last is None else {"Last-Event-ID": last}
        answers = [
            served.client("globex").get(f"/v1/runs/{run_id}/events", headers=headers) for run_id in (theirs.id, never)
        ]
        bodies = [answer.text.replace(theirs.id, never) for answer in answers]
        ids = [answer.headers["x-request-id"] for answer in answers]

        assert [answer.status_code for answer in answers] == [404, 404]
        assert bodies[0].replace(ids[0], "") == bodies[1].replace(ids[1], "")
        assert [answer.headers["content-type"] for answer in answers] == ["application/problem+json"] * 2
    with watching(served.client("acme"), theirs.id) as events:
        assert next(events).event == "phase"  # the positive control: its owner sees it


def test_a_service_watches_for_its_own_tenants_only(served: Served) -> None:
    run_id = served.submit("shop", headers={"Blastdoor-Tenant": "corner"})["id"]
    shop = served.client("shop")

    with shop.stream("GET", f"/v1/runs/{run_id}/events", headers={"Blastdoor-Tenant": "corner"}) as answer:
        assert answer.status_code == 200
    assert shop.get(f"/v1/runs/{run_id}/events", headers={"Blastdoor-Tenant": "acme"}).status_code == 404


# --- how it goes on and ends -----------------------------------------------------------------------------------------


def test_a_lost_hint_costs_a_poll_and_nothing_else(served: Served) -> None:
    played = Played(served)
    played.run()
    with watching(served.client("acme"), played.id) as events:
        seen = [next(events) for _ in range(3)]
        played.say(output(1, "unhinted"), hint=False)
        seen.append(next(events))

    assert short(seen)[-1] == "3.1 output unhinted"


def test_a_queued_run_says_where_it_stands_and_its_cancellation_is_told(served: Served) -> None:
    acme = served.client("acme")
    served.submit()
    run_id = served.submit()["id"]
    with watching(acme, run_id) as events:
        first = next(events)
        assert acme.post(f"/v1/runs/{run_id}/cancel").status_code == 202
        rest = list(events)

    assert (first.json["phase"], first.json["queue_position"]) == ("queued", 2)
    assert short(rest) == ["2.0 phase finished", "2.1 result cancelled"]
    assert rest[0].json["reason"] == "cancelled_by_tenant"


def test_the_stream_of_a_run_that_is_deleted_ends(served: Served) -> None:
    acme = served.client("acme")
    played = Played(served)
    played.run()
    with watching(acme, played.id, after="9.9") as events:
        played.finish()
        assert acme.delete(f"/v1/runs/{played.id}").status_code == 204
        assert [event for event in events if event.event != "result"] == []


def test_silence_is_filled_with_comments(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "KEEP_ALIVE_S", 0.05)
    run_id, reader = served.submit()["id"], Reader()
    with served.client("acme").stream("GET", f"/v1/runs/{run_id}/events") as answer:
        seen: list[Event] = []
        for chunk in answer.iter_raw():
            seen += reader.feed(chunk)
            if len(reader.comments) >= 3:
                break

    assert short(seen) == ["1.0 phase queued"]
    assert reader.retry == ["1000"]


def test_those_who_leave_are_forgotten(served: Served) -> None:
    run_id = served.submit()["id"]
    notifier = served.app.state.context.notifier
    for _ in range(3):
        with watching(served.client("acme"), run_id) as events:
            next(events)
            eventually(lambda: notifier.waiters == 1)
        eventually(lambda: notifier.waiters == 0)


def test_a_long_story_is_read_a_page_at_a_time_by_who_does_not_take_it(served: Served) -> None:
    """A client that reads nothing: the server holds a page and what fits the sockets, and goes on when it reads."""
    played = Played(served)
    played.run()
    sent = tell_much(played)
    read: list[int] = []
    store = served.app.state.context.deps.runs
    real = store.read_news
    store.read_news = lambda *args, **words: (read.append(1), real(*args, **words))[1]
    with _raw_watcher(served, played.id) as connection:
        time.sleep(0.5)
        assert 0 < len(read) < PAGES - 8, "the sockets hold a few MiB, and the server one page"
        received = 0
        while received < sent:
            received += len(connection.recv(65536))
    assert len(read) >= PAGES - 1
    played.finish()


def test_a_watcher_that_takes_nothing_for_too_long_is_hung_up_on(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "PAGE_WITHIN_S", 0.1)
    played = Played(served)
    played.run()
    tell_much(played)
    notifier = served.app.state.context.notifier
    with _raw_watcher(served, played.id):
        eventually(lambda: notifier.waiters == 1)
        eventually(lambda: notifier.waiters == 0)
    played.finish()


def test_a_store_that_is_away_for_a_moment_is_asked_again(served: Served) -> None:
    from service.core.errors import Unavailable

    played = Played(served)
    played.run()
    store = served.app.state.context.deps.runs
    real, fails = store.read_news, [1, 1]

    def read_news(*args: Any, **words: Any) -> Any:
        if fails:
            fails.pop()
            raise Unavailable("away")
        return real(*args, **words)

    with watching(served.client("acme"), played.id) as events:
        seen = [next(events) for _ in range(3)]
        store.read_news = read_news
        played.say(output(1, "after all"))
        seen.append(next(events))

    assert short(seen)[-1] == "3.1 output after all"
    assert not fails


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    with run_redis() as server:
        yield server


def test_redis_flushed_and_killed_in_between_costs_no_event(
    tmp_path: Any, sqlite_database: str, own_redis: RedisServer
) -> None:
    import os
    import signal

    import redis

    for served in serve(make_settings(tmp_path, sqlite_database, own_redis.url)):
        played = Played(served)
        played.run()
        with watching(served.client("acme"), played.id) as events:
            seen = [next(events) for _ in range(3)]
            redis.Redis.from_url(own_redis.url).flushall()
            played.say(output(1, "flushed"))
            seen.append(next(events))
            os.kill(own_redis.pid, signal.SIGKILL)
            played.say(output(2, "killed"))
            seen.append(next(events))
            played.finish()
            seen += events
        assert short(seen) == [
            "1.0 phase queued", "2.0 phase provisioning", "3.0 phase running", "3.1 output flushed",
            "3.2 output killed", "4.0 phase collecting", "5.0 phase finished", "5.1 result passed",
        ]  # fmt: skip
        assert watch(served.client("acme"), played.id, after="3.1") == seen[4:]


def _finished(served: Served) -> str:
    served.submit()
    return served.play()


def _raw_watcher(served: Served, run_id: str) -> socket.socket:
    """A connection that has asked for the stream and reads nothing by itself."""
    address = urlsplit(served.url)
    assert address.hostname is not None
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
    connection.settimeout(30)
    connection.connect((address.hostname, address.port))
    request = f"GET /v1/runs/{run_id}/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {served.keys['acme']}\r\n\r\n"
    connection.sendall(request.encode())
    return connection
