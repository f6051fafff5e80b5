"""The lease's keeper: one thread per run that renews the lease, sees a cancellation, and knows when to give up."""

import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType

import structlog

from service.core.errors import BlastdoorError, LeaseLost
from service.core.ports import Heartbeat, RunLine

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class WatchTimes:
    """`cancel_poll` is how often the database is asked; every `heartbeat` the lease is renewed with it."""

    lease: timedelta
    heartbeat: timedelta
    self_fence: timedelta
    cancel_poll: timedelta


class Watch:
    """A `Cancellation`: set when the run was cancelled or the lease is lost (another fence, or no word from the
    database for `self_fence` of monotonic time: then somebody else may be about to act)."""

    def __init__(self, runs: RunLine, *, run_id: str, fence: int, times: WatchTimes) -> None:
        self._runs, self._run_id, self._fence, self._times = runs, run_id, fence, times
        self._stop, self._set = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"watch-{run_id}", daemon=True)
        self.cancelled_by: str | None = None
        self.lost: str | None = None

    def is_set(self) -> bool:
        return self._set.is_set()

    def raise_if_lost(self) -> None:
        if self.lost is not None:
            raise LeaseLost(self.lost)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=self._times.self_fence.total_seconds())

    def _keep(self) -> None:
        heard = renewed = time.monotonic()
        while not self._stop.wait(self._times.cancel_poll.total_seconds()):
            renew = time.monotonic() - renewed >= self._times.heartbeat.total_seconds()
            try:
                beat = self._ask(renew=renew)
            except LeaseLost as error:
                self._lose(str(error))
                return
            except BlastdoorError as error:
                silent = time.monotonic() - heard
                log.warning("no heartbeat", run_id=self._run_id, silent_s=round(silent, 1), error=str(error))
                if silent > self._times.self_fence.total_seconds():
                    self._lose(f"no successful heartbeat for {silent:.0f} s")
                    return
                continue
            heard = time.monotonic()
            if renew:
                renewed = heard
            if beat.cancel_requested_by is not None and self.cancelled_by is None:
                self.cancelled_by = beat.cancel_requested_by
                self._set.set()

    def _ask(self, *, renew: bool) -> Heartbeat:
        if renew:
            return self._runs.heartbeat(self._run_id, self._fence, lease=self._times.lease)
        return self._runs.look(self._run_id, self._fence)

    def _lose(self, why: str) -> None:
        if not self._stop.is_set():
            self.lost = why
            self._set.set()
