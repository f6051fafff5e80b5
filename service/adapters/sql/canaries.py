"""The platform's own runs, and how busy the workers are."""

from collections.abc import Sequence
from datetime import timedelta

import sqlalchemy as sa

from service.adapters.sql.engine import db_now
from service.adapters.sql.schema import IS_ACTIVE, run, worker
from service.adapters.sql.transitions import SqlPart
from service.core.canary import CANARY_TENANT, CanaryView
from service.core.run import Outcome, Phase

_LOOKED_AT = 10
_newest = (
    sa.select(run.c.id, run.c.phase, run.c.outcome, run.c.reason, run.c.created_at, run.c.finished_at)
    .where(run.c.tenant == CANARY_TENANT)
    .order_by(run.c.id.desc())
    .limit(_LOOKED_AT)
)
_now = sa.select(db_now())
_active = sa.select(sa.func.count()).select_from(run).where(sa.text(IS_ACTIVE), run.c.lease_until >= db_now())


class SqlCanaries(SqlPart):
    def canary_view(self, *, fresh: timedelta) -> CanaryView:
        slots = sa.select(sa.func.coalesce(sa.func.sum(worker.c.slots), 0)).where(
            worker.c.measured_at > db_now() - fresh
        )
        with self._db.read() as connection:
            rows = connection.execute(_newest).all()
            now, active, live = (connection.scalar(asked) for asked in (_now, _active, slots))
        ended = [row for row in rows if row.phase == Phase.FINISHED.value]
        passed = [row for row in ended if row.outcome == Outcome.PASSED.value]
        under_way = next((row for row in rows if row.phase != Phase.FINISHED.value), None)
        failed = bool(ended) and ended[0].outcome != Outcome.PASSED.value
        return CanaryView(
            now=now,
            passed_at=passed[0].finished_at if passed else None,
            ended_at=ended[0].finished_at if ended else None,
            failed=f"{ended[0].outcome} / {ended[0].reason}" if failed else None,
            waiting_since=under_way.created_at if under_way is not None else None,
            phase=under_way.phase if under_way is not None else None,
            slots=live,
            active=active,
        )

    def old_canaries(self, *, keep: int) -> Sequence[str]:
        wanted = (
            sa.select(run.c.id)
            .where(
                run.c.tenant == CANARY_TENANT,
                run.c.phase == Phase.FINISHED.value,
                run.c.destroyed_fence == run.c.fence,
            )
            .order_by(run.c.id.desc())
            .offset(keep)
            .limit(100)
        )
        with self._db.read() as connection:
            return list(connection.scalars(wanted))
