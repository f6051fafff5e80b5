"""What queued runs wait with: their tenants' caps, and the workers that live."""

from collections.abc import Mapping, Sequence
from datetime import timedelta

import sqlalchemy as sa

from service.adapters.sql.custody import PLAYING
from service.adapters.sql.documents import is_run_id
from service.adapters.sql.schema import run, tenant
from service.adapters.sql.transitions import SqlPart
from service.adapters.sql.workers import live, worker_record
from service.core.run import ACTIVE, Phase
from service.core.waiting import QueueView, WorkerView

_own = run.alias("own")
_active = (
    sa.select(sa.func.count())
    .select_from(_own)
    .where(_own.c.tenant == run.c.tenant, _own.c.phase.in_(sorted(ACTIVE)))
    .correlate(run)
    .scalar_subquery()
)
QUEUED_OF = (
    sa.select(
        run.c.id, run.c.tenant, run.c.boundary, run.c.runtime, run.c.attempt, tenant.c.concurrent,
        (run.c.fence != run.c.destroyed_fence).label("held_back"), _active.label("active"),
    )
    .join(tenant, tenant.c.name == run.c.tenant)
    .where(run.c.id.in_(sa.bindparam("b_run_ids", expanding=True)), run.c.phase == Phase.QUEUED.value)
)  # fmt: skip


class SqlWaiting(SqlPart):
    def queue_views(self, run_ids: Sequence[str], *, worker_fresh: timedelta) -> Mapping[str, QueueView]:
        known = sorted({run_id for run_id in run_ids if is_run_id(run_id)})
        if not known:
            return {}
        with self._db.read() as connection:
            rows = connection.execute(QUEUED_OF, {"b_run_ids": known}).all()
            if not rows:
                return {}
            playing = {row.lease_owner: row.runs for row in connection.execute(PLAYING)}
            records = [worker_record(row) for row in connection.execute(live(fresh=worker_fresh))]
        workers = tuple(
            WorkerView(
                capabilities=one.capabilities, slots=one.slots, playing=playing.get(one.id, 0), draining=one.draining
            )
            for one in records
        )
        return {
            row.id: QueueView(
                tenant=row.tenant, boundary=row.boundary, runtime=row.runtime, attempt=row.attempt,
                held_back=row.held_back, active=row.active, concurrent=row.concurrent, workers=workers,
            )
            for row in rows
        }  # fmt: skip
