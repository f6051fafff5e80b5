"""What is kept as JSON text, and how a row becomes a `Run` again."""

import json
import re
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict

from service.adapters.sql.engine import db_now
from service.adapters.sql.schema import IS_QUEUED, run, run_result
from service.core.boundary import Bundle
from service.core.controls import AppliedControls
from service.core.ids import RUN_ID_PATTERN
from service.core.placement import Placement
from service.core.run import BundleSummary, Metadata, Outcome, Phase, Reason, Result, Run, ScenarioSummary
from service.core.scenario import Scenario

_RUN_ID = re.compile(RUN_ID_PATTERN, re.ASCII)


class Head(BaseModel):
    """What was said at submission and never changes."""

    model_config = ConfigDict(frozen=True)

    metadata: Metadata
    scenario: ScenarioSummary
    bundle: BundleSummary | None
    controls: AppliedControls
    placement: Placement


_ahead = run.alias("ahead")
QUEUE_POSITION = (
    sa.case(
        (
            run.c.phase == "queued",
            sa.select(sa.func.count() + 1)
            .where(sa.text("ahead.phase = 'queued'"), _ahead.c.boundary == run.c.boundary, _ahead.c.id < run.c.id)
            .select_from(_ahead)
            .correlate(run)
            .scalar_subquery(),
        ),
        else_=sa.null(),
    )
).label("queue_position")

_stored = run.outerjoin(run_result)
SHOWN = sa.select(run, run_result.c.result, QUEUE_POSITION).select_from(_stored)
"""A run as its owner sees it. `queue_position` counts the older runs that wait for the same boundary, whoever owns
them: fairness between tenants may serve one sooner, so it is where a run stands, not a promise."""

LISTED = sa.select(run, run_result.c.result).select_from(_stored)
"""Many runs: their places in the queue come from `AHEAD` and `RANKS`, which count each queue once and not once for each
run."""

_waits = (sa.text(IS_QUEUED), run.c.boundary.in_(sa.bindparam("b_boundaries", expanding=True)))
AHEAD = (
    sa.select(run.c.boundary, sa.func.count().label("runs"))
    .where(*_waits, run.c.id < sa.bindparam("b_oldest"))
    .group_by(run.c.boundary)
)
"""How long each queue is before the oldest of the runs. Counting is a tenth of the work of numbering."""
_ranked = (
    sa.select(
        run.c.id, run.c.boundary,
        sa.func.row_number().over(partition_by=run.c.boundary, order_by=run.c.id).label("rank"),
    )
    .where(*_waits, run.c.id >= sa.bindparam("b_oldest"), run.c.id <= sa.bindparam("b_newest"))
    .subquery("ranked")
)  # fmt: skip
RANKS = sa.select(_ranked).where(_ranked.c.id.in_(sa.bindparam("b_run_ids", expanding=True)))
"""The places of the runs from the oldest of them on, from 1, each in its queue."""

CHANGED = (*run.c, db_now().label("at"))
"""What a changed row returns: itself, and the instant of the change."""


def head_text(value: Run) -> str:
    return Head.model_validate(value, from_attributes=True).model_dump_json()


def scenario_text(value: Scenario) -> str:
    """Only what its author wrote, since `json: null` and no `json` are different expectations."""
    return value.model_dump_json(by_alias=True, exclude_unset=True)


def bundle_text(value: Bundle | None) -> str | None:
    return None if value is None else value.model_dump_json(exclude={"path"})


def run_of(row: sa.Row[Any], *, result: Result | None = None, queue_position: int | None = None) -> Run:
    """`result`, `queue_position`: when the row does not carry them."""
    fields = row._mapping
    if result is None and fields.get("result") is not None:
        result = Result.model_validate_json(fields["result"])
    head = Head.model_validate_json(fields["head"])
    ended: Mapping[str, Any] = {}
    if result is not None:
        ended = result.shown() | {"message": result.verdict.message}
    return Run(
        id=fields["id"],
        tenant=fields["tenant"],
        **dict(head),
        phase=Phase(fields["phase"]),
        outcome=_word(Outcome, fields["outcome"]),
        reason=_word(Reason, fields["reason"]),
        attempt=fields["attempt"],
        queue_position=fields.get("queue_position", queue_position),
        created_at=fields["created_at"],
        started_at=fields["started_at"],
        finished_at=fields["finished_at"],
        boundary_destroyed_at=fields["boundary_destroyed_at"],
        **ended,
    )


def compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def is_run_id(value: str) -> bool:
    """What cannot be an id is not looked for: PostgreSQL refuses a NUL even in a question."""
    return _RUN_ID.fullmatch(value) is not None


def _word(kind: Any, value: str | None) -> Any:
    return None if value is None else kind(value)
