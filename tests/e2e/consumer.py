"""The application that asked, as far as the bus goes: a consumer group on `blastdoor:events`."""

import json
import time
from collections import defaultdict
from typing import Any

import redis

STREAM = "blastdoor:events"
Event = dict[str, Any]


class Consumer:
    """Reads as a group of its own from the stream's beginning, acknowledges, and drops what it has seen (by `id`)."""

    def __init__(self, redis_url: str, *, group: str) -> None:
        self._redis = redis.Redis.from_url(redis_url, decode_responses=True)
        self._group = group
        self._redis.xgroup_create(STREAM, group, id="0", mkstream=True)
        self._seen: set[str] = set()
        self._by_run: defaultdict[str, list[Event]] = defaultdict(list)

    def close(self) -> None:
        self._redis.xgroup_destroy(STREAM, self._group)
        self._redis.close()

    def events(self, run_id: str, *, until: str, within_s: float = 60.0) -> list[Event]:
        """What came of the run, in the order of arrival, up to and with an event of the type `until` (its end)."""
        deadline = time.monotonic() + within_s
        while not any(event["type"].endswith(until) for event in self._by_run[run_id]):
            assert time.monotonic() < deadline, f"no {until}; there came {[e['type'] for e in self._by_run[run_id]]}"
            self._read(block_ms=500)
        return list(self._by_run[run_id])

    def runs_heard_of(self) -> set[str]:
        self._read(block_ms=100)
        return set(self._by_run)

    def pending(self) -> int:
        return int(self._redis.xpending(STREAM, self._group)["pending"])

    def _read(self, *, block_ms: int) -> None:
        answer: Any = self._redis.xreadgroup(self._group, "one", {STREAM: ">"}, count=100, block=block_ms)
        for _, messages in answer or []:
            for message_id, fields in messages:
                assert set(fields) == {"event", "tenant", "type"}, fields
                event: Event = json.loads(fields["event"])
                assert (event["tenant"], event["type"]) == (fields["tenant"], fields["type"])
                if event["id"] not in self._seen:
                    self._seen.add(event["id"])
                    self._by_run[event["subject"]].append(event)
                self._redis.xack(STREAM, self._group, message_id)
