"""Moving a run from one phase to the next: the guarded UPDATE and its event, always together.

What may follow what is said once, in `service.core.run.NEXT`; the guards below are made from it.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import sqlalchemy as sa

from service.adapters.sql.documents import CHANGED, run_of
from service.adapters.sql.engine import Database, Span, db_now
from service.adapters.sql.events import write_phase
from service.adapters.sql.schema import IS_ACTIVE, installation, run, run_blob, run_news, run_result
from service.core.errors import Unavailable
from service.core.lease import cancelled
from service.core.news import NewsKind
from service.core.run import ACTIVE, NEXT, Phase, Result, Run, Verdict


class SqlPart:
    """One noun's share of the store. All shares use the same database."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._installation: str | None = None

    def installation_id(self) -> str:
        """Random, made with the database, safe in DNS names and labels. Raises Unavailable before the migration."""
        if self._installation is None:
            with self._db.read() as connection:
                self._installation = connection.scalar(sa.select(installation.c.id))
        if self._installation is None:
            raise Unavailable("the database has not been migrated")
        return self._installation


def sources(to: Phase, *, among: Iterable[Phase] = Phase) -> list[str]:
    """The phases that a run may come from, as the database spells them."""
    return [str(phase) for phase in among if to in NEXT[phase]]


_now = db_now()
_run_id: sa.BindParameter[Any] = sa.bindparam("b_run_id")
_fence: sa.BindParameter[Any] = sa.bindparam("b_fence")
_holds = (run.c.id == _run_id, run.c.fence == _fence)
_lease_lives = run.c.lease_until >= _now
_lease_ended = run.c.lease_until < _now
_let_go: Mapping[str, Any] = {"lease_until": None, "lease_owner": None}
_next_seq = {"last_seq": run.c.last_seq + 1, "phase_seq": run.c.last_seq + 1}
_ended = {
    "phase": Phase.FINISHED.value,
    "finished_at": _now,
    "outcome": sa.bindparam("b_outcome"),
    "reason": sa.bindparam("b_reason"),
    **_let_go,
    **_next_seq,
}

TO_RUNNING = (
    sa.update(run)
    .where(*_holds, run.c.phase.in_(sources(Phase.RUNNING)), _lease_lives)
    .values(phase=Phase.RUNNING.value, started_at=_now, **_next_seq)
    .returning(*CHANGED)
)
TO_COLLECTING = (
    sa.update(run)
    .where(*_holds, run.c.phase.in_(sources(Phase.COLLECTING)), _lease_lives)
    .values(phase=Phase.COLLECTING.value, **_next_seq)
    .returning(*CHANGED)
)
_to_queued = sa.update(run).values(phase=Phase.QUEUED.value, queued_at=_now, **_let_go, **_next_seq).returning(*CHANGED)
REQUEUE = _to_queued.where(*_holds, run.c.phase.in_(sources(Phase.QUEUED)), _lease_lives).values(
    attempt=run.c.attempt - sa.bindparam("b_not_counted")
)
REQUEUE_LOST = _to_queued.where(
    *_holds, run.c.phase.in_(sources(Phase.QUEUED)), _lease_ended, run.c.cancel_requested_by.is_(None)
)
FINISH = (
    sa.update(run)
    .where(*_holds, run.c.phase.in_(sources(Phase.FINISHED, among=ACTIVE)), _lease_lives)
    .values(_ended)
    .returning(*CHANGED)
)
"""The worker's own end of its run."""
FINISH_LOST = (
    sa.update(run)
    .where(
        *_holds,
        run.c.phase == sa.bindparam("b_phase"),
        run.c.phase.in_(sources(Phase.FINISHED)),
        sa.or_(run.c.lease_until.is_(None), _lease_ended),
    )
    .values(_ended)
    .returning(*CHANGED)
)
"""The reconciler's end of a run that nobody acts on."""
FINISH_QUEUED = (
    sa.update(run).where(run.c.id == _run_id, run.c.phase == Phase.QUEUED.value).values(_ended).returning(*CHANGED)
)
HEARTBEAT = (
    sa.update(run)
    .where(*_holds, sa.text(IS_ACTIVE), _lease_lives)
    .values(lease_until=_now + sa.bindparam("b_lease", type_=Span()))
    .returning(run.c.cancel_requested_by)
)
LOOK = sa.select(run.c.cancel_requested_by).where(*_holds, sa.text(IS_ACTIVE), _lease_lives)
_told = sa.select(
    run.c.id,
    run.c.phase_seq,
    sa.bindparam("b_k", type_=sa.Integer()),
    sa.bindparam("b_kind", type_=sa.Text()),
    sa.bindparam("b_data", type_=sa.Text()),
).where(*_holds, sa.text(IS_ACTIVE), _lease_lives)
_columns = ["run_id", "seq", "k", "kind", "data"]
# What is there already is left as it is: the answer to a write that was made may have been lost. As a suffix of the
# SELECT, because SQLAlchemy compiles the dialects' own `on_conflict_do_nothing` anew each time: 1 ms of every change.
APPEND = sa.insert(run_news).from_select(_columns, _told.suffix_with("ON CONFLICT DO NOTHING"))

