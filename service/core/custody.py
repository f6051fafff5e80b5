"""What clean-up asks of the store: what stands on the sites, what was ordered to be done about it, and who did what.

Ports, as in `service.core.ports`: synchronous, every instant the database's clock.
"""

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from service.core.boundary import BoundaryKind
from service.core.cleanup import CleanupPlan, InventoryRow, Observed, Order, PlannedAction, SiteRecord
from service.core.lease import LeaseView
from service.core.ports.runs import RunLine


class Inventory(Protocol):
    """What each site's reaper discovered when it last looked."""

    def record_inventory(self, site: str, kinds: Collection[BoundaryKind], found: Sequence[Observed]) -> None:
        """The site has looked: of these kinds, exactly `found` stands there. A row that was there keeps when it was
        first seen and since when it resists. A site that was forgotten is known again."""
        ...

    def drop_from_inventory(self, site: str, names: Collection[str]) -> None:
        """They were destroyed."""
        ...

    def note_resistance(self, site: str, name: str) -> datetime:
        """Its destruction did not come off. -> when that was first noted."""
        ...

    def mark_quarantined(self, site: str, name: str) -> bool:
        """-> False when it was marked already, or is not there."""
        ...

    def inventory(self, site: str | None = None) -> Sequence[InventoryRow]:
        """By site and name."""
        ...

    def sites(self) -> Sequence[SiteRecord]:
        """Those that were forgotten left out."""
        ...

    def ask_to_look(self) -> datetime:
        """Every site is asked to list its world soon, and to destroy nothing. -> now."""
        ...

    def is_asked_to_look(self, site: str) -> bool: ...

    def forget_site(self, site: str, *, unless_seen_within: timedelta) -> int:
        """What it had counts as gone, without anybody having seen that: no event says so. -> how many fences of runs.
        Raises NotFound, Conflict(site_alive)."""
        ...


class CleanupOrders(Protocol):
    """Operators' plans, and the lines of those that are applied."""

    def store_plan(self, actions: Sequence[PlannedAction], *, asked_by: str, force: bool) -> CleanupPlan: ...

    def get_plan(self, plan_id: str) -> CleanupPlan:
        """Raises NotFound."""
        ...

    def apply_plan(self, plan_id: str) -> CleanupPlan:
        """From now on its lines are orders; those that refuse have their result at once. Applying twice is applying
        once. Raises NotFound."""
        ...

    def orders(self, site: str) -> Sequence[Order]:
        """Lines of applied plans that have no result yet, oldest plan first."""
        ...

    def conclude_order(self, plan_id: str, n: int, result: str) -> bool:
        """-> False when it has a result already. The plan is done with its last line."""
        ...


class AuditEntry(BaseModel):
    """One act of an operator. `result` is None while it goes on, and for ever when its end was not seen."""

    model_config = ConfigDict(frozen=True)

    id: str
    at: datetime
    who: str
    what: str
    target: str
    detail: Mapping[str, Any]
    result: str | None


class AuditLog(Protocol):
    def begin_act(self, *, who: str, what: str, target: str, detail: Mapping[str, Any]) -> str:
        """Committed when this returns. -> the entry's id."""
        ...

    def end_act(self, entry_id: str, result: str) -> None: ...

    def list_acts(self, *, limit: int, before: str | None) -> tuple[Sequence[AuditEntry], str | None]:
        """Newest first. `before` is an entry's id. -> the entries, and the last one's id when there are more."""
        ...


class Drains(Protocol):
    def drain_worker(self, worker_id: str) -> None:
        """It claims nothing from now on, exactly. Raises NotFound."""
        ...

    def is_draining(self, worker_id: str) -> bool: ...

    def playing(self) -> Mapping[str, int]:
        """How many runs each worker acts on, by its id; workers without one are left out."""
        ...


class ReaperStore(RunLine, Inventory, CleanupOrders, Protocol):
    """What a site's reaper works with."""

    def leases_of(self, run_ids: Collection[str]) -> Mapping[str, LeaseView]:
        """As `lease_of`, for many; those that do not exist are left out."""
        ...

    def record_quarantined(self, run_id: str, fence: int) -> bool:
        """What was made under this fence resists, or cannot be reached. Writes the boundary.quarantined event once; ->
        False when it was written before, the boundary is known to be gone, or the run is unknown."""
        ...


class Custody(Inventory, CleanupOrders, AuditLog, Drains, Protocol):
    """What the operators' side of the API works with."""

    def now(self) -> datetime: ...
    def lease_of(self, run_id: str) -> LeaseView | None: ...


class Leftovers(Protocol):
    """What is still there of what nobody wants any more."""

    def purge_events(self, *, older_than: timedelta, dry_run: bool) -> int:
        """Forget events of that age that are on the bus and have all their deliveries, none of which is still to be
        made. What was never told stays. -> how many."""
        ...

    def tenant_names(self) -> Sequence[str]:
        """All that may have blobs: internal ones and deleted ones too, until they are purged."""
        ...

    def unused_blobs(self, tenant: str, digests: Collection[str]) -> Sequence[str]:
        """Those of them that no run of the tenant uses."""
        ...

    def deleted_tenants(self) -> Sequence[str]:
        """Of which something may be left."""
        ...

    def purge_tenant(self, name: str) -> bool:
        """Delete what may go of a deleted tenant: runs that ended and whose boundary is gone, then everything else
        once it is told. -> whether nothing is left but blobs."""
        ...

    def tenant_purged(self, name: str) -> None:
        """Its blobs are gone, too."""
        ...
