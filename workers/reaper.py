"""Applies the deciders to the world of one site: what no run claims is destroyed, what is gone is recorded as gone, and
what operators ordered is done.

A claim is committed before anything is created, and each row is read after the world was listed: so whatever is listed
has its row, and an unknown fence really is an orphan. Which runs nobody acts on is read before: so what is then not
listed really is gone. Two reapers at once are safe: destroying is idempotent, recording counts once.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import structlog

from service.core.boundary import Boundary, BoundaryKind, BoundaryRef
from service.core.cleanup import (
    ActionResult,
    BoundaryState,
    Check,
    Observed,
    Order,
    StandbyState,
    named,
    recheck,
    resists_too_long,
    state_of,
)
from service.core.custody import ReaperStore
from service.core.errors import BlastdoorError, NotYetDestroyed
from service.core.failpoints import Failpoint, reach
from service.core.lease import LeaseView
from service.core.ports.publishing import Hints
from workers.registry import Keeping

QUARANTINE_AFTER = timedelta(seconds=30)
SITE_SILENT = timedelta(minutes=5)
_AT_ONCE = 8
"""Boundaries that are destroyed side by side: one that resists takes seconds, and the others should not wait for it."""

log = structlog.get_logger()

Why = str


@dataclass(frozen=True)
class Swept:
    """What one pass did: boundaries destroyed, boundaries that resisted, fences recorded as gone; those of them that
    are quarantined from now on."""

    destroyed: tuple[BoundaryRef, ...]
    resisted: tuple[BoundaryRef, ...]
    recorded: int
    quarantined: tuple[BoundaryRef, ...] = ()


@dataclass(frozen=True)
class _World:
    """What was just listed, and how it stands. A kind that could not be listed is None: not the same as empty."""

    listed: Mapping[BoundaryKind, Sequence[BoundaryRef] | None]
    found: Sequence[Observed]
    states: Mapping[str, BoundaryState]


def host_now() -> datetime:
    return datetime.now(UTC)


class Reaper:
    """Of one site. Keeps nothing between two passes but what is in the store, and since when a kind cannot be listed.

    `host_now` is this host's clock. By it alone the boundaries of probes live, which no database knows of: the same
    clock said until when. All else goes by the database's."""

    def __init__(
        self, boundaries: Iterable[Boundary], runs: ReaperStore, hints: Hints, *, installation: str, site: str,
        quarantine_after: timedelta = QUARANTINE_AFTER, on_quarantine: Callable[[], None] = lambda: None,
        silent_after: timedelta = SITE_SILENT, host_now: Callable[[], datetime] = host_now,
    ) -> None:  # fmt: skip
        self._by_kind = {boundary.kind: boundary for boundary in boundaries}
        self._runs, self._hints = runs, hints
        self._installation, self._site = installation, site
        self._quarantine_after, self._on_quarantine = quarantine_after, on_quarantine
        self._silent_after, self._silent_since = silent_after, dict[BoundaryKind, datetime]()
        self._host_now = host_now

    def sweep(self) -> Swept:
        """One pass. A boundary that cannot be listed is logged, does not stop the others, and nothing is called
        absent. Raises Unavailable before anything is destroyed when the database is away."""
        unclaimed = self._runs.undestroyed(self._site)
        world = self.look()
        unwanted = [one.ref for one in world.found if one.state is not BoundaryState.LIVE]
        resisted = self._destroy(unwanted)
        destroyed = [ref for ref in unwanted if ref.name not in resisted]
        self._runs.drop_from_inventory(self._site, [ref.name for ref in destroyed])
        absent = _absent(unclaimed, world.listed)
        facts = [(ref.run_id, ref.fence) for ref in destroyed] + [(view.run_id, view.fence) for view in absent]
        recorded = sum(self._record(run_id, fence) for run_id, fence in facts)
        still = [ref for ref in unwanted if ref.name in resisted]
        quarantined = [ref for ref in still if self._is_quarantined(ref, resisted[ref.name])]
        quarantined += self._quarantine_unlisted(world.listed, unclaimed)
        return Swept(tuple(destroyed), tuple(still), recorded, tuple(quarantined))

    def look(self) -> _World:
        """List the world and write it down; destroy nothing."""
        listed = {kind: _discovered(boundary) for kind, boundary in self._by_kind.items()}
        refs = [ref for refs in listed.values() for ref in refs or () if ref.installation == self._installation]
        resisting = {
            row.ref.name
            for row in self._runs.inventory(self._site)
            if row.state is BoundaryState.QUARANTINED and row.resisting_since is not None
        }
        now = self._runs.now()  # before the leases: one that is renewed meanwhile must not look as if it had run out
        views = self._runs.leases_of({ref.run_id for ref in refs})
        kept = self._kept()
        found = [
            Observed(
                ref=named(ref, views.get(ref.run_id)),
                state=state_of(
                    ref,
                    views.get(ref.run_id),
                    now=self._host_now() if ref.fence == 0 else now,
                    resists=ref.name in resisting,
                ),
                standby=kept.get(ref.name),
            )
            for ref in refs
        ]
        seen = [kind for kind, refs_ in listed.items() if refs_ is not None]
        self._runs.record_inventory(self._site, seen, found)
        return _World(listed, found, {one.ref.name: one.state for one in found})

    def _kept(self) -> Mapping[str, StandbyState]:
        kept: dict[str, StandbyState] = {}
        for boundary in self._by_kind.values():
            if isinstance(boundary, Keeping):
                kept |= boundary.kept()
        return kept

    def obey(self) -> int:
        """Do what operators ordered for this site, line by line, each looked at again. -> lines that have their result
        now; the others are waited for."""
        orders = self._runs.orders(self._site)
        if not orders:
            return 0
        world, now = self.look(), self._runs.now()
        concluded = 0
        to_destroy: list[Order] = []
        for order in orders:
            if self._installation != order.ref.installation or order.ref.kind not in self._by_kind:
                concluded += self._conclude(order, f"{ActionResult.REFUSED}: this site builds no such boundary")
            elif world.listed[order.ref.kind] is not None:
                check = recheck(order, world.states.get(order.ref.name), now=now)
                if check is Check.GONE:
                    self._record(order.ref.run_id, order.ref.fence)
                    concluded += self._conclude(order, ActionResult.DESTROYED)
                elif check is Check.REFUSE:
                    concluded += self._conclude(order, f"{ActionResult.REFUSED}: somebody acts on it again")
                elif check is Check.DESTROY:
                    to_destroy.append(order)
        resisted = self._destroy([order.ref for order in to_destroy])
        self._runs.drop_from_inventory(self._site, [o.ref.name for o in to_destroy if o.ref.name not in resisted])
        for order in to_destroy:
            why = resisted.get(order.ref.name)
            if why is None:
                self._record(order.ref.run_id, order.ref.fence)
                concluded += self._conclude(order, ActionResult.DESTROYED)
            elif self._is_quarantined(order.ref, why):
                concluded += self._conclude(order, f"{ActionResult.QUARANTINED}: {why}")
        return concluded

    def attend(self) -> None:
        """Between two sweeps: when somebody asks for a look, or ordered something. Else two small reads."""
        if self._runs.orders(self._site):
            self.obey()
        elif self._runs.is_asked_to_look(self._site):
            self.look()

    def _destroy(self, refs: Sequence[BoundaryRef]) -> dict[str, Why]:
        """All of them, side by side. -> why not, by name, for those that resist."""
        if not refs:
            return {}
        with ThreadPoolExecutor(min(_AT_ONCE, len(refs)), thread_name_prefix="reaper") as pool:
            answers = list(pool.map(lambda ref: _destroyed(self._by_kind[ref.kind], ref), refs))
        return {ref.name: why for ref, why in zip(refs, answers, strict=True) if why is not None}

    def _is_quarantined(self, ref: BoundaryRef, why: Why) -> bool:
        """It has just resisted. Past its deadline that is said once, to the operator and to whoever owns the run."""
        since = self._runs.note_resistance(self._site, ref.name)
        if not resists_too_long(since, now=self._runs.now(), quarantine_after=self._quarantine_after):
            return False
        if self._runs.mark_quarantined(self._site, ref.name):
            log.warning("boundary quarantined", boundary=ref.name, run_id=ref.run_id, fence=ref.fence, why=why)
            self._on_quarantine()
        if self._runs.record_quarantined(ref.run_id, ref.fence):
            self._hints.hint("outbox", ref.run_id)
        return True

    def _quarantine_unlisted(
        self, listed: Mapping[BoundaryKind, Sequence[BoundaryRef] | None], unclaimed: Iterable[LeaseView]
    ) -> list[BoundaryRef]:
        """A platform that does not answer for long, such as a cluster that is away, is as a silent site: what it had
        is neither there nor gone. Said once for each -> those of which it is said now."""
        now = self._runs.now()
        self._silent_since = {kind: self._silent_since.get(kind, now) for kind, refs in listed.items() if refs is None}
        silent = {kind for kind, since in self._silent_since.items() if now - since >= self._silent_after}
        if not silent:
            return []
        rows = [row for row in self._runs.inventory(self._site) if row.ref.kind in silent]
        newly = [row.ref for row in rows if self._runs.mark_quarantined(self._site, row.ref.name)]
        for ref in newly:
            log.warning("cannot be listed; its boundary is quarantined", boundary=ref.name, kind=str(ref.kind))
            self._on_quarantine()
        for view in unclaimed:
            unsaid = _kind_of(view) in silent and view.quarantined_fence < view.fence
            if unsaid and self._runs.record_quarantined(view.run_id, view.fence):
                self._hints.hint("outbox", view.run_id)
        return newly

    def _record(self, run_id: str, fence: int) -> int:
        if not self._runs.record_destroyed(run_id, fence):
            return 0
        self._hints.hint("outbox", run_id)
        return 1

    def _conclude(self, order: Order, result: str) -> int:
        log.info("order done", plan=order.plan_id, n=order.n, boundary=order.ref.name, result=str(result))
        return int(self._runs.conclude_order(order.plan_id, order.n, str(result)))


