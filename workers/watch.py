"""The lease's keeper: one thread per run that renews the lease, sees a cancellation, and knows when to give up."""

import contextvars
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType

import structlog

from service.core.errors import BlastdoorError, LeaseLost
from service.core.ports.runs import Heartbeat, RunLine

log = structlog.get_logger()


def monotonic() -> float:
    """Seconds by the clock that leases are kept by."""
    return time.monotonic()


@dataclass(frozen=True, kw_only=True)
class WatchTimes:
    """`cancel_poll` is how often the database is asked; every `heartbeat` the lease is renewed with it."""

    lease: timedelta
    heartbeat: timedelta
    self_fence: timedelta
    cancel_poll: timedelta


class Watch:
    """A `Cancellation`: set when the run was cancelled or the lease is lost (another fence, or not renewed for
    `self_fence` of monotonic time: then somebody else may be about to act).

    Whoever asks measures that time too, so a database that hangs fences as well as one that says no."""

    def __init__(
        self, runs: RunLine, *, run_id: str, fence: int, times: WatchTimes, since: float | None = None
    ) -> None:
        """`since`: monotonic seconds from before the run was claimed. A process that was stopped between its claim and
        this line has slept through its lease, and must find that out before it makes anything."""
        self._runs, self._run_id, self._fence, self._times = runs, run_id, fence, times
        self._stop, self._set = threading.Event(), threading.Event()
        context = contextvars.copy_context()  # so that its log says whose run it keeps
        self._thread = threading.Thread(target=context.run, args=(self._keep,), name=f"watch-{run_id}", daemon=True)
        self._renewed = time.monotonic() if since is None else since
        self.cancelled_by: str | None = None
        self.lost: str | None = None

    def is_set(self) -> bool:
        self._lose_when_late()
        return self._set.is_set()

    def raise_if_lost(self) -> None:
        self._lose_when_late()
        if self.lost is not None:
            raise LeaseLost(self.lost)

    def pause(self) -> None:
        """As long as between two questions to the database."""
        self._stop.wait(self._times.cancel_poll.total_seconds())

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=self._times.self_fence.total_seconds())

    def _keep(self) -> None:
        try:
            self._ask_until_stopped()
        except LeaseLost as error:
            self._lose(str(error))
        except Exception:  # nobody renews the lease from here on: it is as good as lost
            log.exception("the lease's keeper failed", run_id=self._run_id)
            self._lose("the lease's keeper failed")

    def _ask_until_stopped(self) -> None:
        while self.lost is None and not self._stop.wait(self._times.cancel_poll.total_seconds()):
            asked = time.monotonic()
            renew = asked - self._renewed >= self._times.heartbeat.total_seconds()
            try:
                beat = self._ask(renew=renew)
            except LeaseLost:
                raise
            except BlastdoorError as error:
                log.warning("no heartbeat", run_id=self._run_id, late_s=round(self._late_s(), 1), error=str(error))
                self._lose_when_late()
                continue
            if renew:
                self._renewed = asked
            if beat.cancel_requested_by is not None and self.cancelled_by is None:
                self.cancelled_by = beat.cancel_requested_by
                self._set.set()

    def _ask(self, *, renew: bool) -> Heartbeat:
        if renew:
            return self._runs.heartbeat(self._run_id, self._fence, lease=self._times.lease)
        return self._runs.look(self._run_id, self._fence)

    def _late_s(self) -> float:
        return time.monotonic() - self._renewed

    def _lose_when_late(self) -> None:
        late_s = self._late_s()
        if self.lost is None and late_s > self._times.self_fence.total_seconds():
            self._lose(f"no successful heartbeat for {late_s:.1f} s")

    def _lose(self, why: str) -> None:
        if not self._stop.is_set():
            self.lost = why
            self._set.set()
