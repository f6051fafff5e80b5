"""Once an hour the relay that leads gives up what is old (`service.usecases.retention`), beside its own work.

In a thread of its own: thousands of deletions must not hold up an event. It dies with the process, wherever it is, and
nothing is half done then: each run is one transaction, and what is left is found again in the next hour.
"""

import threading
import time
from collections.abc import Callable
from datetime import timedelta

import structlog

from service.core.errors import BlastdoorError
from service.usecases.retention import Purged

EVERY = timedelta(hours=1)
FIRST_AFTER = timedelta(minutes=1)
"""After the start, so that a relay that is restarted every few minutes still does it, and one that fails at once does
not do it each time."""
OFTEN = timedelta(seconds=10)
"""Deleted tenants wait for no hour: what is left of them goes as soon as their last run has ended."""
LOOK = timedelta(seconds=1)

log = structlog.get_logger()


class Housekeeping:
    """`leading` is asked when it is due: a standby does nothing. `often` is done at each `OFTEN` besides; -> how many
    things were done. `clock` is monotonic, in seconds."""

    def __init__(
        self, purge: Callable[[], Purged], *, leading: Callable[[], bool], often: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._purge = purge
        self._often = often
        self._leading = leading
        self._clock = clock
        self._due = clock() + FIRST_AFTER.total_seconds()
        self._often_due = clock() + OFTEN.total_seconds()

    def step(self) -> None:
        """Purge when it is time. Raises nothing: what could not be done is said, and done in the next hour."""
        if self._clock() >= self._often_due and self._leading():
            self._often_due = self._clock() + OFTEN.total_seconds()
            try:
                self._often()
            except (BlastdoorError, OSError) as error:
                log.warning("housekeeping_interrupted", error=str(error))
        if self._clock() < self._due or not self._leading():
            return
        self._due = self._clock() + EVERY.total_seconds()
        try:
            purged = self._purge()
        except (BlastdoorError, OSError) as error:
            log.warning("purge_failed", error=str(error))
        else:
            log.info("purged", **vars(purged))


def keep_house(housekeeping: Housekeeping, *, stopping: Callable[[], bool]) -> None:
    """Until `stopping()`, in a thread that nobody waits for."""

    def loop() -> None:
        while not stopping():
            housekeeping.step()
            time.sleep(LOOK.total_seconds())

    threading.Thread(target=loop, name="housekeeping", daemon=True).start()
