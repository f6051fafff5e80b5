"""What stands on the sites, what was ordered to be done about it, and who did what."""

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from service.adapters.memory.state import MemoryState
from service.core.boundary import BoundaryKind
from service.core.cleanup import (
    ActionKind,
    ActionResult,
    BoundaryState,
    CleanupPlan,
    InventoryRow,
    Observed,
    Order,
    PlannedAction,
    SiteRecord,
)
from service.core.custody import AuditEntry
from service.core.errors import Conflict, NotFound
from service.core.events import EventType
from service.core.ids import new_id
from service.core.lease import LeaseView


class MemoryCustody(MemoryState):
    def record_inventory(self, site: str, kinds: Collection[BoundaryKind], found: Sequence[Observed]) -> None:
        with self._lock:
            now = self.now()
            self._sites[site], self._asked = SiteRecord(name=site, last_seen_at=now), self._asked - {site}
            before = {key: row for key, row in self._inventory.items() if key[0] == site and row.ref.kind in kinds}
            for key in before:
                del self._inventory[key]
            for one in found:
                known = before.get((site, one.ref.name))
                created_at = known.created_at if known else one.ref.created_at or now
                self._inventory[site, one.ref.name] = InventoryRow(
                    ref=one.ref.model_copy(update={"created_at": created_at}),
                    created_at=created_at,
                    observed_at=now,
                    state=one.state,
                    resisting_since=known.resisting_since if known else None,
                    standby=one.standby,
                )

    def drop_from_inventory(self, site: str, names: Collection[str]) -> None:
        with self._lock:
            for name in names:
                self._inventory.pop((site, name), None)

    def note_resistance(self, site: str, name: str) -> datetime:
        with self._lock:
            row = self._inventory.get((site, name))
            since = (row.resisting_since if row else None) or self.now()
            if row is not None:
                self._inventory[site, name] = row.model_copy(update={"resisting_since": since})
            return since

    def mark_quarantined(self, site: str, name: str) -> bool:
        with self._lock:
            row = self._inventory.get((site, name))
            if row is None or row.state is BoundaryState.QUARANTINED:
                return False
            self._inventory[site, name] = row.model_copy(update={"state": BoundaryState.QUARANTINED})
            return True

    def inventory(self, site: str | None = None) -> Sequence[InventoryRow]:
        with self._lock:
            return [row for key, row in sorted(self._inventory.items()) if site in (None, key[0])]

    def sites(self) -> Sequence[SiteRecord]:
        with self._lock:
            return [site for _, site in sorted(self._sites.items()) if site.forgotten_at is None]

    def ask_to_look(self) -> datetime:
        with self._lock:
            self._asked = set(self._sites)
            return self.now()

    def is_asked_to_look(self, site: str) -> bool:
        with self._lock:
            return site in self._asked

    def forget_site(self, site: str, *, unless_seen_within: timedelta) -> int:
        with self._lock:
            known, now = self._sites.get(site), self.now()
            if known is None or known.forgotten_at is not None:
                raise NotFound
            if now - known.last_seen_at < unless_seen_within:
                raise Conflict(f"site {site} answers; it cleans up after itself", code="site_alive")
            given_up = [s for s in self._runs.values() if s.site == site and s.fence > s.destroyed_fence]
            given_up = [s for s in given_up if self._unheld(s)]
            for stored in given_up:
                stored.destroyed_fence = stored.fence
            self._inventory = {key: row for key, row in self._inventory.items() if key[0] != site}
            self._sites[site] = known.model_copy(update={"forgotten_at": now})
            return len(given_up)

    def leases_of(self, run_ids: Collection[str]) -> Mapping[str, LeaseView]:
        with self._lock:
            return {run_id: self._runs[run_id].view() for run_id in run_ids if run_id in self._runs}

    def record_quarantined(self, run_id: str, fence: int) -> bool:
        with self._lock:
            stored = self._runs.get(run_id)
            if stored is None or not max(stored.destroyed_fence, stored.quarantined_fence) < fence <= stored.fence:
                return False
            stored.quarantined_fence = fence
            self._write(stored, EventType.QUARANTINED, fence=fence)
            return True

    def drain_worker(self, worker_id: str) -> None:
        with self._lock:
            if worker_id not in self._workers:
                raise NotFound
            self._draining.add(worker_id)
            self._workers[worker_id] = self._workers[worker_id].model_copy(update={"draining": True})

    def is_draining(self, worker_id: str) -> bool:
        with self._lock:
            return worker_id in self._draining

    def playing(self) -> Mapping[str, int]:
        with self._lock:
            owners = [s.lease_owner for s in self._runs.values() if s.lease_until is not None and s.lease_owner]
            return {owner: owners.count(owner) for owner in owners}

    # --- orders ---

    def store_plan(self, actions: Sequence[PlannedAction], *, asked_by: str, force: bool) -> CleanupPlan:
        with self._lock:
            plan = CleanupPlan(id=new_id("cln"), asked_by=asked_by, at=self.now(), force=force, actions=tuple(actions))
            self._plans[plan.id] = plan
            return plan

    def get_plan(self, plan_id: str) -> CleanupPlan:
        with self._lock:
            if plan_id not in self._plans:
                raise NotFound
            return self._plans[plan_id]

    def apply_plan(self, plan_id: str) -> CleanupPlan:
        with self._lock:
            plan = self.get_plan(plan_id)
            if plan.applied_at is not None:
                return plan
            refused = {"result": ActionResult.REFUSED.value}
            actions = tuple(
                one.model_copy(update=refused) if one.action is ActionKind.REFUSE else one for one in plan.actions
            )
            return self._keep_plan(plan.model_copy(update={"applied_at": self.now(), "actions": actions}))

    def orders(self, site: str) -> Sequence[Order]:
        with self._lock:
            return [
                Order(plan_id=plan.id, n=n, ref=one.ref, action=one.action, at=plan.applied_at)
                for _, plan in sorted(self._plans.items())
                for n, one in enumerate(plan.actions, start=1)
                if plan.applied_at is not None and one.ref.site == site and one.result is None
            ]

    def conclude_order(self, plan_id: str, n: int, result: str) -> bool:
        with self._lock:
            plan = self.get_plan(plan_id)
            if plan.applied_at is None or plan.actions[n - 1].result is not None:
                return False
            actions = list(plan.actions)
            actions[n - 1] = actions[n - 1].model_copy(update={"result": result})
            self._keep_plan(plan.model_copy(update={"actions": tuple(actions)}))
            return True

    def _keep_plan(self, plan: CleanupPlan) -> CleanupPlan:
        if all(one.result is not None for one in plan.actions):
            plan = plan.model_copy(update={"done_at": self.now()})
        self._plans[plan.id] = plan
        return plan

    # --- audit ---

    def begin_act(self, *, who: str, what: str, target: str, detail: Mapping[str, Any]) -> str:
        with self._lock:
            entry = AuditEntry(
                id=new_id("aud"), at=self.now(), who=who, what=what, target=target, detail=dict(detail), result=None
            )
            self._acts[entry.id] = entry
            return entry.id

    def end_act(self, entry_id: str, result: str) -> None:
        with self._lock:
            entry = self._acts[entry_id]
            self._acts[entry_id] = entry.model_copy(update={"result": entry.result or result})

    def list_acts(self, *, limit: int, before: str | None) -> tuple[Sequence[AuditEntry], str | None]:
        with self._lock:
            found = [entry for id_, entry in sorted(self._acts.items(), reverse=True) if before is None or id_ < before]
        items = found[:limit]
        return items, items[-1].id if len(found) > limit else None
