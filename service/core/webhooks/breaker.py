"""Leaves an endpoint alone that fails again and again, so that it costs nobody else's time and is not hammered."""

from datetime import timedelta

FAILURES = 5
PAUSE = timedelta(seconds=60)
LONGEST = 16
"""Pauses grow to so many times the first one."""


class Breaker:
    """Of one endpoint. Closed: as many attempts at once as the caller likes. After `FAILURES` in a row it is open for a
    pause; then one attempt at a time shows whether it is mended, and each that fails doubles the pause.

    `now` is monotonic, in seconds.
    """

    def __init__(self, *, pause: timedelta = PAUSE) -> None:
        self._pause_s = pause.total_seconds()
        self._failures = 0
        self._until = 0.0

    @property
    def is_closed(self) -> bool:
        return self._failures < FAILURES

    @property
    def is_fresh(self) -> bool:
        """Nothing to remember of it."""
        return self._failures == 0 and self._until == 0.0

    def allows(self, *, in_flight: int, most: int, now: float) -> int:
        """How many more attempts may begin now, when so many are under way and `most` is the endpoint's bound."""
        if now < self._until:
            return 0
        return max(0, (most if self.is_closed else 1) - in_flight)

    def succeeded(self) -> None:
        self._failures, self._until = 0, 0.0

    def failed(self, now: float) -> None:
        self._failures += 1
        if not self.is_closed:
            factor = min(2 ** (self._failures - FAILURES), LONGEST)
            self._until = max(self._until, now + self._pause_s * factor)

    def hold(self, now: float, duration: timedelta) -> None:
        """It has asked to be left alone (Retry-After); granted up to the longest pause."""
        self._until = max(self._until, now + min(duration.total_seconds(), self._pause_s * LONGEST))
