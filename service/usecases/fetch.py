"""Reading runs. What belongs to another tenant is the same NotFound as what never was."""

import base64
import binascii
import re
from collections.abc import Sequence
from datetime import timedelta

from service.core.errors import Conflict, DocumentInvalid, NotFound
from service.core.ids import RUN_ID_PATTERN
from service.core.junit import render_junit
from service.core.ports.runs import RunStore
from service.core.run import Outcome, Phase, Run
from service.core.waiting import explained

_RUN_ID = re.compile(RUN_ID_PATTERN, re.ASCII)
_CURSOR_VERSION = b"1:"
MAX_PAGE = 100
PAGE_TEXT = 2 * 2**20
"""Characters of output in one page, give or take a run."""
_AT_ONCE = 10


def checked_run_id(run_id: str) -> str:
    """What cannot be an id is not looked for. Raises NotFound."""
    if not _RUN_ID.fullmatch(run_id):
        raise NotFound
    return run_id


def get_run(runs: RunStore, *, run_id: str, tenant: str | None) -> Run:
    """`tenant=None` is an operator. Raises NotFound."""
    return runs.get_run(checked_run_id(run_id), tenant)


def read_run(runs: RunStore, *, run_id: str, tenant: str, worker_fresh: timedelta) -> Run:
    """As `get_run`; a queued one says what it waits for."""
    (run,) = with_reasons(runs, [get_run(runs, run_id=run_id, tenant=tenant)], worker_fresh=worker_fresh)
    return run


def with_reasons(runs: RunStore, items: Sequence[Run], *, worker_fresh: timedelta) -> list[Run]:
    """The same runs; those that are queued say what they wait for. One look at the store for all of them."""
    queued = [run.id for run in items if run.phase is Phase.QUEUED]
    views = runs.queue_views(queued, worker_fresh=worker_fresh) if queued else {}
    return [explained(run, views.get(run.id)) for run in items]


def junit_report(runs: RunStore, *, run_id: str, tenant: str) -> str:
    """The finished run as JUnit XML. Raises NotFound, Conflict (not_finished)."""
    run = get_run(runs, run_id=run_id, tenant=tenant)
    if run.phase is not Phase.FINISHED:
        raise Conflict(f"{run.id} is {run.phase}; its report is made when it is finished", code="not_finished")
    return render_junit(run)


def read_page(
    runs: RunStore, *, tenant: str, phase: Phase | None = None, outcome: Outcome | None = None, limit: int = 20,
    cursor: str | None = None, worker_fresh: timedelta,
) -> tuple[Sequence[Run], str | None]:  # fmt: skip
    """As `list_runs`; those that are queued say what they wait for."""
    items, next_cursor = list_runs(runs, tenant=tenant, phase=phase, outcome=outcome, limit=limit, cursor=cursor)
    return with_reasons(runs, items, worker_fresh=worker_fresh), next_cursor


def list_runs(
    runs: RunStore, *, tenant: str, phase: Phase | None = None, outcome: Outcome | None = None, limit: int = 20,
    cursor: str | None = None,
) -> tuple[Sequence[Run], str | None]:  # fmt: skip
    """One page, newest first, and the cursor of the next one. Raises DocumentInvalid for a cursor that is not ours.

    A run carries up to 3 MiB of its steps' text, so a page ends early once it has `PAGE_TEXT`: nobody makes us hold a
    hundred of the largest at once.
    """
    before = read_cursor(cursor) if cursor is not None else None
    items: list[Run] = []
    text = 0
    while len(items) < limit:
        few = min(limit - len(items), _AT_ONCE)
        page = runs.list_runs(tenant, phase=phase, outcome=outcome, limit=few, before=before)
        for run in page.items:
            items.append(run)
            text += sum(len(step.stdout.text) + len(step.stderr.text) for step in run.steps)
            if text >= PAGE_TEXT and (run is not page.items[-1] or page.next_before):
                return items, make_cursor(run.id)
        before = page.next_before
        if before is None:
            return items, None
    assert before is not None
    return items, make_cursor(before)


def make_cursor(before: str) -> str:
    return base64.urlsafe_b64encode(_CURSOR_VERSION + before.encode()).decode().rstrip("=")


def read_cursor(cursor: str) -> str:
    """Not signed: whoever wrote it, it says only where in the caller's own list to go on. One spelling is read."""
    try:
        decoded = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        before = decoded.removeprefix(_CURSOR_VERSION).decode("ascii")
    except (binascii.Error, ValueError):
        before = ""
    if not _RUN_ID.fullmatch(before) or make_cursor(before) != cursor:
        raise DocumentInvalid(
            "request", [{"path": "query.cursor", "message": "should be a next_cursor as it was given"}]
        )
    return before
