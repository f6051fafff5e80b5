"""The reaper's process, once it is composed: a pass on a timer, orders between passes, what is kept ready in threads
beside them; and an end that waits for nothing that resists."""

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TypeVar

import structlog

from service.core.custody import ReaperStore
from service.core.errors import BlastdoorError
from service.core.ports.publishing import Doorbell, Hints
from workers.metrics import ReaperMetrics
from workers.reaper import Reaper, Swept, watch_sites
from workers.reconcile import reconcile
from workers.registry import Keeping

_KEEP_S = 1.0
_LOOK_S = 0.1
_END_S = 12.0
"""Of a reaper that is told to end: whoever tells it kills it after 20 s (`blastdoor up`)."""

log = structlog.get_logger()
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Times:
    """`every`: between two passes; `orders`: between two looks for orders; the others as their functions have them."""

    every: timedelta
    orders: timedelta
    max_queue: timedelta
    ring_after: timedelta
    site_silent: timedelta


@dataclass(frozen=True, kw_only=True)
class Housekeeping:
    """Of one site. `kept`: the drivers that keep boundaries ready."""

    reaper: Reaper
    runs: ReaperStore
    doorbell: Doorbell
    hints: Hints
    metrics: ReaperMetrics
    kept: Sequence[Keeping]
    site: str
    times: Times

    def run(self, stop: threading.Event) -> int:
        """Until `stop`, then one pass more -> the status to exit with. What waits for something that resists by then is
        given up, and ends with the process, at once: whoever comes next finds what is left by its labels."""
        keepers = [threading.Thread(target=self._keep, args=(one, stop), name="keep") for one in self.kept]
        reaping = threading.Thread(target=self._reap, args=(stop, keepers), name="reap")
        for thread in (*keepers, reaping):
            thread.start()
        while not stop.is_set() and reaping.is_alive():  # not by waiting for `stop`: its lock is what a handler takes
            time.sleep(_LOOK_S)
        crashed = not stop.is_set()
        stop.set()
        deadline = time.monotonic() + _END_S
        for thread in (reaping, *keepers):
            thread.join(max(deadline - time.monotonic(), 0.0))
        if any(thread.is_alive() for thread in (reaping, *keepers)):
            log.warning("something resists as the reaper ends; the next one goes on")
            sys.stdout.flush()
            os._exit(int(crashed))  # its threads hold nothing that must be given back, and would be waited for
        return int(crashed)

    def _reap(self, stop: threading.Event, keepers: Sequence[threading.Thread]) -> None:
        every_s, orders_s = self.times.every.total_seconds(), self.times.orders.total_seconds()
        while not stop.is_set():
            self._pass()
            due = time.monotonic() + every_s
            while (left_s := due - time.monotonic()) > 0 and not stop.wait(min(orders_s, left_s)):
                _passed(self.reaper.attend)
        for keeper in keepers:
            keeper.join()
        self._pass()

    def _keep(self, boundary: Keeping, stop: threading.Event) -> None:
        """Boundaries that are made before anybody asks, until we stop: then those that nobody has are ended. In a
        thread of its own, since to make one takes half a minute; each pass asks what there is anew."""
        while not stop.is_set():
            _passed(partial(boundary.keep, cancelled=stop))
            self.metrics.standing(boundary.standing())
            stop.wait(_KEEP_S)
        _passed(boundary.keep_none)
        self.metrics.standing(boundary.standing())

    def _pass(self) -> None:
        """What cannot be reached now is reached by the next pass; nothing here keeps state between passes."""
        with self.metrics.passes.time():
            swept = _passed(self._reconcile_and_sweep)
        if swept is None:
            self.metrics.failed.inc()
            return
        for ref in swept.destroyed:
            self.metrics.swept.labels(ref.boundary).inc()
        for ref in swept.resisted:
            self.metrics.resisted.labels(ref.boundary).inc()
        self.metrics.orphans.set(len(swept.resisted))
        if swept.destroyed or swept.resisted:
            log.info("swept", destroyed=len(swept.destroyed), resisted=len(swept.resisted), recorded=swept.recorded)

    def _reconcile_and_sweep(self) -> Swept:
        times = self.times
        reconcile(self.runs, self.doorbell, self.hints, max_queue=times.max_queue, ring_after=times.ring_after)
        watch_sites(self.runs, self.hints, own=self.site, silent_after=times.site_silent)
        return self.reaper.sweep()


def _passed(work: Callable[[], T]) -> T | None:
    """-> None when it was interrupted."""
    try:
        return work()
    except BlastdoorError as error:
        log.warning("housekeeping was interrupted; the next pass goes on", error=str(error))
    except Exception:  # a defect; the reaper outlives it, since nothing else ends what a dead worker left
        log.exception("housekeeping failed; the next pass goes on")
    return None
