"""What a worker's parent does again and again on its event loop's timer: it measures, says so, and listens to the bells
of what it can build since. No thread, since the parent forks."""

from collections.abc import Callable
from typing import Any, Protocol

import structlog
from celery import bootsteps

from service.core.boundary import Capabilities
from service.core.errors import Unavailable
from service.core.placement import queues
from service.core.ports.tenants import WorkerRecord

log = structlog.get_logger()


class Registry(Protocol):
    """Where workers are known."""

    def record_worker(self, worker: WorkerRecord) -> None: ...
    def is_draining(self, worker_id: str) -> bool: ...


def registering(
    store: Registry, record: WorkerRecord, *, measure: Callable[[], tuple[Capabilities, ...]],
    heard: dict[str, str], queue_name: Callable[[str], str], every_s: float,
) -> type[Any]:  # fmt: skip
    """A step of the worker's parent. `heard`: what it listens to by now, the queue of each; shared with the step that
    drains. What is gone stays in it: a bell of that is heard in vain, and rung again for the others."""

    class Registrar(bootsteps.StartStopStep):  # type: ignore[misc]
        requires = ("celery.worker.components:Timer",)

        def start(self, worker: Any) -> None:
            self.worker = worker
            self.timer = worker.timer.call_repeatedly(every_s, self.beat)

        def stop(self, worker: Any) -> None:
            self.timer.cancel()

        def beat(self) -> None:
            try:
                measured = record.model_copy(update={"capabilities": measure()})
                store.record_worker(measured)
                new = [one for one in queues(measured.capabilities) if one not in heard]
                if new and not store.is_draining(record.id):
                    self.hear(new)
            except Unavailable as error:
                log.warning("cannot say that this worker lives", error=str(error))

        def hear(self, new: list[str]) -> None:
            """Such as a node group that a cluster has got, or what a host could not build when the worker started."""
            for one in new:
                heard[one] = queue_name(one)
                self.worker.consumer.add_task_queue(heard[one])
            log.info("listens_to_more", queues=[heard[one] for one in new])

    return Registrar
