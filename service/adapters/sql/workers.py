"""Which workers live, and what each can build: all that the API knows of the world."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from pydantic import TypeAdapter
from sqlalchemy.dialects import postgresql, sqlite

from service.adapters.sql.engine import db_now
from service.adapters.sql.schema import worker
from service.adapters.sql.transitions import SqlPart
from service.core.boundary import Capabilities
from service.core.ports.tenants import WorkerRecord

_CAPABILITIES = TypeAdapter(tuple[Capabilities, ...])


class SqlWorkers(SqlPart):
    def record_worker(self, worker: WorkerRecord) -> None:
        insert = sqlite.insert if self._db.is_sqlite else postgresql.insert
        said = {
            "host": worker.host,
            "site": worker.site,
            "capabilities": _CAPABILITIES.dump_json(worker.capabilities).decode(),
            "slots": worker.slots,
            "measured_at": db_now(),
        }
        record = insert(_WORKER).values(id=worker.id, **said)
        with self._db.write() as connection:
            connection.execute(record.on_conflict_do_update(index_elements=["id"], set_=said))

    def forget_worker(self, worker_id: str) -> None:
        with self._db.write() as connection:
            connection.execute(sa.delete(worker).where(worker.c.id == worker_id))

    def get_worker(self, worker_id: str) -> WorkerRecord | None:
        with self._db.read() as connection:
            row = connection.execute(sa.select(worker).where(worker.c.id == worker_id)).one_or_none()
        return None if row is None else worker_record(row)

    def live_workers(self, *, fresh: timedelta) -> Sequence[WorkerRecord]:
        with self._db.read() as connection:
            return [worker_record(row) for row in connection.execute(live(fresh=fresh))]


def live(*, fresh: timedelta) -> sa.Select[Any]:
    return sa.select(worker).where(worker.c.measured_at > db_now() - fresh).order_by(worker.c.id)


def worker_record(row: sa.Row[Any]) -> WorkerRecord:
    return WorkerRecord(
        id=row.id,
        host=row.host,
        site=row.site,
        capabilities=_CAPABILITIES.validate_json(row.capabilities),
        slots=row.slots,
        draining=row.draining,
        measured_at=row.measured_at,
    )


_WORKER = worker  # where an argument has the table's name
