"""What stands on the sites, as their reapers found it; and which workers are to take nothing more."""

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from service.adapters.sql.documents import CHANGED, is_run_id, run_of
from service.adapters.sql.engine import db_now
from service.adapters.sql.events import write_phase
from service.adapters.sql.fairness import serialised
from service.adapters.sql.line import LEASE_VIEW, lease_view
from service.adapters.sql.schema import NOT_KNOWN_GONE, indexed_by, inventory, run, site, worker
from service.adapters.sql.transitions import SqlPart
from service.core.boundary import BoundaryKind, BoundaryRef
from service.core.cleanup import BoundaryState, InventoryRow, Observed, SiteRecord, StandbyState
from service.core.errors import Conflict, NotFound
from service.core.events import EventType
from service.core.lease import LeaseView

_AT_ONCE = 200
"""Rows of one statement: SQLite takes 32,766 parameters."""
_site: sa.BindParameter[Any] = sa.bindparam("b_site")
_quarantined = (
    sa.update(run)
    .where(
        run.c.id == sa.bindparam("b_run_id"),
        run.c.fence >= sa.bindparam("b_fence"),
        run.c.destroyed_fence < sa.bindparam("b_fence"),
        run.c.quarantined_fence < sa.bindparam("b_fence"),
    )
    .values(quarantined_fence=sa.bindparam("b_fence"), last_seq=run.c.last_seq + 1)
    .returning(*CHANGED)
)
_unheld = sa.or_(run.c.lease_until.is_(None), run.c.lease_until < db_now())
_give_up = (
    sa.update(run).where(run.c.site == _site, sa.text(NOT_KNOWN_GONE), _unheld).values(destroyed_fence=run.c.fence)
)
PLAYING = (
    sa.select(run.c.lease_owner, sa.func.count().label("runs"))
    .where(run.c.lease_until.is_not(None))
    .group_by(run.c.lease_owner)
    .with_hint(run, indexed_by("ix_run_lease_until"), "sqlite")
)


