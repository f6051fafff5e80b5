"""Ending runs early, and forgetting finished ones."""

from typing import Literal

import structlog

from service.core.errors import BlastdoorError
from service.core.ports.publishing import Hints
from service.core.ports.runs import RunStore
from service.core.run import Run
from service.usecases.bundles import Bundles
from service.usecases.fetch import checked_run_id

log = structlog.get_logger()


def cancel_run(
    runs: RunStore, *, hints: Hints, run_id: str, tenant: str | None, by: Literal["tenant", "operator"]
) -> Run:
    """From any phase; a finished run is left as it is. A claimed run's worker sees the mark within 2 s.

    `tenant=None` is an operator. Raises NotFound.
    """
    run = runs.request_cancel(checked_run_id(run_id), tenant, by=by)
    hint(hints, topic="run", run_id=run.id)
    hint(hints, topic="outbox", run_id=run.id)
    return run


def delete_run(runs: RunStore, *, bundles: Bundles, run_id: str, tenant: str) -> None:
    """The record, then every blob that no other run of the tenant uses. Raises NotFound, Conflict(not_finished)."""
    with bundles.alone(tenant):
        for digest in runs.delete_run(checked_run_id(run_id), tenant):
            bundles.remove(tenant, digest)


def hint(hints: Hints, *, topic: str, run_id: str) -> None:
    """Wakes who waits. A hint may be lost, so a failing one is no reason to fail what has already been committed."""
    try:
        hints.hint(topic, run_id)
    except BlastdoorError as error:
        log.debug("hint_lost", topic=topic, run_id=run_id, error=str(error))
