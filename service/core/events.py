"""Facts that leave: CloudEvents 1.0 made in the transaction that makes them true."""

import json
from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Any

from service.core.run import Run

STREAM = "blastdoor:events"
MAX_DATA_BYTES = 20_000
_BUDGET = MAX_DATA_BYTES - 500
"""Under the contract's bound, so that the envelope's own growth never matters."""


class EventType(StrEnum):
    QUEUED = "dev.blastdoor.run.queued"
    PROVISIONING = "dev.blastdoor.run.provisioning"
    RUNNING = "dev.blastdoor.run.running"
    COLLECTING = "dev.blastdoor.run.collecting"
    REQUEUED = "dev.blastdoor.run.requeued"
    FINISHED = "dev.blastdoor.run.finished"
    DESTROYED = "dev.blastdoor.boundary.destroyed"
    QUARANTINED = "dev.blastdoor.boundary.quarantined"


def cloud_event(
    *, event_id: str, installation: str, type_: EventType, run_id: str, tenant: str, sequence: int, at: datetime,
    data: Mapping[str, Any], traceparent: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The envelope. `sequence` counts from 1 within the run; `at` is the database's clock, aware UTC.

    The CloudEvents sequence extension is a string whose order is its order: ten digits, zero-padded.
    """
    event: dict[str, Any] = {
        "specversion": "1.0",
        "id": event_id,
        "source": f"urn:blastdoor:{installation}",
        "type": str(type_),
        "subject": run_id,
        "time": at.isoformat().replace("+00:00", "Z"),
        "datacontenttype": "application/json",
        "tenant": tenant,
        "sequence": f"{sequence:010d}",
        "data": dict(data),
    }
    if traceparent:
        event["traceparent"] = traceparent
    return event


def phase_data(run: Run, *, fence: int) -> dict[str, Any]:
    """`data` of every event but `.finished`: which run, where it stands, and the owner's own metadata."""
    shown = run.model_dump(
        mode="json", include={"id", "tenant", "phase", "outcome", "reason", "attempt", "metadata", "created_at"}
    )
    return shown | {"fence": fence, "boundary": run.placement.boundary}


def finished_data(run: Run) -> dict[str, Any]:
    """`data` of `.finished`: the run without step output, under 20 kB. Lists are cut from the end and counted in
    `omitted`; phase, outcome, reason, usage, evidence and metadata never are."""
    shown = run.model_dump(mode="json")
    for step in shown["steps"]:
        for stream in ("stdout", "stderr"):
            del step[stream]["text"]
    omitted = {"steps": 0, "artifacts": 0, "failures": 0}
    shown["omitted"] = omitted
    shown["message"] = (shown["message"] or "")[:1000] or None
    while json_size(shown) > _BUDGET:
        if failing := [step for step in shown["steps"] if step["failures"]]:
            cut = failing[-1]["failures"]
            omitted["failures"] += len(cut) - len(cut) // 2
            del cut[len(cut) // 2 :]
        elif shown["skipped_artifacts"]:
            omitted["artifacts"] += _halve(shown["skipped_artifacts"])
        elif shown["artifacts"]:
            omitted["artifacts"] += _halve(shown["artifacts"])
        elif shown["steps"]:
            omitted["steps"] += _halve(shown["steps"])
        elif shown["placement"]["rejected"]:
            _halve(shown["placement"]["rejected"])
        else:
            shown["controls"] = {}
            break
    return shown


def _halve(rows: list[Any]) -> int:
    cut = len(rows) - len(rows) // 2
    del rows[len(rows) // 2 :]
    return cut


def json_size(value: Any) -> int:
    """Bytes of the compact UTF-8 JSON."""
    return len(json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode())