def sweep(
    boundaries: Iterable[Boundary], runs: ReaperStore, hints: Hints, *, installation: str, site: str,
    quarantine_after: timedelta = QUARANTINE_AFTER, host_now: Callable[[], datetime] = host_now,
) -> Swept:  # fmt: skip
    """One pass of a reaper that is made for it."""
    reaper = Reaper(
        boundaries, runs, hints, installation=installation, site=site, quarantine_after=quarantine_after,
        host_now=host_now,
    )  # fmt: skip
    return reaper.sweep()


def watch_sites(runs: ReaperStore, hints: Hints, *, own: str, silent_after: timedelta) -> Collection[str]:
    """What silent sites had, and is not known to be gone, is quarantined: said once for each. Any site's reaper says
    it of the others. -> the silent sites."""
    now = runs.now()
    silent = [site.name for site in runs.sites() if site.name != own and site.is_silent(now=now, after=silent_after)]
    for name in silent:
        unsaid = [view for view in runs.undestroyed(name) if view.quarantined_fence < view.fence]
        for view in unsaid:
            if runs.record_quarantined(view.run_id, view.fence):
                log.warning("site silent; its boundary is quarantined", site=name, run_id=view.run_id, fence=view.fence)
                hints.hint("outbox", view.run_id)
    return silent


