"""Runs as their owners see them: submit, read, list, cancel, delete."""

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from service.adapters.sql.documents import (
    AHEAD,
    LISTED,
    RANKS,
    SHOWN,
    bundle_text,
    head_text,
    is_run_id,
    run_of,
    scenario_text,
)
from service.adapters.sql.engine import db_now
from service.adapters.sql.events import write_phase
from service.adapters.sql.idempotency import complete
from service.adapters.sql.keeping import insist_on_room, unshared
from service.adapters.sql.schema import IS_QUEUED, run, run_input, tenant
from service.adapters.sql.transitions import SqlPart, cancel_queued, use_blobs
from service.core.boundary import Bundle
from service.core.errors import Conflict, NotFound, QuotaExceeded
from service.core.events import EventType
from service.core.failpoints import Failpoint, reach
from service.core.ports.runs import Page
from service.core.run import Outcome, Phase, Run
from service.core.scenario import Scenario

_run_id: sa.BindParameter[Any] = sa.bindparam("b_run_id")
_tenant: sa.BindParameter[Any] = sa.bindparam("b_tenant")
_live_tenant = sa.select(tenant.c.name).where(tenant.c.name == _tenant, tenant.c.deleted_at.is_(None))
_lock_tenant = _live_tenant.with_for_update(key_share=True)
_lock_run = sa.select(run.c.tenant, run.c.phase).where(run.c.id == _run_id).with_for_update()
_waiting = sa.select(sa.literal(1)).select_from(run).where(sa.text(IS_QUEUED))
_of_tenant = _waiting.where(run.c.tenant == _tenant).limit(sa.bindparam("b_most")).subquery()
_ahead = _waiting.where(run.c.boundary == sa.bindparam("b_boundary"), run.c.id < _run_id).subquery()
_queue = sa.select(
    sa.select(sa.func.count()).select_from(_of_tenant).scalar_subquery().label("own"),
    sa.select(sa.func.count()).select_from(_ahead).scalar_subquery().label("ahead"),
    db_now().label("at"),
)
_insert_run = sa.insert(run)
_insert_input = sa.insert(run_input)
_one = SHOWN.where(run.c.id == _run_id)
_mark_cancelled = (
    sa.update(run)
    .where(run.c.id == _run_id)
    .values(cancel_requested_by=sa.func.coalesce(run.c.cancel_requested_by, sa.bindparam("b_by")))
)
_not_internal = sa.func.substr(run.c.tenant, 1, 1) != "_"


