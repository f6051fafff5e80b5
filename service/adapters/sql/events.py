"""Events, written in the transaction that makes them true."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from service.adapters.sql.documents import compact
from service.adapters.sql.schema import outbox, tenant, webhook_endpoint
from service.core.events import EventType, cloud_event, finished_data, phase_data
from service.core.ids import new_id
from service.core.run import Phase, Run

_EVENT_OF = {
    Phase.PROVISIONING: EventType.PROVISIONING,
    Phase.RUNNING: EventType.RUNNING,
    Phase.COLLECTING: EventType.COLLECTING,
    Phase.QUEUED: EventType.REQUEUED,
    Phase.FINISHED: EventType.FINISHED,
}
_service = sa.select(tenant.c.service_id).where(tenant.c.name == sa.bindparam("b_of")).scalar_subquery()
# Of named columns alone: who tells of runs may not see where webhooks go, nor their secrets (`roles.py`).
_wanted = sa.exists(sa.literal_column("1")).where(
    webhook_endpoint.c.enabled,
    sa.or_(webhook_endpoint.c.tenant == sa.bindparam("b_of"), webhook_endpoint.c.service_id == _service),
)
# Where nobody has a webhook there is nothing to fan out, and nothing more to write.
_insert = sa.insert(outbox).values(fanned=~_wanted)


def write_phase(
    connection: sa.Connection, run: Run, *, installation: str, seq: int, fence: int, at: datetime,
    traceparent: str | None, type_: EventType | None = None, more: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """The event of the phase that the run is now in; `type_` where the phase does not say it (queued, destroyed)."""
    type_ = type_ or _EVENT_OF[run.phase]
    terminal = type_ is EventType.FINISHED
    said = finished_data(run) if terminal else phase_data(run, fence=fence) | dict(more or {})
    event_id = new_id("evt")
    event = cloud_event(
        event_id=event_id, installation=installation, type_=type_, run_id=run.id, tenant=run.tenant, sequence=seq,
        at=at, data=said, traceparent=traceparent,
    )  # fmt: skip
    row = {
        "event_id": event_id,
        "run_id": run.id,
        "seq": seq,
        "tenant": run.tenant,
        "internal": run.tenant.startswith("_"),
        "type": str(type_),
        "terminal": terminal,
        "event": compact(event),
        "created_at": at,
        "published": False,
        "b_of": run.tenant,
    }
    connection.execute(_insert, row)
