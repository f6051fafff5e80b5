"""Reads the stream in a consumer group: what was read and not acknowledged is read again, by this process or the next.

Several processes may read as one group, each under a name of its own: each event goes to one of them. One that dies
between reading and acknowledging leaves its events pending; after `CLAIM_AFTER_MS` another claims them. So an event is
handled at least once, and `Inbox.receive` makes that once by effect. One that fails again and again is put aside, so
that somebody can look at it, and holds up no other.
"""

import json
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import redis

STREAM = "blastdoor:events"
GROUP = "discount-desk"
CLAIM_AFTER_MS = 5_000
BLOCK_MS = 1_000
BATCH = 100
MOST_DELIVERIES = 5

Handle = Callable[[Mapping[str, Any]], object]


class Consumer:
    """One reader of the group. `handle` returns when the event is safe on disk; what it raises leaves it pending.
    `put_aside` is given what failed `MOST_DELIVERIES` times, and returns when that is on disk."""

    def __init__(
        self, client: "redis.Redis", *, name: str, handle: Handle, put_aside: Handle | None = None,
        claim_after_ms: int = CLAIM_AFTER_MS,
    ) -> None:  # fmt: skip
        self._redis, self._name, self._handle = client, name, handle
        self._put_aside, self._claim_after_ms = put_aside, claim_after_ms

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
        with suppress(redis.RedisError):  # away, or the group is gone: then so is the name
            self.leave()

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
        handled = sum(self._take(claimed) for claimed in self._claim())
        for _, entries in self._redis.xreadgroup(GROUP, self._name, {STREAM: ">"}, count=BATCH, block=block_ms):
            handled += self._take(entries)
        return handled

    def leave(self) -> bool:
        """When this reader ends for good: its name goes, unless something is still pending under it, which would be
        lost with it. -> whether it went."""
        mine = [one for one in self._redis.xinfo_consumers(STREAM, GROUP) if one["name"] == self._name]
        if any(one["pending"] for one in mine):
            return False
        self._redis.xgroup_delconsumer(STREAM, GROUP, self._name)
        return True

    def _claim(self) -> Iterator[list[Any]]:
        """Through the whole list: each call looks at a part of it, and says where to go on. Ids that it returns as
        deleted were trimmed away unread: Blastdoor publishes those events again."""
        if self._put_aside is not None:
            self._give_up(self._put_aside)
        cursor = "0-0"
        while True:
            cursor, claimed, _deleted = self._redis.xautoclaim(
                STREAM, GROUP, self._name, self._claim_after_ms, cursor, count=BATCH
            )
            yield claimed
            if cursor == "0-0":
                return

    def _give_up(self, put_aside: Handle) -> None:
        pending = self._redis.xpending_range(STREAM, GROUP, "-", "+", BATCH, idle=self._claim_after_ms)
        for one in pending:
            if one["times_delivered"] > MOST_DELIVERIES:
                for entry_id, fields in self._redis.xrange(STREAM, one["message_id"], one["message_id"]):
                    put_aside(json.loads(fields["event"]))
                    self._redis.xack(STREAM, GROUP, entry_id)

    def _take(self, entries: list[Any]) -> int:
        """Each is acknowledged after it is on disk. One that fails stays pending, and the next ones have their turn."""
        handled = 0
        for entry_id, fields in entries:
            try:
                self._handle(json.loads(fields["event"]))
            except Exception as error:  # noqa: BLE001 - whatever it is, the event must not be lost and not hold up others
                print(f"{entry_id} is left for later: {error!r}", file=sys.stderr)
                continue
            self._redis.xack(STREAM, GROUP, entry_id)
            handled += 1
        return handled
