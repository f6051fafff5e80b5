"""Why a queued run is not being played yet: what its owner is told beside its place. Pure.

The first thing that holds it up is named, from what nobody's patience mends (no worker) to what passes by itself.
"""

from typing import TypeVar

from pydantic import BaseModel, ConfigDict

from service.core.boundary import Capabilities
from service.core.news import PhaseView
from service.core.placement import queues
from service.core.run import QueueReason, Run

Shown = TypeVar("Shown", Run, PhaseView)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class WorkerView(_Frozen):
    """A live worker: what it measured, how many runs it plays at once (`slots`), and how many it acts on now."""

    capabilities: tuple[Capabilities, ...]
    slots: int
    playing: int
    draining: bool

    def builds(self, queue: str, *, runtime: str | None = None) -> bool:
        """Whether it may claim from this queue. `runtime` None: any."""
        return any(queue in queues([one]) and (runtime is None or runtime in one.runtimes) for one in self.capabilities)


class QueueView(_Frozen):
    """What a queued run waits with. `boundary`: as it is queued, with its node group. `active` runs of its tenant are
    under way, of `concurrent` allowed. `held_back`: what its last attempt made is not yet known to be gone. `workers`:
    all that live."""

    tenant: str
    boundary: str
    runtime: str
    attempt: int
    held_back: bool
    active: int
    concurrent: int
    workers: tuple[WorkerView, ...]


def why_queued(view: QueueView) -> tuple[QueueReason, str] | None:
    """-> the reason, and a sentence about it, which counts nothing of other tenants; None when a worker is free for the
    run, or for one before it."""
    able = [worker for worker in view.workers if worker.builds(view.boundary, runtime=view.runtime)]
    if not able:
        offered = any(worker.builds(view.boundary) for worker in view.workers)
        what = f"offers {view.boundary} with runtime {view.runtime}" if offered else f"builds {view.boundary}"
        return QueueReason.NO_WORKER, f"no live worker {what}"
    taking = [worker for worker in able if not worker.draining]
    if not taking:
        return QueueReason.DRAINING, f"every worker that builds {view.boundary} is draining: it takes no more runs"
    if view.held_back:
        return QueueReason.CLEANING_UP, f"what attempt {view.attempt} made is not yet known to be gone"
    if view.active >= view.concurrent:
        runs = "1 run" if view.active == 1 else f"{view.active} runs"
        return QueueReason.TENANT_AT_CAP, f"tenant {view.tenant} has {runs} under way and may have {view.concurrent}"
    if all(worker.playing >= worker.slots for worker in taking):
        return QueueReason.WORKERS_BUSY, f"every worker that builds {view.boundary} is busy"
    return None


def explained(shown: Shown, view: QueueView | None) -> Shown:
    """The same with the reason why it waits. `view` None: it has left the queue since it was read."""
    why = None if view is None else why_queued(view)
    if why is None:
        return shown
    reason, message = why
    return shown.model_copy(update={"queue_reason": reason, "message": message})
