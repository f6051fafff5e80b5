"""What queued runs wait with: their tenants' caps, and the workers that live."""

from collections.abc import Mapping, Sequence
from datetime import timedelta

from service.adapters.memory.custody import MemoryCustody
from service.adapters.memory.state import StoredRun
from service.adapters.memory.tenants import MemoryWorkers
from service.core.run import ACTIVE, Phase
from service.core.waiting import QueueView, WorkerView


class MemoryWaiting(MemoryWorkers, MemoryCustody):
    def queue_views(self, run_ids: Sequence[str], *, worker_fresh: timedelta) -> Mapping[str, QueueView]:
        with self._lock:
            playing = self.playing()
            workers = tuple(
                WorkerView(
                    capabilities=one.capabilities, slots=one.slots, playing=playing.get(one.id, 0),
                    draining=one.draining,
                )
                for one in self.live_workers(fresh=worker_fresh)
            )  # fmt: skip
            known = {run_id: self._runs[run_id] for run_id in run_ids if run_id in self._runs}
            queued = {run_id: stored for run_id, stored in known.items() if stored.run.phase is Phase.QUEUED}
            return {run_id: self._queue_view(stored, workers) for run_id, stored in queued.items()}

    def _queue_view(self, stored: StoredRun, workers: tuple[WorkerView, ...]) -> QueueView:
        run = stored.run
        return QueueView(
            tenant=run.tenant, boundary=run.placement.queue, runtime=stored.scenario.runtime, attempt=run.attempt,
            held_back=not stored.claimable, workers=workers,
            active=sum(s.run.tenant == run.tenant and s.run.phase in ACTIVE for s in self._runs.values()),
            concurrent=self._tenants[run.tenant].tenant.quota.concurrent,
        )  # fmt: skip
