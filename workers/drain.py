"""A worker that is told to drain: it takes no bell any more, finishes what it plays, and says so."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import structlog
from celery import bootsteps

from service.core.errors import Unavailable
from service.core.ports.publishing import Doorbell

log = structlog.get_logger()


class DrainedBy(Protocol):
    """What the store says of this worker, and of what waits."""

    def is_draining(self, worker_id: str) -> bool: ...
    def waiting(self, boundaries: Sequence[str]) -> bool: ...


def draining(
    store: DrainedBy, doorbell: Doorbell, *, worker_id: str, queues: dict[str, str], busy: Callable[[], bool],
    every_s: float,
) -> type[Any]:  # fmt: skip
    """A step of the worker's parent, on its event loop's timer. `queues`: boundary to queue.

    From the operator's word on the store lets this worker claim nothing. So a bell that it still hears is used up in
    vain: once its queues are cancelled, what waits is rung for again, for the others.
    """

    class Draining(bootsteps.StartStopStep):  # type: ignore[misc]
        requires = ("celery.worker.components:Timer",)

        def start(self, worker: Any) -> None:
            self.worker, self.cancelled, self.told = worker, False, False
            self.timer = worker.timer.call_repeatedly(every_s, self.look)

        def stop(self, worker: Any) -> None:
            self.timer.cancel()

        def look(self) -> None:
            try:
                if not self.cancelled and store.is_draining(worker_id):
                    self.cancel()
            except Unavailable as error:
                log.warning("cannot ask whether this worker drains", error=str(error))
            if self.cancelled and not self.told and not busy():
                self.told = True
                log.info("drained", worker=worker_id)

        def cancel(self) -> None:
            log.info("draining", worker=worker_id)
            for queue in queues.values():
                self.worker.consumer.cancel_task_queue(queue)
            self.cancelled = True
            for boundary in queues:
                if store.waiting([boundary]):
                    doorbell.ring(boundary)

    return Draining
