"""Repairs what a lost message, a flushed Redis or a dead worker left in the database: pure SQL and the doorbell.

Any number of processes may do this at once: every write is guarded by the fence and phase that was seen.
"""

from datetime import timedelta

import structlog

from service.core.errors import Unavailable
from service.core.lease import Recovery, recover
from service.core.ports import Doorbell, Hints, RunLine

log = structlog.get_logger()


def reconcile(runs: RunLine, doorbell: Doorbell, hints: Hints, *, max_queue: timedelta, ring_after: timedelta) -> int:
    """One pass. -> how many runs were requeued or ended. A bell that cannot be rung is rung by the next pass."""
    now = runs.now()
    changed = 0
    for view in runs.leases():
        decision = recover(view, now=now, max_queue=max_queue)
        if decision is None:
            continue
        if decision.action is Recovery.REQUEUE:
            done = runs.recover_requeue(view)
        else:
            assert decision.verdict is not None
            done = runs.recover_finish(view, decision.verdict)
        if done:
            changed += 1
            log.info(
                "recovered", run_id=view.run_id, fence=view.fence, phase=str(view.phase), action=str(decision.action)
            )
            hints.hint("run", view.run_id)
            hints.hint("outbox", view.run_id)
    for boundary in runs.queues_waiting(older_than=ring_after):
        try:
            doorbell.ring(boundary)
        except Unavailable as error:
            log.warning("doorbell not rung", boundary=boundary, error=str(error))
            break
    return changed
