"""How things stand, for the metrics: each question is answered from a partial index of what is not yet done."""

from datetime import timedelta

import sqlalchemy as sa

from service.adapters.sql.engine import db_now
from service.adapters.sql.schema import IS_QUEUED, indexed_by, outbox, run
from service.adapters.sql.transitions import SqlPart
from service.core.ports.publishing import Standing
from service.core.run import ACTIVE, Phase

_IS_UNSTAMPED = sa.text("pub_seq IS NULL AND NOT internal")
_IS_UNPUBLISHED = sa.text("pub_seq IS NOT NULL AND NOT published")
QUEUED = (
    sa.select(sa.func.count(), sa.func.min(run.c.queued_at).label("since"), db_now().label("at"))
    .select_from(run)
    .where(sa.text(IS_QUEUED))
    .with_hint(run, indexed_by("ix_run_queued"), "sqlite")
)
# A lease is set in the active phases only.
ACTIVE_RUNS = sa.select(run.c.phase, sa.func.count()).where(run.c.lease_until.is_not(None)).group_by(run.c.phase)
ACTIVE_RUNS = ACTIVE_RUNS.with_hint(run, indexed_by("ix_run_lease_until"), "sqlite")
UNSTAMPED = (
    sa.select(sa.func.count())
    .select_from(outbox)
    .where(_IS_UNSTAMPED)
    .with_hint(outbox, indexed_by("ix_outbox_unstamped"), "sqlite")
)
UNPUBLISHED = (
    sa.select(sa.func.count())
    .select_from(outbox)
    .where(_IS_UNPUBLISHED)
    .with_hint(outbox, indexed_by("ix_outbox_unpublished"), "sqlite")
)
_first = sa.select(outbox.c.created_at, db_now().label("at")).limit(1)
FIRST_UNSTAMPED = _first.where(_IS_UNSTAMPED).order_by(outbox.c.id)
FIRST_UNSTAMPED = FIRST_UNSTAMPED.with_hint(outbox, indexed_by("ix_outbox_unstamped"), "sqlite")
FIRST_UNPUBLISHED = _first.where(_IS_UNPUBLISHED).order_by(outbox.c.pub_seq)
FIRST_UNPUBLISHED = FIRST_UNPUBLISHED.with_hint(outbox, indexed_by("ix_outbox_unpublished"), "sqlite")


class SqlStanding(SqlPart):
    def standing(self) -> Standing:
        none = timedelta(0)
        with self._db.read() as connection:
            waiting, since, now = connection.execute(QUEUED).one()
            active = {Phase(phase): count for phase, count in connection.execute(ACTIVE_RUNS)}
            counts = [connection.scalar(question) or 0 for question in (UNSTAMPED, UNPUBLISHED)]
            rows = [connection.execute(question).one_or_none() for question in (FIRST_UNSTAMPED, FIRST_UNPUBLISHED)]
        return Standing(
            runs={Phase.QUEUED: waiting} | {phase: active.get(phase, 0) for phase in ACTIVE},
            waited=none if since is None else max(now - since, none),
            unpublished=sum(counts),
            lag=max((row.at - row.created_at for row in rows if row is not None), default=none),
        )
