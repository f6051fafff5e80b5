"""Five hundred who watch, on a real server process: they get what they wait for, cost nobody else anything, and are let
go when the process ends; the process may be another one by then."""

import selectors
import signal
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from service.adapters.sql_store import SqlStore
from service.core.news import News, NewsKind, render_output
from service.core.run import Phase
from service.core.tenancy import KeyKind, Quota
from service.usecases.keys import mint
from tests.contract.store_steps import add_run, bring_to
from tests.factories import make_result, make_tenant
from tests.integration.api.test_process import _environment, _started
from tests.servers import RedisServer
from tests.sse import Event, Reader, watch, watching

WATCHERS = 500
TALKING = 5
PROBES = 150
WITHIN_S = 40.0


class Answer:
    """An HTTP/1.1 answer in chunks, fed with bytes as they come. -> those of its body."""

    def __init__(self) -> None:
        self.head = self._rest = b""

    def feed(self, data: bytes) -> bytes:
        self._rest += data
        if not self.head:
            self.head, _, self._rest = self._rest.partition(b"\r\n\r\n")
        body = b""
        while b"\r\n" in self._rest:
            size, _, chunk = self._rest.partition(b"\r\n")
            length = int(size, 16)
            if len(chunk) < length + 2:
                break
            body += chunk[:length]
            self._rest = chunk[length + 2 :]
        return body


class Crowd:
    """Watchers, each with a connection of its own, read by one thread."""

    def __init__(self, url: str, key: str, run_ids: Sequence[str], stack: ExitStack) -> None:
        address = urlsplit(url)
        self.seen: list[list[Event]] = [[] for _ in run_ids]
        self.ended: set[int] = set()
        self._selector = stack.enter_context(selectors.DefaultSelector())
        self._readers = [Reader() for _ in run_ids]
        for n, run_id in enumerate(run_ids):
            connection = stack.enter_context(
                socket.create_connection((address.hostname, address.port), timeout=WITHIN_S)
            )
            head = f"Host: x\r\nConnection: close\r\nAuthorization: Bearer {key}\r\n\r\n"
            request = f"GET /v1/runs/{run_id}/events HTTP/1.1\r\n{head}"
            connection.sendall(request.encode())
            connection.setblocking(False)
            self._selector.register(connection, selectors.EVENT_READ, n)
        self._answers = [Answer() for _ in run_ids]
        self._stop = threading.Event()
        thread = threading.Thread(target=self._read, name="crowd", daemon=True)
        thread.start()
        stack.callback(thread.join, 10)
        stack.callback(self._stop.set)

    def _read(self) -> None:
        while not self._stop.is_set():
            for key, _ in self._selector.select(0.1):
                assert isinstance(key.fileobj, socket.socket)
                data, n = key.fileobj.recv(65536), key.data
                if not data:
                    self._selector.unregister(key.fileobj)
                    self.ended.add(n)
                else:
                    self.seen[n] += self._readers[n].feed(self._answers[n].feed(data))

    def all_answered(self) -> bool:
        return all(b" 200 " in answer.head.partition(b"\r\n")[0] for answer in self._answers)


def until(happens: object, *, within_s: float = WITHIN_S) -> None:
    deadline = time.monotonic() + within_s
    assert callable(happens)
    while not happens():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def health_p95_s(url: str) -> float:
    took = []
    with httpx.Client(base_url=url, trust_env=False) as client:
        client.get("/healthz")
        for _ in range(PROBES):
            began = time.perf_counter()
            assert client.get("/healthz").status_code == 200
            took.append(time.perf_counter() - began)
            time.sleep(0.005)
    return statistics.quantiles(took, n=20)[-1]


@contextmanager
def prepared(database: str) -> Iterator[tuple[SqlStore, str]]:
    store = SqlStore(database, synchronous="NORMAL")
    try:
        store.create_tenant(make_tenant().model_copy(update={"quota": Quota(concurrent=100, queued=1000)}))
        yield store, mint(store, kind=KeyKind.TENANT, tenant="acme").key
    finally:
        store.close()


