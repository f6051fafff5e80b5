"""An operator's act, written down before it is done, and again with what came of it."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import structlog

from service.core.custody import AuditLog
from service.core.errors import BlastdoorError, Refused

T = TypeVar("T")

log = structlog.get_logger()


def audited(
    audit: AuditLog, act: Callable[[], T], *, who: str, what: str, target: str = "",
    detail: Mapping[str, Any] | None = None, result: Callable[[T], str] = lambda _: "done",
) -> T:  # fmt: skip
    """Do it, when it could be written down first; else nothing happens (Unavailable). An act whose end is not seen
    keeps an entry without result. Raises what the act raises."""
    entry_id = audit.begin_act(who=who, what=what, target=target, detail=detail or {})
    try:
        done = act()
    except Refused as error:
        _end(audit, entry_id, f"refused: {error.code}")
        raise
    except BaseException as error:
        _end(audit, entry_id, f"failed: {error.code if isinstance(error, BlastdoorError) else type(error).__name__}")
        raise
    _end(audit, entry_id, result(done))
    return done


def _end(audit: AuditLog, entry_id: str, result: str) -> None:
    """What was done was done: that its end could not be written down is said, and fails nothing."""
    try:
        audit.end_act(entry_id, result)
    except BlastdoorError as error:
        log.warning("audit_result_lost", entry=entry_id, result=result, error=str(error))
