"""What a lost message, a flushed Redis or a dead worker left undone, found again from the database alone.

Pure decisions (`core.lease.recover`) applied to the runs that nobody acts on, and doorbells rung for those that wait.
Any number of processes may do this at once: every write is guarded by the fence and phase that was seen.
"""

from datetime import timedelta

import structlog

from service.core.errors import Unavailable
from service.core.lease import LeaseView, Recover, Recovery, recover
from service.core.ports.publishing import Doorbell, Hints
from service.core.ports.runs import RunLine

log = structlog.get_logger()


def reconcile(runs: RunLine, doorbell: Doorbell, hints: Hints, *, max_queue: timedelta, ring_after: timedelta) -> int:
    """One pass. -> how many runs were requeued or ended. A run that moves on meanwhile is left alone; bells that cannot
    be rung now are rung by a later pass."""
    now = runs.now()
    changed = 0
    for view in runs.leases():
        decision = recover(view, now=now, max_queue=max_queue)
        if decision is not None and _apply(runs, view, decision):
            changed += 1
            hints.hint("run", view.run_id)
            hints.hint("outbox", view.run_id)
    for boundary in runs.queues_waiting(older_than=ring_after):
        try:
            doorbell.ring(boundary)
        except Unavailable as error:
            log.warning("doorbell_unavailable", boundary=boundary, error=error.detail)
            break
    return changed


def _apply(runs: RunLine, view: LeaseView, decision: Recover) -> bool:
    """-> False when the run moved on meanwhile. Each is a warning: somebody or something was lost."""
    logger = log.bind(run_id=view.run_id, fence=view.fence, was=str(view.phase))
    if decision.action is Recovery.REQUEUE:
        done = runs.recover_requeue(view)
        if done:
            logger.warning("run_requeued")
        return done
    assert decision.verdict is not None
    done = runs.recover_finish(view, decision.verdict)
    if done:
        logger.warning("run_ended", reason=decision.verdict.reason and str(decision.verdict.reason))
    return done
