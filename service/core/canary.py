"""Is the whole pipeline alive? A tiny run of the platform's own goes through it every half minute: pure decisions.

"The process is up" is not enough: consumers that hang with an open connection are the classic failure of task queues.
"""

from datetime import datetime, timedelta

from pydantic import BaseModel, ConfigDict

from service.core.run import Phase

CANARY_TENANT = "_canary"
SCENARIO = b'{"name": "canary", "steps": [{"name": "the wall stands", "run": ["true"]}]}'
MISSED = 3
"""So many intervals without one that passed mean that something is wrong, whatever it is."""


class CanaryView(BaseModel):
    """What the store knows. All instants by the database's clock, aware UTC."""

    model_config = ConfigDict(frozen=True)

    now: datetime
    passed_at: datetime | None = None
    """When the newest that passed had ended."""
    ended_at: datetime | None = None
    failed: str | None = None
    """How the newest that has ended ended, when it did not pass."""
    waiting_since: datetime | None = None
    """When the one that is under way was submitted."""
    phase: Phase | None = None
    """Where it stands."""
    slots: int = 0
    """Runs that the live workers can play at once."""
    active: int = 0
    """Runs that some worker holds a live lease of."""


def due(view: CanaryView, *, every: timedelta) -> bool:
    """Whether the next one is to be submitted: one at a time, `every` after the last."""
    return view.waiting_since is None and (view.ended_at is None or view.now - view.ended_at >= every)


def ailing(view: CanaryView, *, every: timedelta, within: timedelta) -> str | None:
    """Why runs cannot be relied on now, or None. A canary that only waits its turn, with every worker busy playing
    other runs, says nothing bad: a long queue is load, and not illness."""
    if view.failed is not None:
        return f"the last canary run ended {view.failed}"
    waited = view.now - view.waiting_since if view.waiting_since is not None else timedelta(0)
    if waited > within:
        overloaded = view.phase is Phase.QUEUED and view.slots > 0 and view.active >= view.slots
        return None if overloaded else f"a canary run is {view.phase} since {waited.total_seconds():.0f} s"
    if view.passed_at is None:
        return "no canary run has passed yet"
    if view.now - view.passed_at > MISSED * every + within:
        return f"no canary run has passed since {view.passed_at.isoformat(timespec='seconds')}"
    return None
