"""How things stand."""

from datetime import timedelta

from service.adapters.memory.state import MemoryState
from service.core.ports.publishing import Standing
from service.core.run import ACTIVE, Phase


class MemoryStanding(MemoryState):
    def standing(self) -> Standing:
        with self._lock:
            now = self.now()
            stored = list(self._runs.values())
            waiting = [s.queued_at for s in stored if s.run.phase is Phase.QUEUED]
            untold = [e.at for e in self._events if not e.published and not e.tenant.startswith("_")]
        return Standing(
            runs={phase: sum(s.run.phase is phase for s in stored) for phase in (Phase.QUEUED, *ACTIVE)},
            waited=now - min(waiting, default=now),
            unpublished=len(untold),
            lag=max((now - at for at in untold), default=timedelta(0)),
        )