_live_bytes = (
    sa.select(run_news.c.run_id, sa.literal("live:") + run_news.c.run_id, sa.bindparam("b_tenant", type_=sa.Text()),
              sa.func.sum(sa.func.length(run_news.c.data)))
    .where(run_news.c.run_id == _run_id, run_news.c.kind == str(NewsKind.OUTPUT))
    .group_by(run_news.c.run_id)
)  # fmt: skip
# What was told live is kept as long as the blobs are, and counts as one: no guest fills the database for nothing.
_count_live = sa.insert(run_blob).from_select(["run_id", "digest", "tenant", "bytes"], _live_bytes)
_insert_result = sa.insert(run_result)
_insert_blobs = sa.insert(run_blob)


def change(
    connection: sa.Connection, statement: sa.UpdateBase, parameters: Mapping[str, Any], *, installation: str,
    more: Mapping[str, Any] | None = None,
) -> Run | None:  # fmt: skip
    """Run one of the guarded updates and write its event. -> None when the row has moved on: nothing was written."""
    row = connection.execute(statement, dict(parameters)).one_or_none()
    if row is None:
        return None
    moved = run_of(row)
    write_phase(
        connection, moved, installation=installation, seq=row.last_seq, fence=row.fence, at=row.at,
        traceparent=row.traceparent, more=more,
    )  # fmt: skip
    return moved


def end(
    connection: sa.Connection, statement: sa.UpdateBase, parameters: Mapping[str, Any], result: Result, *,
    installation: str,
) -> Run | None:  # fmt: skip
    """As `change`, for the last change of all: the result and what it uses of the blobs are kept with it."""
    verdict = result.verdict
    words = {"b_outcome": verdict.outcome.value, "b_reason": None if verdict.reason is None else verdict.reason.value}
    row = connection.execute(statement, dict(parameters) | words).one_or_none()
    if row is None:
        return None
    finished = run_of(row, result=result)
    connection.execute(_insert_result, {"run_id": finished.id, "result": result.model_dump_json()})
    use_blobs(connection, finished, result.blobs())
    connection.execute(_count_live, {"b_run_id": finished.id, "b_tenant": finished.tenant})
    write_phase(
        connection, finished, installation=installation, seq=row.last_seq, fence=row.fence, at=row.at,
        traceparent=row.traceparent,
    )  # fmt: skip
    return finished


def cancel_queued(connection: sa.Connection, run_id: str, *, by: str, installation: str) -> Run | None:
    """End a run that nobody has claimed. -> None when it is no longer queued."""
    return end(connection, FINISH_QUEUED, {"b_run_id": run_id}, only(cancelled(by)), installation=installation)


def only(verdict: Verdict) -> Result:
    """The result of a run that observed nothing."""
    return Result(verdict=verdict)


def use_blobs(connection: sa.Connection, of: Run, sizes: Mapping[str, int]) -> None:
    """Note what a run uses; the bundle it brought may come back as an artifact, and is noted already."""
    brought = {of.bundle.digest} if of.bundle is not None and of.phase is Phase.FINISHED else frozenset[str]()
    rows = [
        {"run_id": of.id, "digest": digest, "tenant": of.tenant, "bytes": sizes[digest]}
        for digest in sorted(sizes.keys() - brought)
    ]
    if rows:
        connection.execute(_insert_blobs, rows)
