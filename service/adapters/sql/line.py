"""The worker's line: claim, record, finish; each write guarded by fence, phase and a lease that has not run out.

A lease that has run out stays run out: nobody renews it, so what the reaper concluded from it stays true.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from service.adapters.sql.documents import CHANGED, is_run_id, run_of
from service.adapters.sql.engine import Span, db_now
from service.adapters.sql.events import write_phase
from service.adapters.sql.fairness import FAIREST, SOMETHING_TO_CLAIM, serialised
from service.adapters.sql.schema import IS_QUEUED, NOT_KNOWN_GONE, indexed_by, run, run_input, tenant, worker
from service.adapters.sql.transitions import (
    APPEND,
    FINISH,
    FINISH_LOST,
    HEARTBEAT,
    LOOK,
    REQUEUE,
    REQUEUE_LOST,
    TO_COLLECTING,
    TO_RUNNING,
    SqlPart,
    change,
    end,
    only,
    sources,
)
from service.core.boundary import Bundle, Share
from service.core.controls import ceilings
from service.core.errors import LeaseLost
from service.core.events import EventType
from service.core.failpoints import Failpoint, reach
from service.core.lease import LeaseView, instead_of_another_attempt
from service.core.news import News
from service.core.ports.runs import Claim, Heartbeat
from service.core.run import Phase, Result, Verdict
from service.core.scenario import Scenario
from service.core.tenancy import Ceilings

LEASE_VIEW = (
    run.c.id.label("run_id"), run.c.tenant, run.c.phase, run.c.boundary, run.c.attempt, run.c.fence, run.c.lease_until,
    run.c.created_at, run.c.destroyed_fence, run.c.quarantined_fence, run.c.cancel_requested_by,
)  # fmt: skip
_take = (
    sa.update(run)
    .where(run.c.id == FAIREST.scalar_subquery(), run.c.phase == Phase.QUEUED.value)
    .values(
        phase=Phase.PROVISIONING.value,
        fence=run.c.fence + 1,
        attempt=run.c.attempt + 1,
        last_seq=run.c.last_seq + 1,
        phase_seq=run.c.last_seq + 1,
        lease_owner=sa.bindparam("b_worker_id"),
        lease_until=db_now() + sa.bindparam("b_lease", type_=Span()),
        site=sa.bindparam("b_site"),
        boundary_destroyed_at=None,
    )
    .returning(*CHANGED)
)
_drains = sa.select(worker.c.id).where(worker.c.id == sa.bindparam("b_worker_id"), worker.c.draining)
_input = sa.select(run_input.c.scenario, run_input.c.bundle).where(run_input.c.run_id == sa.bindparam("b_run_id"))
_served = (
    sa.update(tenant)
    .where(tenant.c.name == sa.bindparam("b_tenant"))
    .values(last_served=sa.bindparam("b_at"))
    .returning(tenant.c.concurrent, tenant.c.ceilings)
)
_held = (
    sa.select(*LEASE_VIEW)
    .where(run.c.id == sa.bindparam("b_run_id"), run.c.fence == sa.bindparam("b_fence"))
    .with_for_update()
)
_destroyed = (
    sa.update(run)
    .where(
        run.c.id == sa.bindparam("b_run_id"),
        run.c.fence >= sa.bindparam("b_fence"),
        run.c.destroyed_fence < sa.bindparam("b_fence"),
    )
    .values(destroyed_fence=sa.bindparam("b_fence"), boundary_destroyed_at=db_now(), last_seq=run.c.last_seq + 1)
    .returning(*CHANGED)
)
_one_view = sa.select(*LEASE_VIEW).where(run.c.id == sa.bindparam("b_run_id"))
_most = sa.bindparam("b_limit", type_=sa.Integer())
_is_overdue = sa.and_(run.c.lease_until.is_not(None), run.c.lease_until < db_now())
_overdue = sa.select(*LEASE_VIEW).where(_is_overdue).order_by(run.c.lease_until).limit(_most)
QUEUED = sa.select(*LEASE_VIEW).where(sa.text(IS_QUEUED)).order_by(run.c.id).limit(_most)
QUEUED = QUEUED.with_hint(run, indexed_by("ix_run_queued"), "sqlite")
UNDESTROYED = (
    sa.select(*LEASE_VIEW)
    .where(
        run.c.site == sa.bindparam("b_site"),
        sa.text(NOT_KNOWN_GONE),
        sa.or_(run.c.lease_until.is_(None), run.c.lease_until < db_now()),
    )
    .order_by(run.c.created_at, run.c.id)  # by the id alone PostgreSQL would walk every run in that order
    .limit(_most)
)
_queues_waiting = (
    sa.select(run.c.boundary)
    .where(sa.text(IS_QUEUED), run.c.queued_at <= db_now() - sa.bindparam("b_older_than", type_=Span()))
    .distinct()
    .order_by(run.c.boundary)
)
_now = sa.select(db_now())


class SqlRunLine(SqlPart):
    def claim(
        self, *, worker_id: str, site: str, boundaries: Sequence[str], runtimes: Sequence[str], lease: timedelta
    ) -> Claim | None:
        if not boundaries or not runtimes:
            return None
        installation = self.installation_id()
        offered = {
            "b_boundaries": sorted(set(boundaries)), "b_runtimes": sorted(set(runtimes)), "b_worker_id": worker_id,
            "b_site": site, "b_lease": lease,
        }  # fmt: skip
        with self._db.write() as connection:
            serialised(connection)
            if connection.execute(_drains, offered).one_or_none() is not None:
                return None
            row = connection.execute(_take, offered).one_or_none()
            if row is None:
                return None
            claimed = run_of(row)
            owner = connection.execute(_served, {"b_tenant": row.tenant, "b_at": row.at}).one()
            write_phase(
                connection, claimed, installation=installation, seq=row.last_seq, fence=row.fence, at=row.at,
                traceparent=row.traceparent,
            )  # fmt: skip
            brought = connection.execute(_input, {"b_run_id": row.id}).one()
            reach(Failpoint.CLAIM_BEFORE_COMMIT)
        return Claim(
            run=claimed,
            share=Share(runs=owner.concurrent, limits=ceilings(Ceilings.model_validate_json(owner.ceilings))),
            fence=row.fence,
            scenario=Scenario.model_validate_json(brought.scenario),
            bundle=None if brought.bundle is None else Bundle.model_validate_json(brought.bundle),
            lease_until=row.lease_until,
            waited=row.at - row.queued_at,
            traceparent=row.traceparent,
        )

    def heartbeat(self, run_id: str, fence: int, *, lease: timedelta) -> Heartbeat:
        with self._db.write() as connection:
            row = connection.execute(HEARTBEAT, _held_by(run_id, fence) | {"b_lease": lease}).one_or_none()
        if row is None:
            raise _lost(run_id, fence)
        return Heartbeat(cancel_requested_by=row.cancel_requested_by)

    def look(self, run_id: str, fence: int) -> Heartbeat:
        with self._db.read() as connection:
            row = connection.execute(LOOK, _held_by(run_id, fence)).one_or_none()
        if row is None:
            raise _lost(run_id, fence)
        return Heartbeat(cancel_requested_by=row.cancel_requested_by)

    def append_news(self, run_id: str, fence: int, news: Sequence[News]) -> None:
        with self._db.write() as connection:
            # Locked, so that what is told of a phase is there before the phase ends, for whoever reads in between.
            if connection.execute(LOOK.with_for_update(), _held_by(run_id, fence)).one_or_none() is None:
                raise _lost(run_id, fence)
            self._tell(connection, run_id, fence, news)

    def mark_running(self, run_id: str, fence: int, *, news: Sequence[News] = ()) -> None:
        self._change(TO_RUNNING, run_id, fence, news)

    def mark_collecting(self, run_id: str, fence: int, *, news: Sequence[News] = ()) -> None:
        self._change(TO_COLLECTING, run_id, fence, news)

    def finish(self, run_id: str, fence: int, result: Result, *, news: Sequence[News] = ()) -> None:
        installation = self.installation_id()
        with self._db.write() as connection:
            self._tell(connection, run_id, fence, news)
            if end(connection, FINISH, _held_by(run_id, fence), result, installation=installation) is None:
                raise _lost(run_id, fence)
            reach(Failpoint.FINISH_BEFORE_COMMIT)

    def requeue(self, run_id: str, fence: int, *, why: str, counts: bool = True, news: Sequence[News] = ()) -> Phase:
        installation = self.installation_id()
        held_by = _held_by(run_id, fence)
        with self._db.write() as connection:
            held = connection.execute(_held, held_by).one_or_none()
            if held is None or held.phase not in sources(Phase.QUEUED):
                raise _lost(run_id, fence)
            self._tell(connection, run_id, fence, news)
            verdict = instead_of_another_attempt(lease_view(held), why=why, counts=counts)
            if verdict is not None:
                moved = end(connection, FINISH, held_by, only(verdict), installation=installation)
            else:
                more = {"why": why[:1000]}
                back = held_by | {"b_not_counted": 0 if counts else 1}
                moved = change(connection, REQUEUE, back, installation=installation, more=more)
            if moved is None:
                raise _lost(run_id, fence)
        return moved.phase

    def record_destroyed(self, run_id: str, fence: int) -> bool:
        if not is_run_id(run_id):
            return False
        installation = self.installation_id()
        with self._db.write() as connection:
            row = connection.execute(_destroyed, _held_by(run_id, fence)).one_or_none()
            if row is None:
                return False
            write_phase(
                connection, run_of(row), installation=installation, seq=row.last_seq, fence=fence, at=row.at,
                traceparent=row.traceparent, type_=EventType.DESTROYED,
            )  # fmt: skip
        return True

    def waiting(self, boundaries: Sequence[str]) -> bool:
        if not boundaries:
            return False
        with self._db.read() as connection:
            offered = {"b_boundaries": sorted(set(boundaries))}
            return connection.execute(SOMETHING_TO_CLAIM, offered).one_or_none() is not None

    def leases(self, *, limit: int = 1000) -> Sequence[LeaseView]:
        with self._db.read() as connection:
            rows = list(connection.execute(_overdue, {"b_limit": limit}))
            if len(rows) < limit:
                rows += connection.execute(QUEUED, {"b_limit": limit - len(rows)})
        return [lease_view(row) for row in rows]

    def lease_of(self, run_id: str) -> LeaseView | None:
        if not is_run_id(run_id):
            return None
        with self._db.read() as connection:
            row = connection.execute(_one_view, {"b_run_id": run_id}).one_or_none()
        return None if row is None else lease_view(row)

    def undestroyed(self, site: str, *, limit: int = 1000) -> Sequence[LeaseView]:
        with self._db.read() as connection:
            return [lease_view(row) for row in connection.execute(UNDESTROYED, {"b_site": site, "b_limit": limit})]

    def recover_finish(self, view: LeaseView, verdict: Verdict) -> bool:
        installation = self.installation_id()
        seen = _held_by(view.run_id, view.fence) | {"b_phase": view.phase.value}
        with self._db.write() as connection:
            return end(connection, FINISH_LOST, seen, only(verdict), installation=installation) is not None

    def recover_requeue(self, view: LeaseView) -> bool:
        installation = self.installation_id()
        more = {"why": "the worker was lost while provisioning"}
        with self._db.write() as connection:
            seen = _held_by(view.run_id, view.fence)
            return change(connection, REQUEUE_LOST, seen, installation=installation, more=more) is not None

    def queues_waiting(self, *, older_than: timedelta) -> Sequence[str]:
        with self._db.read() as connection:
            return connection.scalars(_queues_waiting, {"b_older_than": older_than}).all()

    def now(self) -> datetime:
        with self._db.read() as connection:
            at = connection.scalar(_now)
        assert at is not None
        return at

    def _tell(self, connection: sa.Connection, run_id: str, fence: int, news: Sequence[News]) -> None:
        """Nothing is added when the row has moved on: what the same transaction does next says so."""
        if news:
            rows = [_held_by(run_id, fence) | {"b_k": n.k, "b_kind": str(n.kind), "b_data": n.data} for n in news]
            connection.execute(APPEND, rows)

    def _change(self, statement: sa.UpdateBase, run_id: str, fence: int, news: Sequence[News]) -> None:
        installation = self.installation_id()
        with self._db.write() as connection:
            self._tell(connection, run_id, fence, news)
            if change(connection, statement, _held_by(run_id, fence), installation=installation) is None:
                raise _lost(run_id, fence)


def _held_by(run_id: str, fence: int) -> dict[str, Any]:
    return {"b_run_id": run_id, "b_fence": fence}


def _lost(run_id: str, fence: int) -> LeaseLost:
    return LeaseLost(f"fence {fence} of {run_id} may no longer be acted under")


def lease_view(row: sa.Row[Any]) -> LeaseView:
    return LeaseView.model_validate(row._mapping)
