"""Whose turn it is: the tenant with the fewest active runs below its own cap, then the one served longest ago."""

from typing import Any

import sqlalchemy as sa

from service.adapters.sql.schema import indexed_by, run, tenant
from service.core.run import ACTIVE, Phase

_NEVER: sa.ColumnElement[Any] = sa.literal_column("0")
_ACTIVE = ", ".join(f"'{phase}'" for phase in sorted(ACTIVE))
_CLAIMS = 0x626C617374  # a number that nobody else locks in this database


def serialised(connection: sa.Connection) -> None:
    """Let one claim at a time choose.

    In PostgreSQL two claims at once would both see the tenant below its cap, since neither sees what the other has not
    committed. The lock is a statement of its own: the next one sees what was committed by then. It ends with the
    transaction. SQLite has one writer anyway.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_CLAIMS)))


def _fairest(*, any_runtime: bool) -> sa.Select[tuple[str]]:
    """The id of the run to claim, or no row, for `b_boundaries` and `b_runtimes`. Where any runtime will do, only
    whether there is one is asked: the row is some run of the tenant whose turn it is."""
    mine, next_, own = run.alias("mine"), run.alias("next_"), run.alias("own")

    def claimable(row: sa.FromClause) -> list[sa.ColumnElement[bool]]:
        # The first two in the words of the index `ix_run_claimable`, or it is not used.
        conditions: list[sa.ColumnElement[bool]] = [
            row.c.phase == sa.literal_column(f"'{Phase.QUEUED}'"),
            row.c.fence == row.c.destroyed_fence,  # every earlier boundary of this run is known to be gone
            row.c.boundary.in_(sa.bindparam("b_boundaries", expanding=True)),
        ]
        offered = row.c.runtime.in_(sa.bindparam("b_runtimes", expanding=True))
        return conditions if any_runtime else [*conditions, offered]

    # The tenants that have something to claim, each found by one probe of the index, however many runs they have.
    first = sa.select(next_.c.tenant).where(*claimable(next_)).order_by(next_.c.tenant).limit(1)
    first = first.with_hint(next_, indexed_by("ix_run_claimable"), "sqlite")
    waiting = sa.select(first.scalar_subquery().label("name")).cte("waiting", recursive=True)
    following = first.where(next_.c.tenant > waiting.c.name).correlate(waiting).scalar_subquery()
    waiting = waiting.union_all(sa.select(following).where(waiting.c.name.is_not(None)))
    active = (
        sa.select(sa.func.count())
        .select_from(own)
        .where(own.c.tenant == tenant.c.name, own.c.phase.in_(sa.text(_ACTIVE)))
        .scalar_subquery()
    )
    candidate = (
        sa.select(tenant.c.name, tenant.c.concurrent, tenant.c.last_served, active.label("active"))
        .join_from(waiting, tenant, tenant.c.name == waiting.c.name)
        .subquery("candidate")
    )
    turn = (
        sa.select(candidate.c.name)
        .where(candidate.c.active < candidate.c.concurrent)
        .order_by(candidate.c.active, sa.func.coalesce(candidate.c.last_served, _NEVER), candidate.c.name)
        .limit(1)
    )
    of_turn = sa.select(mine.c.id).where(*claimable(mine), mine.c.tenant == turn.scalar_subquery())
    of_turn = of_turn.limit(1).with_hint(mine, indexed_by("ix_run_claimable"), "sqlite")
    return of_turn if any_runtime else of_turn.order_by(mine.c.id)


# SKIP LOCKED: in PostgreSQL a run that is being cancelled this moment is passed over, not waited for.
FAIREST = _fairest(any_runtime=False).with_for_update(skip_locked=True)
SOMETHING_TO_CLAIM = _fairest(any_runtime=True)
