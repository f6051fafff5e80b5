"""From the outbox to the bus: each committed event once on the stream, in the order of its number, whatever dies.

SQL is the truth and the stream is disposable. Three facts carry the rest:
- numbers are given after commit and without gaps, and a row's number changes only when it is published once more;
- a number is the stream's entry id, so Redis refuses a second copy and whatever comes too late;
- what is numbered above the stream's last entry is not on the stream, whatever we believed: it is published again.
So nothing is ever tried again blindly: after any failure the stream is asked where it ends. The leader's lease only
saves work: two relays that both believe they lead do no harm.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Literal

import structlog

from service.core.errors import BlastdoorError, Conflict, Unavailable
from service.core.failpoints import Failpoint, reach
from service.core.ports.publishing import Bus, Hints, Outbox, OutboxRow
from service.relay.metrics import RelayMetrics
from service.relay.trimming import Trimming

BATCH_ROWS = 200
SURVEY = timedelta(seconds=1)
"""How long a lost stream stays unnoticed when there is nothing to publish."""
STANDBY = timedelta(seconds=1)
LONGEST_PAUSE = timedelta(seconds=2)
POLL = timedelta(milliseconds=250)
GATHER_S = 0.01
"""After a hint: transitions come in bursts, and who waits for a result should not wait for the relay's work."""
_LOG = structlog.get_logger()

Party = Literal["store", "bus"]
Level = Literal["info", "warning", "error"]


class Relay:
    """Does one piece of work at each `step`. `clock` is monotonic, in seconds."""

    def __init__(
        self, outbox: Outbox, bus: Bus, *, owner: str, lease: timedelta, clock: Callable[[], float] = time.monotonic,
        metrics: RelayMetrics | None = None,
    ) -> None:  # fmt: skip
        self._outbox = outbox
        self._bus = bus
        self._owner = owner
        self._lease = lease
        self._clock = clock
        self._leading = False
        self._metrics = metrics or RelayMetrics()
        self._metrics.watch(leading=lambda: self._leading)
        self._trimming = Trimming(outbox, bus, owner=owner, metrics=self._metrics, ask=self._ask)
        self._renew_at = 0.0
        self._survey_at = 0.0
        self._not_before = 0.0
        self._failures = 0
        self._state = "starting"
        self._asking: Party = "store"
        self._top = 0
        """The highest number that we know to be on the stream."""
        self._doubt = True
        """What is on the stream is not known: ask before the next publication."""
        self._behind = True
        """Stamped rows may wait from before: they go first."""

    def step(self) -> bool:
        """-> whether to call again at once. Raises nothing that waiting could cure: it says so in the log, once."""
        if self._clock() < self._not_before:
            return False
        try:
            if not self._lead():
                self._say("standby")
                self._pause(min(STANDBY, self._lease / 3))
                return False
            if self._doubt or self._clock() >= self._survey_at:
                self._survey()
            worked = self._carry()
        except BlastdoorError as error:
            self._failed(error)
            return False
        self._failures = 0
        self._say("leading")
        return worked

    @property
    def leading(self) -> bool:
        return self._leading

    def stop(self) -> None:
        """Let another lead at once."""
        if self._leading:
            with suppress(BlastdoorError):
                self._outbox.lead(self._owner, lease=timedelta(0))
        self._say("stopped")

    def _lead(self) -> bool:
        now = self._clock()
        if not self._leading or now >= self._renew_at:
            with self._ask("store"):
                leading = self._outbox.lead(self._owner, lease=self._lease)
            self._doubt = self._doubt or not (leading and self._leading)
            self._leading = leading
            self._renew_at = now + self._lease.total_seconds() / 3
        return self._leading

    def _survey(self) -> None:
        """Compare where the stream ends with what it should hold, and have the difference published again."""
        with self._ask("bus"):
            identity = self._bus.identity()
            top = self._bus.last_published()
            if top is None:
                self._bus.create_stream()
        with self._ask("store"):
            changed = identity != self._outbox.bus_identity()
            if self._doubt or changed or top is None or top < self._top:
                # What the stream would trim away at once is not worth adding.
                oldest = self._outbox.last_stamp() - 2 * self._bus.max_length()
                rows = self._outbox.mark_unpublished_after(max(top or 0, oldest))
                if rows:
                    self._metrics.republishing(rows)
                    _LOG.warning("republishing", rows=rows, above=top or 0, stream_was_there=top is not None)
                self._behind = True
            if changed:
                self._outbox.record_bus_identity(identity)
        self._top = top or 0
        self._doubt = False
        self._behind = self._trimming.step() or self._behind
        self._survey_at = self._clock() + SURVEY.total_seconds()

    def _carry(self) -> bool:
        with self._ask("store"):
            rows = self._outbox.stamp(self._owner, limit=BATCH_ROWS)
            if self._behind:
                rows = self._outbox.unpublished(limit=BATCH_ROWS)
        if not rows:
            self._behind = False
            return False
        reach(Failpoint.RELAY_STAMPED)
        self._publish(rows)
        return True

    def _publish(self, rows: Sequence[OutboxRow]) -> None:
        behind, self._behind = self._behind, True  # until these are known to be there
        public = [row for row in rows if not row.tenant.startswith("_")]
        if public:
            with self._ask("bus"):
                self._bus.publish(public)
            self._metrics.published(public)
            self._top = max(self._top, public[-1].pub_seq)
        reach(Failpoint.RELAY_ADDED)
        with self._ask("store"):
            self._outbox.mark_published([row.pub_seq for row in rows])
        self._behind = behind

    @contextmanager
    def _ask(self, party: Party) -> Iterator[None]:
        self._asking = party
        yield

    def _failed(self, error: BlastdoorError) -> None:
        self._doubt = self._behind = True
        self._failures += 1
        self._metrics.failed(self._asking)
        self._pause(min(LONGEST_PAUSE, POLL * 2 ** min(self._failures - 1, 8)))
        if isinstance(error, Unavailable):
            self._say(f"{self._asking}_away", level="warning", error=error.detail)
        elif isinstance(error, Conflict):
            self._say("bus_conflict", level="error", error=error.detail)
        else:
            self._say(f"{self._asking}_failed", level="error", error=error.detail)

    def _pause(self, duration: timedelta) -> None:
        self._not_before = self._clock() + duration.total_seconds()

    def _say(
        self, state: str, *, level: Literal["info", "warning", "error"] = "info", error: str | None = None
    ) -> None:
        """Log the first of what may be many."""
        if state != self._state:
            getattr(_LOG, level)("relay_" + state, owner=self._owner, error=error)
            self._state = state


def run(relay: Relay, hints: Hints, *, stopping: Callable[[], bool], poll: timedelta = POLL) -> None:
    """Relay until `stopping()`, which is asked at least every `poll`. A hint wakes it at once; many hints, once."""
    hinted = threading.Event()

    def listen() -> None:
        for hint in hints.listen(["outbox"], poll_s=poll.total_seconds()):
            if hint is not None or stopping():
                hinted.set()
            if stopping():
                return

    threading.Thread(target=listen, name="hints", daemon=True).start()
    while not stopping():
        hinted.clear()
        if not relay.step() and hinted.wait(poll.total_seconds()):
            time.sleep(GATHER_S)
    relay.stop()
