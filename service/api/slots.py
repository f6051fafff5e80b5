"""How many uploads are received at once, and how many of them may be one tenant's."""

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from service.core.errors import Unavailable

WAIT_S = 2.0
"""A burst of small uploads queues for so long before it is sent away."""


class UploadSlots:
    """One tenant holds at most half of the slots: its slow uploads do not shut the others out."""

    def __init__(self, total: int, *, wait_s: float = WAIT_S) -> None:
        self._total = total
        self._share = max(1, total // 2)
        self._wait_s = wait_s
        self._held: Counter[str] = Counter()
        self._freed = anyio.Condition()

    @property
    def held(self) -> int:
        return self._held.total()

    @asynccontextmanager
    async def take(self, tenant: str) -> AsyncIterator[None]:
        """Raises Unavailable when none is free for this tenant in time."""
        try:
            with anyio.fail_after(self._wait_s):
                async with self._freed:
                    while self._held.total() >= self._total or self._held[tenant] >= self._share:
                        await self._freed.wait()
                    self._held[tenant] += 1
        except TimeoutError:
            raise Unavailable("as many uploads as fit are being received", retry_after_s=2) from None
        try:
            yield
        finally:
            with anyio.CancelScope(shield=True):
                async with self._freed:
                    self._held[tenant] -= 1
                    self._held += Counter()  # drops those at zero
                    self._freed.notify_all()
