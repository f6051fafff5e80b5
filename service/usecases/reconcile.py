"""What is left undone when a worker or a message is lost, found again from SQL alone.

Pure decisions (`core.lease.recover`) applied to the runs that nobody acts on, and doorbells rung for those that wait.
It may run in any number of processes at once: each write is guarded by what was read.
"""

from dataclasses import dataclass
from datetime import timedelta

import structlog

from service.core.errors import Unavailable
from service.core.lease import Recovery, recover
from service.core.ports import Doorbell, RunLine

_LOG = structlog.get_logger()


@dataclass(frozen=True)
class Reconciled:
    """Ids of runs ended and put back, and boundaries whose doorbells were rung."""

    finished: tuple[str, ...]
    requeued: tuple[str, ...]
    rung: tuple[str, ...]


def reconcile(line: RunLine, doorbell: Doorbell, *, max_queue: timedelta, ring_after: timedelta) -> Reconciled:
    """One pass. A run that moves on meanwhile is left alone. Bells that cannot be rung now are rung by a later pass."""
    finished, requeued = _recover(line, max_queue=max_queue)
    return Reconciled(finished=finished, requeued=requeued, rung=_ring(line, doorbell, ring_after=ring_after))


def _recover(line: RunLine, *, max_queue: timedelta) -> tuple[tuple[str, ...], tuple[str, ...]]:
    finished, requeued = [], []
    now = line.now()
    for view in line.leases():
        decision = recover(view, now=now, max_queue=max_queue)
        if decision is None:
            continue
        if decision.action is Recovery.REQUEUE:
            if line.recover_requeue(view):
                requeued.append(view.run_id)
                _LOG.warning("run_requeued", run=view.run_id, fence=view.fence, was=str(view.phase))
        elif decision.verdict is not None and line.recover_finish(view, decision.verdict):
            finished.append(view.run_id)
            reason = decision.verdict.reason
            _LOG.warning(
                "run_ended", run=view.run_id, fence=view.fence, was=str(view.phase), reason=reason and str(reason)
            )
    return tuple(finished), tuple(requeued)


def _ring(line: RunLine, doorbell: Doorbell, *, ring_after: timedelta) -> tuple[str, ...]:
    rung = []
    for boundary in line.queues_waiting(older_than=ring_after):
        try:
            doorbell.ring(boundary)
        except Unavailable as error:
            _LOG.warning("doorbell_unavailable", boundary=boundary, error=error.detail)
            break
        rung.append(boundary)
    return tuple(rung)