@contextmanager
def talking(store: SqlStore, held: Sequence[tuple[str, int]]) -> Iterator[None]:
    """These runs print something twenty times a second, without a hint: the poll has to find it."""
    stop = threading.Event()

    def talk() -> None:
        k = 0
        while not stop.wait(0.05):
            k += 1
            data = render_output(step=1, stream="stdout", seq=k - 1, text=f"line {k}\n")
            for run_id, fence in held:
                store.append_news(run_id, fence, [News(k=k, kind=NewsKind.OUTPUT, data=data)])

    thread = threading.Thread(target=talk, name="talking")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_five_hundred_watchers_get_what_they_wait_for_while_health_answers_at_once(
    tmp_path: Path, sqlite_database: str, redis_server: RedisServer
) -> None:
    # Nobody reads its log: what 500 requests write would fill the pipe.
    environment = _environment(tmp_path, sqlite_database, redis_server.url, LOG_LEVEL="warning")
    with (
        _started(environment) as (process, url),
        prepared(sqlite_database) as (store, key),
        ExitStack() as stack,
    ):
        held = []
        for _ in range(TALKING):
            add_run(store)
            claim = bring_to(store, Phase.RUNNING)
            held.append((claim.run.id, claim.fence))
        waiting = [add_run(store, max_queued=1000).id for _ in range(WATCHERS - 4 * TALKING)]
        alone_s = health_p95_s(url)

        crowd = Crowd(url, key, [*waiting, *(run_id for run_id, _ in held for _ in range(4))], stack)
        until(lambda: all(crowd.seen) and crowd.all_answered())
        with talking(store, held):
            crowded_s = health_p95_s(url)
            until(lambda: all(len(seen) > 8 for seen in crowd.seen[len(waiting) :]))
        print(f"healthz p95: alone {alone_s * 1000:.1f} ms, with {WATCHERS} watchers {crowded_s * 1000:.1f} ms")
        assert crowded_s < 5 * alone_s + 0.1, (alone_s, crowded_s)

        for run_id in waiting:
            store.request_cancel(run_id, None, by="tenant")
        until(lambda: len(crowd.ended) == len(waiting))
        assert crowd.ended == set(range(len(waiting)))
        assert {tuple(f"{e.id} {e.event}" for e in crowd.seen[n]) for n in crowd.ended} == {
            ("1.0 phase", "2.0 phase", "2.1 result")
        }
        for n in range(len(waiting), WATCHERS):
            marks = [event.mark for event in crowd.seen[n]]
            assert marks == [(1, 0), (2, 0), *((3, k) for k in range(len(marks) - 2))], "no gap, no repeat"
        _ends_at_once(process)
        until(lambda: len(crowd.ended) == WATCHERS, within_s=5)


def _ends_at_once(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert process.wait(10) == 0
    assert time.monotonic() - began < 3.5, "uvicorn's own patience is 4 s"


def test_a_watcher_goes_on_with_the_next_process_where_the_last_one_left_it(
    tmp_path: Path, sqlite_database: str, redis_server: RedisServer
) -> None:
    environment = _environment(tmp_path, sqlite_database, redis_server.url)
    seen: list[Event] = []

    def client(url: str) -> httpx.Client:
        return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, trust_env=False)

    def say(k: int) -> None:
        data = render_output(step=1, stream="stdout", seq=k - 1, text=f"{k}")
        store.append_news(held.run.id, held.fence, [News(k=k, kind=NewsKind.OUTPUT, data=data)])

    with _started(dict(environment)) as (process, url), prepared(sqlite_database) as (store, key):
        add_run(store)
        held = bring_to(store, Phase.RUNNING)
        say(1)
        with client(url) as first, watching(first, held.run.id) as events:
            seen += [next(events) for _ in range(4)]
            _ends_at_once(process)
            assert list(events) == [], "the stream ends, and says nothing that is not so"
        say(2)
        with _started(dict(environment)) as (killed, url2), client(url2) as second:
            with watching(second, held.run.id, after=seen[-1].id) as events:
                seen.append(next(events))
                killed.kill()
                with suppress(httpx.TransportError):
                    assert list(events) == []
            say(3)
        store.mark_collecting(held.run.id, held.fence)
        store.finish(held.run.id, held.fence, make_result())
        with _started(dict(environment)) as (_, url3), client(url3) as third:
            seen += watch(third, held.run.id, after=seen[-1].id)

            assert [event.id for event in seen] == ["1.0", "2.0", "3.0", "3.1", "3.2", "3.3", "4.0", "5.0", "5.1"]
            assert seen == watch(third, held.run.id)
