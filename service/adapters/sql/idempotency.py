"""Idempotency keys: taken before the upload is read, completed in the transaction that stores the run."""

import json
from datetime import timedelta

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from service.adapters.sql.documents import compact
from service.adapters.sql.engine import db_now
from service.adapters.sql.schema import idempotency
from service.adapters.sql.transitions import SqlPart
from service.core.errors import IdempotencyInFlight
from service.core.ids import new_id
from service.core.ports.runs import IdempotencyClaim
from service.core.run import Run

KEPT = timedelta(hours=24)
_IN_FLIGHT = "a request with this Idempotency-Key is still being answered"
_own = (idempotency.c.tenant == sa.bindparam("b_tenant"), idempotency.c.key == sa.bindparam("b_key"))
_held = sa.select(idempotency).where(*_own)
_complete = (
    sa.update(idempotency)
    .where(*_own, idempotency.c.token == sa.bindparam("b_token"), idempotency.c.answer.is_(None))
    .values(content_digest=sa.bindparam("b_content_digest"), answer=sa.bindparam("b_answer"))
)
_release = sa.delete(idempotency).where(
    *_own, idempotency.c.token == sa.bindparam("b_token"), idempotency.c.answer.is_(None)
)


class SqlIdempotency(SqlPart):
    def begin_idempotent(self, tenant: str, key: str, *, stale_after: timedelta) -> IdempotencyClaim:
        token = new_id("idem")
        insert = sqlite.insert if self._db.is_sqlite else postgresql.insert
        fresh = {"token": token, "taken_at": db_now(), "content_digest": None, "answer": None}
        abandoned = sa.and_(idempotency.c.answer.is_(None), idempotency.c.taken_at < db_now() - stale_after)
        expired = idempotency.c.taken_at < db_now() - KEPT
        take = (
            insert(idempotency)
            .values(tenant=tenant, key=key, **fresh)
            .on_conflict_do_update(index_elements=["tenant", "key"], set_=fresh, where=sa.or_(abandoned, expired))
            .returning(idempotency.c.token)
        )
        with self._db.write() as connection:
            if connection.execute(take).one_or_none() is not None:
                return IdempotencyClaim(token=token)
            held = connection.execute(_held, {"b_tenant": tenant, "b_key": key}).one_or_none()
        if held is None or held.answer is None:  # None: released a moment ago, and the caller's next try will have it
            raise IdempotencyInFlight(_IN_FLIGHT)
        return IdempotencyClaim(token=held.token, content_digest=held.content_digest, answer=json.loads(held.answer))

    def release_idempotent(self, tenant: str, key: str, token: str) -> None:
        with self._db.write() as connection:
            connection.execute(_release, {"b_tenant": tenant, "b_key": key, "b_token": token})


def complete(connection: sa.Connection, run: Run, *, key: str, token: str, content_digest: str) -> None:
    """Keep the first answer. Raises IdempotencyInFlight when the key went to another caller meanwhile, which undoes the
    transaction that this is part of."""
    answer = compact(run.model_dump(mode="json"))
    words = {
        "b_tenant": run.tenant, "b_key": key, "b_token": token, "b_content_digest": content_digest, "b_answer": answer,
    }  # fmt: skip
    if connection.execute(_complete, words).rowcount != 1:
        raise IdempotencyInFlight(_IN_FLIGHT)
