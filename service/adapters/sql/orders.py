"""Operators' plans of clean-up, and their lines as orders to the sites."""

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from service.adapters.sql.engine import db_now
from service.adapters.sql.schema import IS_ORDERED, cleanup, cleanup_action
from service.adapters.sql.transitions import SqlPart
from service.core.boundary import BoundaryRef
from service.core.cleanup import ActionKind, ActionResult, CleanupPlan, Order, PlannedAction
from service.core.errors import NotFound
from service.core.ids import new_id

_plan_id: sa.BindParameter[Any] = sa.bindparam("b_plan_id")
_lines = sa.select(cleanup_action).where(cleanup_action.c.cleanup_id == _plan_id).order_by(cleanup_action.c.n)
_of_plan = cleanup_action.c.cleanup_id == _plan_id
_open = sa.select(sa.literal(1)).where(_of_plan, sa.text(IS_ORDERED)).limit(1)
_done = (
    sa.update(cleanup)
    .where(cleanup.c.id == _plan_id, cleanup.c.applied_at.is_not(None), cleanup.c.done_at.is_(None), ~_open.exists())
    .values(done_at=db_now())
)
# In the words of its index, and with the table's name, since `cleanup` has a done_at, too.
_is_open = sa.text("cleanup_action.ordered AND cleanup_action.done_at IS NULL")
ORDERS = (
    sa.select(cleanup_action, cleanup.c.applied_at)
    .join(cleanup, cleanup.c.id == cleanup_action.c.cleanup_id)
    .where(cleanup_action.c.site == sa.bindparam("b_site"), _is_open)
    .order_by(cleanup_action.c.cleanup_id, cleanup_action.c.n)
)


class SqlOrders(SqlPart):
    def store_plan(self, actions: Sequence[PlannedAction], *, asked_by: str, force: bool) -> CleanupPlan:
        plan_id = new_id("cln")
        rows = [
            {
                "cleanup_id": plan_id, "n": n, "ref": one.ref.model_dump_json(), "site": one.ref.site,
                "action": one.action.value, "why": one.why, "ordered": False,
            }
            for n, one in enumerate(actions, start=1)
        ]  # fmt: skip
        with self._db.write() as connection:
            words = {"id": plan_id, "asked_by": asked_by, "force": force}
            connection.execute(sa.insert(cleanup).values(**words, at=db_now()))
            if rows:
                connection.execute(sa.insert(cleanup_action), rows)
            return _plan(connection, plan_id)

    def get_plan(self, plan_id: str) -> CleanupPlan:
        with self._db.read() as connection:
            return _plan(connection, plan_id)

    def apply_plan(self, plan_id: str) -> CleanupPlan:
        apply = sa.update(cleanup).where(cleanup.c.id == plan_id, cleanup.c.applied_at.is_(None))
        refuse = cleanup_action.c.action == ActionKind.REFUSE.value
        lines = sa.update(cleanup_action).where(cleanup_action.c.cleanup_id == plan_id)
        with self._db.write() as connection:
            if "\0" in plan_id:
                raise NotFound
            if connection.execute(apply.values(applied_at=db_now())).rowcount == 1:
                connection.execute(lines.where(~refuse).values(ordered=True))
                connection.execute(lines.where(refuse).values(result=ActionResult.REFUSED.value, done_at=db_now()))
                connection.execute(_done, {"b_plan_id": plan_id})
            return _plan(connection, plan_id)

    def orders(self, site: str) -> Sequence[Order]:
        with self._db.read() as connection:
            return [
                Order(
                    plan_id=row.cleanup_id, n=row.n, ref=BoundaryRef.model_validate_json(row.ref),
                    action=ActionKind(row.action), at=row.applied_at,
                )
                for row in connection.execute(ORDERS, {"b_site": site})
            ]  # fmt: skip

    def conclude_order(self, plan_id: str, n: int, result: str) -> bool:
        line = sa.update(cleanup_action).where(
            cleanup_action.c.cleanup_id == plan_id, cleanup_action.c.n == n, sa.text(IS_ORDERED)
        )
        with self._db.write() as connection:
            # Two sites that conclude the last two lines at once would each still see the other's open.
            connection.execute(sa.select(cleanup.c.id).where(cleanup.c.id == plan_id).with_for_update())
            concluded = connection.execute(line.values(result=result, done_at=db_now())).rowcount == 1
            connection.execute(_done, {"b_plan_id": plan_id})
        return concluded


def _plan(connection: sa.Connection, plan_id: str) -> CleanupPlan:
    row = None
    if "\0" not in plan_id:
        row = connection.execute(sa.select(cleanup).where(cleanup.c.id == plan_id)).one_or_none()
    if row is None:
        raise NotFound
    actions = tuple(
        PlannedAction(
            ref=BoundaryRef.model_validate_json(line.ref), action=ActionKind(line.action), why=line.why,
            result=line.result,
        )
        for line in connection.execute(_lines, {"b_plan_id": plan_id})
    )  # fmt: skip
    return CleanupPlan(
        id=row.id, asked_by=row.asked_by, at=row.at, force=row.force, actions=actions, applied_at=row.applied_at,
        done_at=row.done_at,
    )  # fmt: skip
