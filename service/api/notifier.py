"""Wakes the requests that wait for a run: one thread for all of them.

It listens for hints, and every 250 ms asks the store about everything that is waited for, in one query; so a lost
hint costs a quarter of a second and nothing else. A waiter is an event on the loop, not a thread.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import structlog

from service.core.errors import BlastdoorError
from service.core.news import Mark, Newest
from service.core.ports.publishing import Hints

POLL_S = 0.25
TOPICS = ("run", "outbox", "news")

log = structlog.get_logger()


class Waiter:
    """For the run's end, and when `seen` is set, for anything that is told of it beyond that mark."""

    def __init__(self, seen: Mark | None = None) -> None:
        self.event = asyncio.Event()
        self.seen = seen

    def wants(self, newest: Newest | None) -> bool:
        """`None`: the run is gone."""
        if newest is None:
            return True
        return newest.finished if self.seen is None else newest.mark > self.seen


class Notifier:
    """Lives on one event loop: `start`, `waiting`, `following` and the events belong to it."""

    def __init__(
        self, hints: Hints, newest: Callable[[Iterable[str]], Mapping[str, Newest]], *, poll_s: float = POLL_S
    ) -> None:
        self._hints = hints
        self._newest = newest
        self._poll_s = poll_s
        self._waiting: dict[str, set[Waiter]] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._watch, name="notifier", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Let every waiter go, now and from now on: the process is about to end. Signal handlers may call it."""
        self._closed.set()
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake_all)

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join(timeout=4 * self._poll_s)

    @contextmanager
    def waiting(self, run_id: str) -> Iterator[asyncio.Event]:
        """An event that is set when the run is finished or gone. Enter this, then read the run: nothing is missed."""
        with self._registered(run_id, Waiter()) as waiter:
            yield waiter.event

    @contextmanager
    def following(self, run_id: str, *, seen: Mark) -> Iterator[Waiter]:
        """One whose event is set when more is told of the run than it has `seen`, or the run is gone; now and then too
        often. Clear the event, then read, then say what was seen: nothing is missed."""
        with self._registered(run_id, Waiter(seen)) as waiter:
            yield waiter

    @contextmanager
    def _registered(self, run_id: str, waiter: Waiter) -> Iterator[Waiter]:
        if self._closed.is_set():
            waiter.event.set()
        with self._lock:
            self._waiting.setdefault(run_id, set()).add(waiter)
        try:
            yield waiter
        finally:
            with self._lock:
                others = self._waiting[run_id]
                others.discard(waiter)
                if not others:
                    del self._waiting[run_id]

    @property
    def waiters(self) -> int:
        with self._lock:
            return sum(len(waiters) for waiters in self._waiting.values())

    def _watch(self) -> None:
        while not self._closed.is_set():
            try:
                self._follow()
            except BlastdoorError as error:
                log.warning("waiting_runs_not_asked", error=str(error))
            except Exception:
                log.exception("notifier_failed")
            self._closed.wait(self._poll_s)

    def _follow(self) -> None:
        asked_at = time.monotonic()
        for hint in self._hints.listen(TOPICS, poll_s=self._poll_s):
            if self._closed.is_set():
                return
            with self._lock:
                waited_for = frozenset(self._waiting)
            now = time.monotonic()
            if hint is None or now - asked_at >= self._poll_s:
                asked_at = now
            elif hint[0] == "run":
                waited_for &= {hint[1]}
            else:
                # Followers find out by themselves: a question for each of many hints would be one too many.
                self._call(self._wake_followers, hint[1])
                continue
            if waited_for:
                self._call(self._wake, waited_for, self._newest(waited_for))

    def _call(self, wake: Callable[..., None], *args: object) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(wake, *args)

    def _wake(self, asked: frozenset[str], newest: Mapping[str, Newest]) -> None:
        for run_id in asked:
            for waiter in self._of(run_id):
                if waiter.wants(newest.get(run_id)):
                    waiter.event.set()

    def _wake_followers(self, run_id: str) -> None:
        for waiter in self._of(run_id):
            if waiter.seen is not None:
                waiter.event.set()

    def _wake_all(self) -> None:
        with self._lock:
            everybody = [waiter for waiters in self._waiting.values() for waiter in waiters]
        for waiter in everybody:
            waiter.event.set()

    def _of(self, run_id: str) -> list[Waiter]:
        with self._lock:
            return list(self._waiting.get(run_id, ()))
