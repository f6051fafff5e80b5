"""Who did what: committed before the act, and again with its result."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from service.adapters.sql.documents import compact
from service.adapters.sql.engine import db_now
from service.adapters.sql.schema import audit
from service.adapters.sql.transitions import SqlPart
from service.core.custody import AuditEntry
from service.core.ids import new_id


class SqlAudit(SqlPart):
    def begin_act(self, *, who: str, what: str, target: str, detail: Mapping[str, Any]) -> str:
        entry_id = new_id("aud")
        # A target may be what somebody wrote in a path; PostgreSQL's text takes no NUL.
        words = {
            "id": entry_id,
            "who": who,
            "what": what,
            "target": target.replace("\0", "\\0"),
            "detail": compact(dict(detail)),
        }
        with self._db.write() as connection:
            connection.execute(sa.insert(audit).values(**words, at=db_now()))
        return entry_id

    def end_act(self, entry_id: str, result: str) -> None:
        end = sa.update(audit).where(audit.c.id == entry_id, audit.c.result.is_(None)).values(result=result)
        with self._db.write() as connection:
            connection.execute(end)

    def list_acts(self, *, limit: int, before: str | None) -> tuple[Sequence[AuditEntry], str | None]:
        wanted = sa.select(audit).order_by(audit.c.id.desc()).limit(limit + 1)
        if before is not None:
            wanted = wanted.where(audit.c.id < before)
        with self._db.read() as connection:
            rows = connection.execute(wanted).all()
        entries = [
            AuditEntry(
                id=row.id, at=row.at, who=row.who, what=row.what, target=row.target, detail=json.loads(row.detail),
                result=row.result,
            )
            for row in rows[:limit]
        ]  # fmt: skip
        return entries, entries[-1].id if len(rows) > limit else None
