"""Identifiers: time-ordered, unguessable, and safe in names.

A run id is `run_` and the 32 hex digits of a UUIDv7 (RFC 9562 section 5.7), so ids sort by creation time and the
hex part can stand in DNS names, cgroup names and directory names as it is.
"""

import secrets
import threading
import time
import uuid

RUN_ID_PATTERN = r"^run_[0-9a-f]{32}$"


_RANDOM_BITS = 74
_STEP_BITS = 40
_lock = threading.Lock()
_last = (0, 0)


def uuid7(now_ms: int | None = None) -> uuid.UUID:
    """A UUIDv7, later than all that this process made before (RFC 9562 section 6.2, method 2): two of one millisecond
    keep their order. `now_ms`, milliseconds since the epoch, is taken as it is; the wall clock when absent (ordering
    only, never ownership)."""
    global _last
    with _lock:
        stamp = (time.time_ns() // 1_000_000 if now_ms is None else now_ms) & ((1 << 48) - 1)
        random = secrets.randbits(_RANDOM_BITS - 1)
        if now_ms is None and stamp <= _last[0]:
            stamp, random = _last[0], _last[1] + 1 + secrets.randbits(_STEP_BITS)
            if random >> _RANDOM_BITS:
                stamp, random = stamp + 1, secrets.randbits(_RANDOM_BITS - 1)
        if now_ms is None:
            _last = stamp, random
    value = stamp << 80 | 0x7 << 76 | (random >> 62) << 64 | 0b10 << 62 | random & ((1 << 62) - 1)
    return uuid.UUID(int=value)


def new_run_id() -> str:
    return f"run_{uuid7().hex}"


def new_id(prefix: str) -> str:
    """`prefix` is three or four letters: `key`, `evt`, `svc`, `wrk`."""
    return f"{prefix}_{uuid7().hex}"