def _absent(
    unclaimed: Iterable[LeaseView], listed: Mapping[BoundaryKind, Sequence[BoundaryRef] | None]
) -> list[LeaseView]:
    """Nobody acted on these runs before the world was listed, and the world has no trace of their boundaries: the
    worker died before it created anything, or after it destroyed everything."""
    there = {kind: {(ref.run_id, ref.fence) for ref in refs} for kind, refs in listed.items() if refs is not None}
    kinds = [(view, _kind_of(view)) for view in unclaimed]
    return [view for view, kind in kinds if kind in there and (view.run_id, view.fence) not in there[kind]]


def _kind_of(view: LeaseView) -> BoundaryKind:
    return BoundaryKind(view.boundary.split("/")[0].split("+")[0])


def _discovered(boundary: Boundary) -> list[BoundaryRef] | None:
    """None when the platform could not be asked: not the same as an empty list."""
    try:
        return list(boundary.discover())
    except (BlastdoorError, OSError):
        log.exception("cannot list what exists", kind=str(boundary.kind))
        return None


def _destroyed(boundary: Boundary, ref: BoundaryRef) -> Why | None:
    """-> None when it is gone, or why it is not."""
    reach(Failpoint.REAPER_BEFORE_DESTROY)
    try:
        boundary.destroy(ref)
    except (NotYetDestroyed, OSError) as error:
        log.warning("not yet destroyed", boundary=ref.name, error=str(error))
        return str(error)
    reach(Failpoint.REAPER_DESTROYED)
    log.info("destroyed an orphan", boundary=ref.name, run_id=ref.run_id, fence=ref.fence)
    return None
