"""Facts that leave: CloudEvents 1.0 made in the transaction that makes them true."""

import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from enum import StrEnum
from typing import Any

from service.core.run import Run, StepResult

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


OF_PHASES = frozenset(type_ for type_ in EventType if type_.startswith("dev.blastdoor.run."))
"""Each brings its run to a phase; the others are of its boundary."""


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
    `omitted`; phase, outcome, reason, usage, evidence and metadata never are.

    What there is room for goes in by this order: steps, artifacts, skipped artifacts, the steps' failures. Nothing is
    turned into JSON that does not go in, or this would take longer than the run.
    """
    shown = run.model_dump(mode="json", exclude={"steps", "artifacts", "skipped_artifacts"})
    shown["message"] = (shown["message"] or "")[:1000] or None
    omitted = {"steps": 0, "artifacts": 0, "failures": 0}
    shown |= {"steps": [], "artifacts": [], "skipped_artifacts": [], "omitted": omitted}
    if json_size(shown) > _BUDGET:
        shown["placement"]["rejected"] = []
    if json_size(shown) > _BUDGET:
        shown["controls"] = {}
    left = _BUDGET - json_size(shown)
    left, omitted["steps"] = _fill(shown["steps"], (_shown_step(step) for step in run.steps), len(run.steps), left)
    for name in ("artifacts", "skipped_artifacts"):
        found = getattr(run, name)
        left, cut = _fill(shown[name], (row.model_dump(mode="json") for row in found), len(found), left)
        omitted["artifacts"] += cut
    for step, row in zip(run.steps, shown["steps"], strict=False):
        found = (failure.model_dump(mode="json") for failure in step.failures)
        left, cut = _fill(row["failures"], found, len(step.failures), left)
        omitted["failures"] += cut
    omitted["failures"] += sum(len(step.failures) for step in run.steps[len(shown["steps"]) :])
    return shown


def _shown_step(step: StepResult) -> dict[str, Any]:
    """Without output, and its failures not yet in."""
    return step.model_dump(mode="json", exclude={"stdout": {"text"}, "stderr": {"text"}, "failures": True}) | {
        "failures": []
    }


def _fill(rows: list[Any], more: Iterable[Any], count: int, left: int) -> tuple[int, int]:
    """Put in rows from the front while there is room. -> (bytes left, how many of `count` were left out); once one did
    not fit there is no room for anything else."""
    for row in more:
        size = json_size(row) + 1
        if size > left:
            return 0, count - len(rows)
        rows.append(row)
        left -= size
    return left, 0


def json_size(value: Any) -> int:
    """Bytes of the compact UTF-8 JSON."""
    return len(json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode())
