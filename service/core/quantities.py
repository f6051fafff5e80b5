"""Durations and sizes as people write them: `20s`, `500ms`, `256MiB`. One parser, one printer, for every document."""

import re
from datetime import timedelta
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

_DURATION = re.compile(r"^(\d+(?:\.\d+)?)(ms|s|m|h)$", re.ASCII)
_SIZE = re.compile(r"^(\d+)(B|KiB|MiB|GiB|KB|MB|GB)?$", re.ASCII)
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_BYTES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_MAX_BYTES = 2**50
_MAX_SECONDS = 7 * 24 * 3600.0


def parse_duration(value: Any) -> timedelta:
    """`20s`, `500ms`, `2m`, `1h` to a timedelta. Raises ValueError that says what would be right."""
    if isinstance(value, timedelta):
        return value
    match = _DURATION.fullmatch(value) if isinstance(value, str) and len(value) <= 20 else None
    if not match:
        raise ValueError("should be a duration such as 500ms, 20s or 2m")
    seconds = float(match[1]) * _SECONDS[match[2]]
    if not 0 < seconds <= _MAX_SECONDS:
        raise ValueError("should be a duration above zero and at most seven days")
    return timedelta(seconds=seconds)


def format_duration(value: timedelta) -> str:
    """The shortest exact spelling that `parse_duration` reads back: 60s, 1.5s, 250ms."""
    milliseconds = value / timedelta(milliseconds=1)
    if milliseconds < 1000:
        return f"{milliseconds:g}ms"
    return f"{value.total_seconds():.12g}s"


def parse_size(value: Any) -> int:
    """`256MiB` or a whole number of bytes to bytes. Raises ValueError that says what would be right."""
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        match = _SIZE.fullmatch(value) if isinstance(value, str) and len(value) <= 24 else None
        if not match:
            raise ValueError("should be a size such as 64KiB, 256MiB or 1GiB, or a whole number of bytes")
        size = int(match[1]) * _BYTES[match[2] or "B"]
    if not 0 <= size <= _MAX_BYTES:
        raise ValueError("should be a size between 0 and 1 PiB")
    return size


def format_size(size: int) -> str:
    """256MiB, 1GiB, 1500B: the largest binary unit that is exact."""
    for unit in ("GiB", "MiB", "KiB"):
        if size and size % _BYTES[unit] == 0:
            return f"{size // _BYTES[unit]}{unit}"
    return f"{size}B"


Duration = Annotated[
    timedelta,
    BeforeValidator(parse_duration),
    PlainSerializer(format_duration, return_type=str),
    WithJsonSchema({"type": "string", "pattern": _DURATION.pattern, "examples": ["20s", "500ms", "2m"]}),
]
Size = Annotated[int, BeforeValidator(parse_size)]
