"""Named places where a test may make a process die, stop or fail: every step of a run's line has one.

Nothing happens at any of them unless a composition root has armed them, and that it may only where environment=test.
`PLACES` is the registry: each name, and the functions that reach it; a test compares it with the code.
"""

import re
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import NamedTuple


class Failpoint(StrEnum):
    SUBMIT_BEFORE_COMMIT = "submit.before_commit"
    SUBMIT_AFTER_COMMIT = "submit.after_commit"
    SUBMIT_BEFORE_RING = "submit.before_ring"
    CLAIM_BEFORE_COMMIT = "claim.before_commit"
    CLAIM_AFTER = "claim.after"
    OPEN_BEFORE_CREATE = "open.before_create"
    OPEN_HALF_CREATED = "open.half_created"
    OPEN_CREATED = "open.created"
    UPLOAD_AFTER = "upload.after"
    RUNNING_AFTER = "running.after"
    STEP_AFTER = "step.after"
    COLLECT_BEFORE = "collect.before"
    COLLECT_AFTER = "collect.after"
    FINISH_BEFORE = "finish.before"
    FINISH_BEFORE_COMMIT = "finish.before_commit"
    FINISH_AFTER = "finish.after"
    DESTROY_BEFORE = "destroy.before"
    DESTROY_AFTER = "destroy.after"
    RELAY_STAMPED = "relay.stamped"
    RELAY_ADDED = "relay.added"
    REAPER_BEFORE_DESTROY = "reaper.before_destroy"
    REAPER_DESTROYED = "reaper.destroyed"
    HOOK_CLAIMED = "hook.claimed"
    HOOK_SENT = "hook.sent"


PLACES: Mapping[Failpoint, frozenset[str]] = {
    Failpoint.SUBMIT_BEFORE_COMMIT: frozenset({"service.adapters.sql.runs:SqlRuns.submit"}),
    Failpoint.SUBMIT_AFTER_COMMIT: frozenset({"service.usecases.submit:submit"}),
    Failpoint.SUBMIT_BEFORE_RING: frozenset({"service.usecases.submit:_announce"}),
    Failpoint.CLAIM_BEFORE_COMMIT: frozenset({"service.adapters.sql.line:SqlRunLine.claim"}),
    Failpoint.CLAIM_AFTER: frozenset({"workers.run_scenario:run_waiting"}),
    Failpoint.OPEN_BEFORE_CREATE: frozenset(
        {
            "workers.boundaries.fake:FakeBoundary.open",
            "workers.boundaries.gvisor.driver:GvisorBoundary.open",
            "workers.boundaries.namespace.driver:NamespaceBoundary.open",
            "workers.boundaries.cluster.driver:ClusterBoundary.open",
        }
    ),
    Failpoint.OPEN_HALF_CREATED: frozenset(
        {
            "workers.boundaries.fake:FakeBoundary.open",
            "workers.boundaries.gvisor.driver:GvisorBoundary._make",
            "workers.pods.opening:Opening.make",
            "workers.boundaries.cluster.driver:ClusterBoundary._make",
        }
    ),
    Failpoint.OPEN_CREATED: frozenset(
        {
            "workers.boundaries.fake:FakeBoundary.open",
            "workers.boundaries.gvisor.driver:GvisorBoundary.open",
            "workers.boundaries.namespace.driver:NamespaceBoundary.open",
            "workers.boundaries.cluster.driver:ClusterBoundary.open",
        }
    ),
    Failpoint.UPLOAD_AFTER: frozenset({"workers.run_scenario:_play_through"}),
    Failpoint.RUNNING_AFTER: frozenset({"workers.run_scenario:_play_through"}),
    Failpoint.STEP_AFTER: frozenset({"workers.run_scenario:_play"}),
    Failpoint.COLLECT_BEFORE: frozenset({"workers.run_scenario:_play_through"}),
    Failpoint.COLLECT_AFTER: frozenset({"workers.run_scenario:_play_through"}),
    Failpoint.FINISH_BEFORE: frozenset({"workers.run_scenario:_play_through"}),
    Failpoint.FINISH_BEFORE_COMMIT: frozenset({"service.adapters.sql.line:SqlRunLine.finish"}),
    Failpoint.FINISH_AFTER: frozenset({"workers.run_scenario:_play_through"}),
    Failpoint.DESTROY_BEFORE: frozenset({"workers.run_scenario:_tear_down"}),
    Failpoint.DESTROY_AFTER: frozenset({"workers.run_scenario:_tear_down"}),
    Failpoint.RELAY_STAMPED: frozenset({"service.relay.relay:Relay._carry"}),
    Failpoint.RELAY_ADDED: frozenset({"service.relay.relay:Relay._publish"}),
    Failpoint.REAPER_BEFORE_DESTROY: frozenset({"workers.reaper:_destroyed"}),
    Failpoint.REAPER_DESTROYED: frozenset({"workers.reaper:_destroyed"}),
    Failpoint.HOOK_CLAIMED: frozenset({"service.relay.webhooks.dispatcher:Dispatcher._begin"}),
    Failpoint.HOOK_SENT: frozenset({"service.relay.webhooks.dispatcher:Dispatcher._attempt"}),
}
"""Name to `module:function` of each place that reaches it."""


class Action(StrEnum):
    EXIT = "exit"  # at once, as kill -9 would
    STOP = "stop"  # SIGSTOP to itself, until somebody sends SIGCONT
    RAISE = "raise"  # FailpointReached, as a defect of ours would


class FailpointReached(Exception):
    """What `raise` raises: no BlastdoorError, since a defect is none."""


class Armed(NamedTuple):
    """`nth`: only the n-th time that it is reached; 0: each time."""

    point: Failpoint
    action: Action
    nth: int = 0


_SPEC = re.compile(r"^(?P<point>[a-z_.]+):(?P<action>[a-z]+)(@(?P<nth>[1-9][0-9]{0,5}))?$", re.ASCII)
_hook: Callable[[Failpoint], None] | None = None


def reach(point: Failpoint) -> None:
    """Does nothing, unless armed."""
    if _hook is not None:
        _hook(point)


def install(hook: Callable[[Failpoint], None] | None) -> None:
    """For the composition roots' `adapters.failpoints.arm` and for tests; None disarms."""
    global _hook
    _hook = hook


def parse(text: str) -> tuple[Armed, ...]:
    """`claim.after:exit,finish.before:raise@2` -> what is armed, each name at most once. Raises ValueError."""
    armed = tuple(_parse_one(word.strip()) for word in text.split(",") if word.strip())
    if len({one.point for one in armed}) != len(armed):
        raise ValueError("a failpoint is named twice")
    return armed


def _parse_one(word: str) -> Armed:
    match = _SPEC.match(word)
    try:
        if match is None:
            raise ValueError("the form is NAME:ACTION or NAME:ACTION@N")
        return Armed(Failpoint(match["point"]), Action(match["action"]), int(match["nth"] or 0))
    except ValueError as error:
        raise ValueError(f"failpoint {word!r}: {error}") from error