class SqlCustody(SqlPart):
    def record_inventory(self, site: str, kinds: Collection[BoundaryKind], found: Sequence[Observed]) -> None:
        insert = sqlite.insert if self._db.is_sqlite else postgresql.insert
        seen = insert(_SITE).values(name=site, last_seen_at=db_now())
        answered = {"last_seen_at": db_now(), "forgotten_at": None, "asked_at": None}
        mine = sa.and_(inventory.c.site == site, inventory.c.kind.in_([str(kind) for kind in kinds]))
        names = {one.ref.name for one in found}
        with self._db.write() as connection:
            connection.execute(seen.on_conflict_do_update(index_elements=["name"], set_=answered))
            before = set(connection.scalars(sa.select(inventory.c.name).where(mine)))
            _drop(connection, site, before - names)
            if found:  # one statement for all of them: to compile a thousand rows takes longer than to write them
                now = connection.execute(sa.select(db_now())).scalar_one()
                row = insert(inventory)
                again = {
                    name: row.excluded[name] for name in ("tenant", "expires_at", "observed_at", "state", "standby")
                }
                row = row.on_conflict_do_update(index_elements=["site", "name"], set_=again)
                connection.execute(row, [_words(site, one, at=now) for one in found])

    def drop_from_inventory(self, site: str, names: Collection[str]) -> None:
        if names:
            with self._db.write() as connection:
                _drop(connection, site, names)

    def note_resistance(self, site: str, name: str) -> datetime:
        note = sa.update(inventory).where(inventory.c.site == site, inventory.c.name == name)
        note = note.values(resisting_since=sa.func.coalesce(inventory.c.resisting_since, db_now()))
        with self._db.write() as connection:
            since = connection.scalar(note.returning(inventory.c.resisting_since))
            return since if since is not None else connection.execute(sa.select(db_now())).scalar_one()

    def mark_quarantined(self, site: str, name: str) -> bool:
        quarantined = BoundaryState.QUARANTINED.value
        mark = sa.update(inventory).where(
            inventory.c.site == site, inventory.c.name == name, inventory.c.state != quarantined
        )
        with self._db.write() as connection:
            return connection.execute(mark.values(state=quarantined)).rowcount == 1

    def inventory(self, site: str | None = None) -> Sequence[InventoryRow]:
        installation = self.installation_id()
        wanted = sa.select(inventory).order_by(inventory.c.site, inventory.c.name)
        if site is not None:
            wanted = wanted.where(inventory.c.site == site)
        with self._db.read() as connection:
            return [_row(row, installation=installation) for row in connection.execute(wanted)]

    def sites(self) -> Sequence[SiteRecord]:
        wanted = sa.select(site).where(site.c.forgotten_at.is_(None)).order_by(site.c.name)
        with self._db.read() as connection:
            return [
                SiteRecord(name=row.name, last_seen_at=row.last_seen_at, forgotten_at=row.forgotten_at)
                for row in connection.execute(wanted)
            ]

    def ask_to_look(self) -> datetime:
        with self._db.write() as connection:
            connection.execute(sa.update(site).where(site.c.forgotten_at.is_(None)).values(asked_at=db_now()))
            return connection.execute(sa.select(db_now())).scalar_one()

    def is_asked_to_look(self, site: str) -> bool:
        asked = sa.select(sa.literal(1)).where(_SITE.c.name == site, _SITE.c.asked_at.is_not(None))
        with self._db.read() as connection:
            return connection.execute(asked).one_or_none() is not None

    def forget_site(self, site: str, *, unless_seen_within: timedelta) -> int:
        known = sa.select(_SITE.c.last_seen_at, db_now().label("at")).where(
            _SITE.c.name == site, _SITE.c.forgotten_at.is_(None)
        )
        with self._db.write() as connection:
            serialised(connection)  # a fence that counts as gone makes a run claimable
            row = connection.execute(known.with_for_update()).one_or_none() if "\0" not in site else None
            if row is None:
                raise NotFound
            if row.at - row.last_seen_at < unless_seen_within:
                raise Conflict(
                    f"site {site} answered {(row.at - row.last_seen_at).total_seconds():.0f} s ago; it cleans "
                    "up after itself",
                    code="site_alive",
                )
            fences = connection.execute(_give_up, {"b_site": site}).rowcount
            connection.execute(sa.delete(inventory).where(inventory.c.site == site))
            connection.execute(sa.update(_SITE).where(_SITE.c.name == site).values(forgotten_at=db_now()))
        return fences

    def leases_of(self, run_ids: Collection[str]) -> Mapping[str, LeaseView]:
        ids = sorted({run_id for run_id in run_ids if is_run_id(run_id)})
        views: dict[str, LeaseView] = {}
        with self._db.read() as connection:
            for start in range(0, len(ids), _AT_ONCE):
                wanted = sa.select(*LEASE_VIEW).where(run.c.id.in_(ids[start : start + _AT_ONCE]))
                views |= {row.run_id: lease_view(row) for row in connection.execute(wanted)}
        return views

    def record_quarantined(self, run_id: str, fence: int) -> bool:
        if not is_run_id(run_id):
            return False
        installation = self.installation_id()
        with self._db.write() as connection:
            row = connection.execute(_quarantined, {"b_run_id": run_id, "b_fence": fence}).one_or_none()
            if row is None:
                return False
            write_phase(
                connection, run_of(row), installation=installation, seq=row.last_seq, fence=fence, at=row.at,
                traceparent=row.traceparent, type_=EventType.QUARANTINED,
            )  # fmt: skip
        return True

    def drain_worker(self, worker_id: str) -> None:
        with self._db.write() as connection:
            serialised(connection)  # after this no claim of its is under way
            drain = sa.update(worker).where(worker.c.id == worker_id).values(draining=True)
            if "\0" in worker_id or connection.execute(drain).rowcount != 1:
                raise NotFound

    def is_draining(self, worker_id: str) -> bool:
        with self._db.read() as connection:
            return bool(connection.scalar(sa.select(worker.c.draining).where(worker.c.id == worker_id)))

    def playing(self) -> Mapping[str, int]:
        with self._db.read() as connection:
            return {row.lease_owner: row.runs for row in connection.execute(PLAYING)}


_SITE = site  # where an argument has the table's name


def _drop(connection: sa.Connection, site: str, names: Collection[str]) -> None:
    gone = sorted(names)
    for start in range(0, len(gone), _AT_ONCE):
        some = inventory.c.name.in_(gone[start : start + _AT_ONCE])
        connection.execute(sa.delete(inventory).where(inventory.c.site == site, some))


def _words(site: str, one: Observed, *, at: datetime) -> dict[str, Any]:
    ref = one.ref
    return {
        "site": site,
        "name": ref.name,
        "kind": ref.kind.value,
        "variant": ref.variant,
        "run": ref.run_id,
        "tenant": ref.tenant,
        "fence": ref.fence,
        "created_at": ref.created_at if ref.created_at is not None else at,
        "expires_at": ref.expires_at,
        "observed_at": at,
        "state": one.state.value,
        "standby": one.standby,
    }


def _row(row: sa.Row[Any], *, installation: str) -> InventoryRow:
    ref = BoundaryRef(
        installation=installation, kind=BoundaryKind(row.kind), variant=row.variant, site=row.site, tenant=row.tenant,
        run_id=row.run, fence=row.fence, created_at=row.created_at, expires_at=row.expires_at,
    )  # fmt: skip
    return InventoryRow(
        ref=ref,
        created_at=row.created_at,
        observed_at=row.observed_at,
        state=BoundaryState(row.state),
        resisting_since=row.resisting_since,
        standby=None if row.standby is None else StandbyState(row.standby),
    )
