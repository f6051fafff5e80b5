"""Whether a key still opens what was opened with it: an event stream lasts longer than any other request.

The store is asked again for each key every `LOOK_AGAIN_S`, not for each stream: an application may watch hundreds with
its one key.
"""

import math
import time
from collections.abc import Awaitable, Callable

import structlog

from service.core.errors import Unavailable

LOOK_AGAIN_S = 5.0
_REMEMBERED = 1000

log = structlog.get_logger()


class KeyWatch:
    """Lives on one event loop. `ask`: whether the key of this hash is valid now. `clock` is monotonic, in seconds."""

    def __init__(
        self, ask: Callable[[str], Awaitable[bool]], *, look_again_s: float = LOOK_AGAIN_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._ask, self._clock = ask, clock
        self.look_again_s = look_again_s
        self._known: dict[str, tuple[float, bool]] = {}

    async def holds(self, key_hash: str) -> bool:
        """False soon after the key was revoked. A store that does not answer revokes nothing."""
        now = self._clock()
        asked_at, valid = self._known.get(key_hash, (-math.inf, True))
        if now - asked_at < self.look_again_s:
            return valid
        self._forget(now)
        self._known[key_hash] = now, valid  # who asks meanwhile is told what was known before
        try:
            valid = await self._ask(key_hash)
        except Unavailable as error:
            log.warning("key_not_looked_at", error=error.detail)
        self._known[key_hash] = now, valid
        return valid

    def _forget(self, now: float) -> None:
        if len(self._known) >= _REMEMBERED:
            self._known = {key: known for key, known in self._known.items() if now - known[0] < self.look_again_s}
