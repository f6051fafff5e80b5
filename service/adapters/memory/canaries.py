"""The platform's own runs, and how busy the workers are."""

from collections.abc import Sequence
from datetime import timedelta

from service.adapters.memory.state import MemoryState, StoredRun
from service.core.canary import CANARY_TENANT, CanaryView
from service.core.run import ACTIVE, Outcome, Phase


class MemoryCanaries(MemoryState):
    def canary_view(self, *, fresh: timedelta) -> CanaryView:
        with self._lock:
            now = self.now()
            rows = [stored.run for stored in self._canaries()]
            ended = [run for run in rows if run.phase is Phase.FINISHED]
            passed = next((run for run in ended if run.outcome is Outcome.PASSED), None)
            under_way = next((run for run in rows if run.phase is not Phase.FINISHED), None)
            last = ended[0] if ended else None
            live = [w for w in self._workers.values() if w.measured_at is not None and w.measured_at > now - fresh]
            return CanaryView(
                now=now,
                passed_at=passed.finished_at if passed else None,
                ended_at=last.finished_at if last else None,
                failed=f"{last.outcome} / {last.reason}" if last and last.outcome is not Outcome.PASSED else None,
                waiting_since=under_way.created_at if under_way else None,
                phase=under_way.phase if under_way else None,
                slots=sum(worker.slots for worker in live),
                active=sum(s.run.phase in ACTIVE and not self._unheld(s) for s in self._runs.values()),
            )

    def old_canaries(self, *, keep: int) -> Sequence[str]:
        with self._lock:
            gone = [
                s.run.id for s in self._canaries() if s.run.phase is Phase.FINISHED and s.destroyed_fence == s.fence
            ]
        return gone[keep:]

    def _canaries(self) -> list[StoredRun]:
        """Newest first."""
        return [s for _, s in sorted(self._runs.items(), reverse=True) if s.run.tenant == CANARY_TENANT]
