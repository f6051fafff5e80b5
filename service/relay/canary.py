"""The relay that leads keeps canary runs going, in a thread of its own, so that a slow one holds up no event."""

import threading
import time
from collections.abc import Callable
from datetime import timedelta

import structlog

from service.core.errors import BlastdoorError

LOOK = timedelta(seconds=0.5)
AGAIN_AFTER = timedelta(seconds=2)
"""A submission that was refused, or a store that is away."""

log = structlog.get_logger()


class CanaryKeeper:
    """`send` submits the next canary when it is due, and says which. What it raises is logged, once for each kind of
    trouble, and tried again. `clock` is monotonic, in seconds."""

    def __init__(
        self, enrol: Callable[[], None], send: Callable[[], str | None], *, leading: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._enrol, self._send, self._leading, self._clock = enrol, send, leading, clock
        self._enrolled = False
        self._not_before = clock()
        self._trouble: str | None = None

    def step(self) -> None:
        if self._clock() < self._not_before or not self._leading():
            return
        try:
            if not self._enrolled:
                self._enrol()
                self._enrolled = True
            self._send()
        except (BlastdoorError, OSError) as error:
            self._not_before = self._clock() + AGAIN_AFTER.total_seconds()
            self._say(str(error))
        else:
            self._say(None)

    def _say(self, trouble: str | None) -> None:
        if trouble is not None and trouble != self._trouble:
            log.warning("canary_not_submitted", error=trouble)
        self._trouble = trouble


def keep_canaries(keeper: CanaryKeeper, *, stopping: Callable[[], bool]) -> None:
    """Until `stopping()`, in a thread that nobody waits for."""

    def loop() -> None:
        while not stopping():
            keeper.step()
            time.sleep(LOOK.total_seconds())

    threading.Thread(target=loop, name="canaries", daemon=True).start()
