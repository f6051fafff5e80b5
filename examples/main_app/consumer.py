"""Reads the stream in a consumer group: what was read and not acknowledged is read again, by this process or the next.

Several processes may read as one group, each under a name of its own: each event goes to one of them. One that dies
between reading and acknowledging leaves its events pending; after `CLAIM_AFTER_MS` another claims them. So an event is
handled at least once, and `Inbox.receive` makes that once by effect.
"""

import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

import redis

STREAM = "blastdoor:events"
GROUP = "discount-desk"
CLAIM_AFTER_MS = 5_000
BLOCK_MS = 1_000
BATCH = 100

Handle = Callable[[Mapping[str, Any]], object]


class Consumer:
    """One reader of the group. `handle` returns when the event is safe on disk; what it raises leaves it pending."""

    def __init__(
        self, client: "redis.Redis", *, name: str, handle: Handle, claim_after_ms: int = CLAIM_AFTER_MS
    ) -> None:
        self._redis, self._name, self._handle = client, name, handle
        self._claim_after_ms = claim_after_ms

    def run(self, stopping: threading.Event, *, say: Callable[[str], None]) -> None:
        """Until `stopping`. Redis may be away, or come back empty: then the group is made anew, from the stream's
        beginning, and events that were seen before are told apart by their id."""
        while not stopping.is_set():
            try:
                if self.step(block_ms=BLOCK_MS) == 0:
                    stopping.wait(0.01)
            except redis.ResponseError as error:
                if not str(error).startswith(("NOGROUP", "UNBLOCKED")):
                    raise
                if not self.join():
                    stopping.wait(0.2)
            except redis.RedisError as error:
                say(f"the stream is away: {error}")
                stopping.wait(1)

    def join(self) -> bool:
        """Make the group, from the stream's first entry on. -> False while there is no stream: Blastdoor makes it
        within a second, and nobody else should."""
        try:
            self._redis.xgroup_create(STREAM, GROUP, id="0", mkstream=False)
        except redis.ResponseError as error:
            if "requires the key to exist" in str(error):
                return False
            if not str(error).startswith("BUSYGROUP"):
                raise
        return True

    def step(self, *, block_ms: int | None = None) -> int:
        """First what others left pending for too long, then what is new. -> how many events were handled."""
        _, claimed, _ = self._redis.xautoclaim(STREAM, GROUP, self._name, self._claim_after_ms, "0-0", count=BATCH)
        read = self._redis.xreadgroup(GROUP, self._name, {STREAM: ">"}, count=BATCH, block=block_ms)
        fresh = [entry for _, entries in read for entry in entries]
        for entry_id, fields in [*claimed, *fresh]:
            self._handle(json.loads(fields["event"]))
            self._redis.xack(STREAM, GROUP, entry_id)
        return len(claimed) + len(fresh)