class SqlRuns(SqlPart):
    def submit(
        self, run: Run, scenario: Scenario, bundle: Bundle | None, *, max_queued: int,
        idempotency: tuple[str, str, str] | None = None, max_stored: int | None = None, traceparent: str | None = None,
    ) -> Run:  # fmt: skip
        installation = self.installation_id()
        boundary = run.placement.queue
        question = {"b_tenant": run.tenant, "b_most": max_queued, "b_boundary": boundary, "b_run_id": run.id}
        with self._db.write() as connection:
            # The tenant's row is locked first, and counted in a statement of its own: in PostgreSQL a statement sees
            # what was committed when it began, so a count taken with the lock could miss whom it waited for.
            if connection.execute(_lock_tenant, {"b_tenant": run.tenant}).one_or_none() is None:
                raise NotFound
            queue = connection.execute(_queue, question).one()
            if queue.own >= max_queued:
                raise QuotaExceeded(f"{max_queued} runs of tenant {run.tenant} are waiting already")
            if bundle is not None and max_stored is not None:
                insist_on_room(connection, run.tenant, bundle, max_stored=max_stored)
            fresh = {
                "phase": Phase.QUEUED, "outcome": None, "reason": None, "attempt": 0, "created_at": queue.at,
                "queue_position": queue.ahead + 1,
            }  # fmt: skip
            stored = run.model_copy(update=fresh)
            row = {
                "id": run.id, "tenant": run.tenant, "boundary": boundary, "runtime": scenario.runtime,
                "phase": Phase.QUEUED.value, "attempt": 0, "fence": 0, "destroyed_fence": 0, "last_seq": 1,
                "phase_seq": 1,
                "created_at": queue.at, "queued_at": queue.at, "head": head_text(run),
                "traceparent": traceparent,
            }  # fmt: skip
            connection.execute(_insert_run, row)
            brought = {"run_id": run.id, "scenario": scenario_text(scenario), "bundle": bundle_text(bundle)}
            connection.execute(_insert_input, brought)
            if bundle is not None:
                use_blobs(connection, stored, {bundle.digest: bundle.bytes_})
            write_phase(
                connection, stored, installation=installation, seq=1, fence=0, at=queue.at, type_=EventType.QUEUED,
                traceparent=traceparent,
            )  # fmt: skip
            if idempotency is not None:
                key, token, content_digest = idempotency
                complete(connection, stored, key=key, token=token, content_digest=content_digest)
            reach(Failpoint.SUBMIT_BEFORE_COMMIT)
        return stored

    def get_run(self, run_id: str, tenant: str | None) -> Run:
        if not is_run_id(run_id):
            raise NotFound
        with self._db.read() as connection:
            row = connection.execute(_one, {"b_run_id": run_id}).one_or_none()
        if row is None or tenant not in (None, row.tenant):
            raise NotFound
        return run_of(row)

    def list_runs(
        self, tenant: str | None, *, phase: Phase | None, outcome: Outcome | None, limit: int, before: str | None
    ) -> Page:
        wanted = LISTED.where(_not_internal).order_by(run.c.id.desc()).limit(limit + 1)
        if tenant is not None:
            wanted = wanted.where(run.c.tenant == tenant)
        if phase is not None:
            wanted = wanted.where(run.c.phase == phase.value)
        if outcome is not None:
            wanted = wanted.where(run.c.outcome == outcome.value)
        if before is not None:
            wanted = wanted.where(run.c.id < before)
        with self._db.read() as connection:
            rows = connection.execute(wanted).all()
            positions = _positions(connection, rows[:limit])
        items = tuple(run_of(row, queue_position=positions.get(row.id)) for row in rows[:limit])
        return Page(items=items, next_before=items[-1].id if items and len(rows) > limit else None)

    def request_cancel(self, run_id: str, tenant: str | None, *, by: str) -> Run:
        installation = self.installation_id()
        with self._db.write() as connection:
            phase = _locked(connection, run_id, tenant)
            if phase is Phase.QUEUED:
                cancel_queued(connection, run_id, by=by, installation=installation)
            elif phase is not Phase.FINISHED:
                connection.execute(_mark_cancelled, {"b_run_id": run_id, "b_by": by})
            return run_of(connection.execute(_one, {"b_run_id": run_id}).one())

    def delete_run(self, run_id: str, tenant: str | None) -> tuple[str, ...]:
        with self._db.write() as connection:
            owner = _owner(connection, run_id, tenant)
            # As in `submit`: a run of the same tenant that is being stored now may use the same blob.
            connection.execute(_lock_tenant, {"b_tenant": owner})
            if _locked(connection, run_id, tenant) is not Phase.FINISHED:
                raise Conflict("only a finished run can be deleted", code="not_finished")
            digests = unshared(connection, run_id)
            connection.execute(sa.delete(run).where(run.c.id == run_id))
        return digests


def _positions(connection: sa.Connection, rows: Sequence[sa.Row[Any]]) -> dict[str, int]:
    """Where the queued ones among the rows stand; one that was claimed since the rows were read has no place."""
    queued = [row for row in rows if row.phase == Phase.QUEUED.value]
    if not queued:
        return {}
    ids = [row.id for row in queued]
    asked = {"b_boundaries": sorted({row.boundary for row in queued}), "b_oldest": min(ids)}
    ahead = {row.boundary: row.runs for row in connection.execute(AHEAD, asked)}
    ranks = connection.execute(RANKS, asked | {"b_newest": max(ids), "b_run_ids": ids})
    return {row.id: ahead.get(row.boundary, 0) + row.rank for row in ranks}


def _owner(connection: sa.Connection, run_id: str, tenant: str | None) -> str:
    owner = connection.scalar(sa.select(run.c.tenant).where(run.c.id == run_id)) if is_run_id(run_id) else None
    if owner is None or tenant not in (None, owner):
        raise NotFound
    return str(owner)


def _locked(connection: sa.Connection, run_id: str, tenant: str | None) -> Phase:
    """-> the phase, which nobody changes until this transaction ends. Raises NotFound."""
    row = connection.execute(_lock_run, {"b_run_id": run_id}).one_or_none() if is_run_id(run_id) else None
    if row is None or tenant not in (None, row.tenant):
        raise NotFound
    return Phase(row.phase)
