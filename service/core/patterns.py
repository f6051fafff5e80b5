"""Patterns in RE2 syntax: time linear in the input, so that an author's pattern cannot stall a worker."""

from functools import lru_cache
from typing import Any

import re2

_OPTIONS = re2.Options()
_OPTIONS.log_errors = False
_OPTIONS.max_mem = 8 * 2**20


@lru_cache(maxsize=256)
def compile_pattern(text: str) -> Any:
    """Raises ValueError that says what RE2 made of it."""
    try:
        return re2.compile(text, options=_OPTIONS)
    except re2.error as error:
        reason = error.args[0] if error.args else error
        reason = reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)
        raise ValueError(f"should be a pattern in RE2 syntax: {reason}") from error


def checked_pattern(text: str) -> str:
    compile_pattern(text)
    return text


def found_in(pattern: str, text: str) -> bool:
    """True when the pattern matches anywhere in the text."""
    return compile_pattern(pattern).search(text) is not None
