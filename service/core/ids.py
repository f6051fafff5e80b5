"""Identifiers: time-ordered, unguessable, and safe in names.

A run id is `run_` and the 32 hex digits of a UUIDv7 (RFC 9562 section 5.7), so ids sort by creation time and the
hex part can stand in DNS names, cgroup names and directory names as it is.
"""

import secrets
import time
import uuid

RUN_ID_PATTERN = r"^run_[0-9a-f]{32}$"


def uuid7(now_ms: int | None = None) -> uuid.UUID:
    """A UUIDv7. `now_ms`: milliseconds since the epoch, the wall clock when absent (ordering only, never ownership)."""
    stamp = (time.time_ns() // 1_000_000 if now_ms is None else now_ms) & ((1 << 48) - 1)
    value = stamp << 80 | 0x7 << 76 | secrets.randbits(12) << 64 | 0b10 << 62 | secrets.randbits(62)
    return uuid.UUID(int=value)


def new_run_id() -> str:
    return f"run_{uuid7().hex}"


def new_id(prefix: str) -> str:
    """`prefix` is three or four letters: `key`, `evt`, `svc`, `wrk`."""
    return f"{prefix}_{uuid7().hex}"
