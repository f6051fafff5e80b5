"""Applies the deciders to the world of one site: what no run claims is destroyed, what is gone is recorded as gone.

A claim is committed before anything is created, and each row is read after the world was listed: so whatever is listed
has its row, and an unknown fence really is an orphan. Which runs nobody acts on is read before: so what is then not
listed really is gone. Two reapers at once are safe: destroying is idempotent, recording counts once.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

import structlog

from service.core.boundary import Boundary, BoundaryKind, BoundaryRef
from service.core.errors import BlastdoorError, NotYetDestroyed
from service.core.lease import LeaseView, gone
from service.core.ports import Hints, RunLine

log = structlog.get_logger()


@dataclass(frozen=True)
class Swept:
    """What one pass did: boundaries destroyed, boundaries that resisted, fences recorded as gone."""

    destroyed: tuple[BoundaryRef, ...]
    resisted: tuple[BoundaryRef, ...]
    recorded: int


def sweep(boundaries: Iterable[Boundary], runs: RunLine, hints: Hints, *, installation: str, site: str) -> Swept:
    """One pass. A boundary that cannot be listed is logged, does not stop the others, and nothing is called absent."""
    by_kind = {boundary.kind: boundary for boundary in boundaries}
    unclaimed = runs.undestroyed(site)
    listed = {kind: _discovered(boundary) for kind, boundary in by_kind.items()}
    destroyed: list[BoundaryRef] = []
    resisted: list[BoundaryRef] = []
    for ref in (ref for refs in listed.values() for ref in refs or () if ref.installation == installation):
        now = runs.now()
        if _is_canary(ref, now=now) or not gone(runs.lease_of(ref.run_id), ref.fence, now=now):
            continue
        (destroyed if _destroyed(by_kind[ref.kind], ref) else resisted).append(ref)
    absent = [view for view in unclaimed if _is_absent(view, listed)]
    facts = [(ref.run_id, ref.fence) for ref in destroyed] + [(view.run_id, view.fence) for view in absent]
    recorded = sum(_record(runs, hints, run_id, fence) for run_id, fence in facts)
    return Swept(tuple(destroyed), tuple(resisted), recorded)


def _is_canary(ref: BoundaryRef, *, now: datetime) -> bool:
    """A probe is trying the wall out: runs have fences from 1 on. It has until it expires."""
    return ref.fence == 0 and now < ref.expires_at


def _is_absent(view: LeaseView, listed: Mapping[BoundaryKind, list[BoundaryRef] | None]) -> bool:
    """Nobody acted on the run before the world was listed, and the world has no trace of its boundary: the worker died
    before it created anything, or after it destroyed everything."""
    refs = listed.get(BoundaryKind(view.boundary.split("/")[0].split("+")[0]))
    return refs is not None and all((ref.run_id, ref.fence) != (view.run_id, view.fence) for ref in refs)


def _record(runs: RunLine, hints: Hints, run_id: str, fence: int) -> int:
    if not runs.record_destroyed(run_id, fence):
        return 0
    hints.hint("outbox", run_id)
    return 1


def _discovered(boundary: Boundary) -> list[BoundaryRef] | None:
    """None when the platform could not be asked: not the same as an empty list."""
    try:
        return list(boundary.discover())
    except (BlastdoorError, OSError):
        log.exception("cannot list what exists", kind=str(boundary.kind))
        return None


def _destroyed(boundary: Boundary, ref: BoundaryRef) -> bool:
    try:
        boundary.destroy(ref)
    except (NotYetDestroyed, OSError) as error:
        log.warning("not yet destroyed", boundary=ref.name, error=str(error))
        return False
    log.info("destroyed an orphan", boundary=ref.name, run_id=ref.run_id, fence=ref.fence)
    return True
