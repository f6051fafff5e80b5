"""What is told of runs while they go on, for those who watch. The worker's share of it is in `line.py`."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import sqlalchemy as sa

from service.adapters.sql.documents import QUEUE_POSITION, is_run_id
from service.adapters.sql.schema import outbox, run, run_news
from service.adapters.sql.transitions import SqlPart
from service.core.errors import NotFound
from service.core.events import OF_PHASES
from service.core.news import Mark, Newest, NewsKind, NewsPage, PhaseView, StoredNews
from service.core.run import Outcome, Phase, Reason

_IDS_AT_ONCE = 500

_run_id: sa.BindParameter[Any] = sa.bindparam("b_run_id")
_seq = sa.bindparam("b_seq", type_=sa.Integer())
_until = sa.bindparam("b_until", type_=sa.Integer())
_newest_k = (
    sa.select(sa.func.max(run_news.c.k))
    .where(run_news.c.run_id == run.c.id, run_news.c.seq == run.c.phase_seq)
    .scalar_subquery()
)
NEWEST = sa.select(run.c.id, run.c.phase_seq, run.c.phase, sa.func.coalesce(_newest_k, 0).label("k")).where(
    run.c.id.in_(sa.bindparam("b_run_ids", expanding=True))
)
_now = sa.select(
    run.c.tenant, run.c.phase_seq, run.c.phase, run.c.attempt, run.c.outcome, run.c.reason, run.c.queued_at,
    run.c.started_at, run.c.finished_at, QUEUE_POSITION,
).where(run.c.id == _run_id)  # fmt: skip
PHASES = sa.select(outbox.c.seq, outbox.c.event).where(
    outbox.c.run_id == _run_id,
    outbox.c.seq > _seq,
    outbox.c.seq <= _until,
    outbox.c.type.in_([str(type_) for type_ in OF_PHASES]),
)
NEWS = (
    sa.select(run_news.c.seq, run_news.c.k, run_news.c.kind, run_news.c.data)
    .where(
        run_news.c.run_id == _run_id,
        sa.tuple_(run_news.c.seq, run_news.c.k) > sa.tuple_(_seq, sa.bindparam("b_k", type_=sa.Integer())),
        run_news.c.seq <= _until,
    )
    .order_by(run_news.c.seq, run_news.c.k)
    .limit(sa.bindparam("b_limit", type_=sa.Integer()))
)


class SqlNews(SqlPart):
    def read_news(self, run_id: str, tenant: str | None, *, after: Mark, limit: int) -> NewsPage:
        if not is_run_id(run_id):
            raise NotFound
        with self._db.read() as connection:
            # First where the run stands: up to there everything is committed, whatever happens between the questions.
            row = connection.execute(_now, {"b_run_id": run_id}).one_or_none()
            if row is None or tenant not in (None, row.tenant):
                raise NotFound
            asked = {"b_run_id": run_id, "b_seq": after[0], "b_k": after[1], "b_until": row.phase_seq}
            phases = connection.execute(PHASES, asked).all()
            news = connection.execute(NEWS, asked | {"b_limit": limit + 1}).all()
        return NewsPage(
            seq=row.phase_seq,
            now=_view(row),
            phases={phase.seq: json.loads(phase.event) for phase in phases},
            news=tuple(StoredNews(seq=n.seq, k=n.k, kind=NewsKind(n.kind), data=n.data) for n in news[:limit]),
            more=len(news) > limit,
        )

    def newest(self, run_ids: Iterable[str]) -> Mapping[str, Newest]:
        known = sorted({run_id for run_id in run_ids if is_run_id(run_id)})
        found: dict[str, Newest] = {}
        with self._db.read() as connection:
            for start in range(0, len(known), _IDS_AT_ONCE):
                some = known[start : start + _IDS_AT_ONCE]
                for row in connection.execute(NEWEST, {"b_run_ids": some}):
                    found[row.id] = Newest(seq=row.phase_seq, k=row.k, phase=Phase(row.phase))
        return found


def _view(row: sa.Row[Any]) -> PhaseView:
    phase = Phase(row.phase)
    at = {Phase.QUEUED: row.queued_at, Phase.RUNNING: row.started_at, Phase.FINISHED: row.finished_at}.get(phase)
    return PhaseView(
        phase=phase,
        at=at,
        attempt=row.attempt,
        outcome=None if row.outcome is None else Outcome(row.outcome),
        reason=None if row.reason is None else Reason(row.reason),
        queue_position=row.queue_position,
    )
