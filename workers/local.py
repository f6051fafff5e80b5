"""Clean-up of this host without the API: what stands here is read from the platform's labels.

A composition root: the database is asked who acts on what, when it can be reached. When it cannot, nobody can say that
a boundary is unclaimed: then only what has outlived its own lifetime is not taken to be live.
"""

import getpass
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import structlog

from service.adapters.sql_store import SqlStore
from service.core.boundary import NO_CLUSTERS, Boundary, BoundaryKind, BoundaryRef, ClusterChoices
from service.core.cleanup import (
    KILL_GRACE,
    ActionKind,
    ActionResult,
    BoundaryState,
    InventoryRow,
    PlannedAction,
    Scope,
    named,
    plan_actions,
    state_of,
)
from service.core.errors import BlastdoorError, NotFound, NotYetDestroyed
from workers.registry import DRIVERS, Warmable, load

_POLL_S = 0.2

log = structlog.get_logger()


class NoInstallation(Exception):
    """Without the database it must be said which installation is meant; the message lists those that are here."""


@dataclass(frozen=True, kw_only=True)
class Here:
    """A host in its installation, as drivers see it (`registry.Host`)."""

    state_dir: Path
    runtime_dir: Path
    runsc: Path
    installation: str
    site: str
    kubeconfig: Path | None = None
    kube_image: str = ""
    namespace_variants: Sequence[str] = ("runc", "gvisor")
    clusters: ClusterChoices = NO_CLUSTERS


@dataclass
class LocalCleanup:
    """`store` is None, and `unreachable` says why, when the database cannot be asked."""

    store: SqlStore | None
    unreachable: str | None
    boundaries: Mapping[BoundaryKind, Boundary]
    installation: str
    unlisted: dict[BoundaryKind, Exception] = field(default_factory=dict)
    """Kinds that could not be listed, so that nothing is known of them, and why."""

    def plan(self, scope: Scope, *, force: bool) -> Sequence[PlannedAction]:
        """What would be done. Raises BlastdoorError, OSError when no kind can be listed."""
        rows, now = self._rows()
        return plan_actions(rows, scope, now=now, force=force)

    def apply(self, actions: Iterable[PlannedAction]) -> Sequence[PlannedAction]:
        """Each line is looked at again, done, and has its result. With a database it is in the audit log first."""
        planned = list(actions)
        entry = None
        if self.store is not None:
            detail = {"actions": [{"boundary": one.ref.name, "action": str(one.action)} for one in planned]}
            who = f"local:{getpass.getuser()}"
            entry = self.store.begin_act(who=who, what="cleanup.local", target="", detail=detail)
        done = [one.model_copy(update={"result": self._result(one)}) for one in planned]
        if self.store is not None and entry is not None:
            self.store.end_act(entry, "; ".join(f"{one.ref.name} {one.result}" for one in done)[:2000] or "nothing")
        return done

    def close(self) -> None:
        for boundary in self.boundaries.values():
            if isinstance(boundary, Warmable):
                boundary.close()
        if self.store is not None:
            self.store.close()

    def _rows(self) -> tuple[list[InventoryRow], datetime]:
        refs = [ref for ref in self._discovered() if ref.installation == self.installation]
        if self.store is None:
            now = datetime.now(UTC)
            states = [BoundaryState.OVERDUE if now >= ref.expires_at else BoundaryState.LIVE for ref in refs]
        else:
            now = self.store.now()
            views = self.store.leases_of({ref.run_id for ref in refs})
            refs = [named(ref, views.get(ref.run_id)) for ref in refs]
            states = [state_of(ref, views.get(ref.run_id), now=now) for ref in refs]
        rows = [
            InventoryRow(ref=ref, created_at=ref.created_at or _claimed_after(ref), observed_at=now, state=state)
            for ref, state in zip(refs, states, strict=True)
        ]
        return rows, now

    def _discovered(self) -> list[BoundaryRef]:
        """A cluster that is away does not keep anybody from this host's own sandboxes."""
        found: list[BoundaryRef] = []
        for kind, boundary in self.boundaries.items():
            try:
                found += boundary.discover()
            except (BlastdoorError, OSError) as error:
                log.warning("cannot list what exists", kind=str(kind), why=str(error))
                self.unlisted[kind] = error
        if len(self.unlisted) == len(self.boundaries):
            raise next(iter(self.unlisted.values()))
        return found

    def _result(self, line: PlannedAction) -> str:
        ref = line.ref
        if line.action is ActionKind.REFUSE:
            return ActionResult.REFUSED.value
        if line.action is ActionKind.KILL:
            self._end_run(ref)
        elif self._state(ref) is BoundaryState.LIVE:
            return f"{ActionResult.REFUSED}: somebody acts on it again"
        try:
            self.boundaries[ref.kind].destroy(ref)
        except (NotYetDestroyed, OSError) as error:
            return f"resists: {error}"
        if self.store is not None:
            self.store.record_destroyed(ref.run_id, ref.fence)
        return ActionResult.DESTROYED.value

    def _end_run(self, ref: BoundaryRef) -> None:
        """Let its worker end it, for as long as that takes a worker that lives."""
        view = None if self.store is None else self.store.lease_of(ref.run_id)
        if self.store is None or view is None or view.fence != ref.fence or not view.is_active:
            return
        try:
            self.store.request_cancel(ref.run_id, None, by="operator")
        except NotFound:
            return  # its owner deleted it just now
        deadline = time.monotonic() + KILL_GRACE.total_seconds()
        while time.monotonic() < deadline and self._state(ref) is BoundaryState.LIVE:
            time.sleep(_POLL_S)

    def _state(self, ref: BoundaryRef) -> BoundaryState | None:
        """None when it is not there any more."""
        rows, _ = self._rows()
        return next((row.state for row in rows if row.ref.name == ref.name), None)


def open_local(
    *,
    state_dir: Path,
    runtime_dir: Path,
    runsc: Path,
    site: str,
    database_url: str,
    installation: str | None,
    kubeconfig: Path | None = None,
    kube_image: str = "",
    clusters: ClusterChoices = NO_CLUSTERS,
) -> LocalCleanup:
    """`installation`: which one, should the database not say it. Raises NoInstallation."""
    store, why = _reach(database_url, state_dir)
    known = store.installation_id() if store is not None else installation
    if known is None:
        here = sorted(path.name for path in runtime_dir.glob("*/") if any(path.glob("bd-*")))
        found = ", ".join(here) or "nothing"
        raise NoInstallation(f"{why}; say which installation with --installation; {runtime_dir} has: {found}")
    host = Here(
        state_dir=state_dir, runtime_dir=runtime_dir, runsc=runsc, installation=known, site=site,
        kubeconfig=kubeconfig, kube_image=kube_image, clusters=clusters,
    )  # fmt: skip
    return LocalCleanup(store, why, {kind: load(kind, host) for kind in DRIVERS}, known)


def _reach(database_url: str, state_dir: Path) -> tuple[SqlStore | None, str | None]:
    path = state_dir / "blastdoor.db"
    if not database_url and not path.is_file():  # connecting would make it
        return None, f"there is no database at {path}"
    store = SqlStore(database_url or f"sqlite:///{path}")
    try:
        store.installation_id()
    except BlastdoorError as error:
        store.close()
        return None, error.detail
    return store, None


def _claimed_after(ref: BoundaryRef) -> datetime:
    """A run's id says when it was submitted, to the millisecond (UUIDv7)."""
    return datetime.fromtimestamp(int(ref.run_id.removeprefix("run_")[:12], 16) / 1000, UTC)
