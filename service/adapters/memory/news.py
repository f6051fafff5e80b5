"""What is told of runs while they go on."""

from collections.abc import Iterable, Mapping

from service.adapters.memory.state import MemoryState
from service.core.events import OF_PHASES
from service.core.news import Mark, Newest, NewsPage, PhaseView
from service.core.run import Phase


class MemoryNews(MemoryState):
    def read_news(self, run_id: str, tenant: str | None, *, after: Mark, limit: int) -> NewsPage:
        with self._lock:
            stored = self._stored(run_id, tenant)
            run = self._shown(stored)
            ats = {Phase.QUEUED: stored.queued_at, Phase.RUNNING: run.started_at, Phase.FINISHED: run.finished_at}
            phases = {
                int(event.event["sequence"]): event.event
                for event in self._events
                if event.run_id == run_id and event.type in OF_PHASES
            }
            news = [told for told in stored.news if told.mark > after]
            return NewsPage(
                seq=stored.phase_seq,
                now=PhaseView(
                    phase=run.phase, at=ats.get(run.phase), attempt=run.attempt, outcome=run.outcome,
                    reason=run.reason, queue_position=run.queue_position,
                ),
                phases={seq: event for seq, event in phases.items() if seq > after[0]},
                news=tuple(news[:limit]),
                more=len(news) > limit,
            )  # fmt: skip

    def newest(self, run_ids: Iterable[str]) -> Mapping[str, Newest]:
        with self._lock:
            return {
                run_id: Newest(
                    seq=stored.phase_seq,
                    k=max((told.k for told in stored.news if told.seq == stored.phase_seq), default=0),
                    phase=stored.run.phase,
                )
                for run_id in run_ids
                if (stored := self._runs.get(run_id)) is not None
            }
