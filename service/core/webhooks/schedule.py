"""What an answer means, and when the next attempt is made."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from enum import StrEnum

from pydantic import BaseModel, ConfigDict

SCHEDULE = tuple(
    timedelta(seconds=seconds) for seconds in (0, 5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400)
)  # fmt: skip
"""The wait before each attempt, counted from the one before; after the last comes the dead letter."""
JITTER = 0.1
"""A wait is up to so much longer or shorter, so that what failed together does not come back together."""
LONGEST_RETRY_AFTER = timedelta(hours=24)
_SECONDS = re.compile(r"[0-9]{1,9}", re.ASCII)


class State(StrEnum):
    PENDING = "pending"
    DELIVERED = "delivered"
    DEAD = "dead"


class Fault(StrEnum):
    """Why an attempt failed, as the delivery log has it."""

    BLOCKED_ADDRESS = "blocked_address"
    BLOCKED_URL = "blocked_url"
    UNRESOLVED = "unresolved"
    CONNECT = "connect"
    TLS = "tls"
    TIMEOUT = "timeout"
    PROTOCOL = "protocol"
    REDIRECT = "redirect"
    STATUS = "status"
    GONE = "gone"
    SECRET = "secret_unreadable"  # noqa: S105 - a word, not a secret
    EVENT_GONE = "event_gone"
    DISABLED = "endpoint_disabled"


class Answer(BaseModel):
    """What came of one attempt: a status, or why there is none. `retry_after` is the header as it stood."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    status: int | None = None
    error: Fault | None = None
    retry_after: str | None = None
    duration: timedelta = timedelta(0)


class Decision(BaseModel):
    """`wait` until the next attempt of a pending one. `disable`: the endpoint wants nothing any more. `hold`: the
    endpoint has asked for this much quiet, for all of its deliveries."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    state: State
    error: Fault | None = None
    wait: timedelta | None = None
    disable: bool = False
    hold: timedelta | None = None


def fault_of(status: int) -> Fault | None:
    """2xx alone is success; a redirect is not followed and is none."""
    if 200 <= status < 300:
        return None
    if status == 410:
        return Fault.GONE
    return Fault.REDIRECT if 300 <= status < 400 else Fault.STATUS


def decide(
    answer: Answer, *, tries: int, now: datetime, chance: float, schedule: Sequence[timedelta] = SCHEDULE
) -> Decision:
    """`tries` have been made, this one included; `now` is aware UTC; `chance` is uniform in [0, 1)."""
    error = answer.error or (None if answer.status is None else fault_of(answer.status))
    if error is None:
        return Decision(state=State.DELIVERED)
    if error is Fault.GONE:
        return Decision(state=State.DEAD, error=error, disable=True)
    asked = read_retry_after(answer.retry_after, now=now)
    hold = asked if answer.status in (429, 503) else None
    if error is Fault.EVENT_GONE or tries >= len(schedule):
        return Decision(state=State.DEAD, error=error, hold=hold)
    wait = schedule[tries] * (1 + JITTER * (2 * chance - 1))
    # Asked for a time, the receiver is not disturbed before it; a little later, so that not all come at once.
    return Decision(
        state=State.PENDING, error=error, hold=hold,
        wait=wait if asked is None else max(wait, asked * (1 + 0.1 * chance)),
    )  # fmt: skip


def read_retry_after(header: str | None, *, now: datetime) -> timedelta | None:
    """Seconds or an HTTP date, at most a day ahead. None when there is no sense in it, or no time left."""
    if header is None:
        return None
    text = header.strip()
    if _SECONDS.fullmatch(text):
        asked = timedelta(seconds=int(text))
    else:
        try:
            at = parsedate_to_datetime(text)
            asked = (at if at.tzinfo is not None else at.replace(tzinfo=UTC)) - now
        except (ValueError, TypeError, OverflowError):
            return None
    return min(asked, LONGEST_RETRY_AFTER) if asked > timedelta(0) else None
