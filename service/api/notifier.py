"""Wakes the requests that wait for a run: one thread for all of them.

It listens for hints, and every 250 ms asks the store about everything that is waited for, in one query; so a lost
hint costs a quarter of a second and nothing else. A waiter is an event on the loop, not a thread.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import structlog

from service.core.errors import BlastdoorError
from service.core.ports import Hints

POLL_S = 0.25

log = structlog.get_logger()


class Notifier:
    """Lives on one event loop: `start`, `waiting` and the events belong to it."""

    def __init__(
        self, hints: Hints, finished_among: Callable[[Iterable[str]], frozenset[str]], *, poll_s: float = POLL_S
    ) -> None:
        self._hints = hints
        self._finished_among = finished_among
        self._poll_s = poll_s
        self._waiting: dict[str, set[asyncio.Event]] = {}
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
            self._loop.call_soon_threadsafe(self._wake, None)

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join(timeout=4 * self._poll_s)

    @contextmanager
    def waiting(self, run_id: str) -> Iterator[asyncio.Event]:
        """An event that is set when the run is finished or gone. Enter this, then read the run: nothing is missed."""
        event = asyncio.Event()
        if self._closed.is_set():
            event.set()
        with self._lock:
            self._waiting.setdefault(run_id, set()).add(event)
        try:
            yield event
        finally:
            with self._lock:
                others = self._waiting[run_id]
                others.discard(event)
                if not others:
                    del self._waiting[run_id]

    @property
    def waiters(self) -> int:
        with self._lock:
            return sum(len(events) for events in self._waiting.values())

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
        for hint in self._hints.listen(("run",), poll_s=self._poll_s):
            if self._closed.is_set():
                return
            with self._lock:
                waited_for = frozenset(self._waiting)
            now = time.monotonic()
            if hint is None or now - asked_at >= self._poll_s:
                asked_at = now
            else:
                waited_for &= {hint[1]}
            if waited_for and (finished := self._finished_among(waited_for)):
                assert self._loop is not None
                self._loop.call_soon_threadsafe(self._wake, finished)

    def _wake(self, run_ids: frozenset[str] | None) -> None:
        """`None`: everyone."""
        with self._lock:
            events = [
                event for run_id, of_run in self._waiting.items() if run_ids is None or run_id in run_ids
                for event in of_run
            ]  # fmt: skip
        for event in events:
            event.set()
