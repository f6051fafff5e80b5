"""Events that were told long ago, blobs that no run uses and what is left of deleted tenants, on every store."""

from datetime import timedelta

import pytest

from service.adapters.memory import MemoryStore
from service.core.errors import Conflict, NotFound
from service.core.run import Phase
from tests.contract.conftest import Store
from tests.contract.store_steps import RUN_OUT, add_run, add_tenant, bring_to, finished_run, told, types_told
from tests.factories import make_result

LONG = timedelta(hours=1)


class TestLeftovers:
    def published(self, store: Store) -> None:
        store.lead("relay", lease=LONG)
        store.mark_published([row.pub_seq for row in store.stamp("relay", limit=1000)])
        if isinstance(store, MemoryStore):  # there is nobody to fan out to
            for event in store._events:
                event.fanned = True

    def test_old_events_are_forgotten_when_they_were_told_and_not_before(self, store: Store) -> None:
        add_tenant(store)
        run = add_run(store)
        assert store.purge_events(older_than=RUN_OUT, dry_run=False) == 0, "nobody has been told"
        self.published(store)

        assert store.purge_events(older_than=LONG, dry_run=False) == 0
        assert store.purge_events(older_than=RUN_OUT, dry_run=True) == 1
        assert store.purge_events(older_than=RUN_OUT, dry_run=False) == 1
        assert told(store, run.id) == []
        bring_to(store, Phase.FINISHED)
        assert types_told(store, run.id)[-1] == "run.finished", "the run goes on telling"

    def test_many_events_go_page_by_page_and_what_is_not_told_stays_between_them(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("service.adapters.sql.leftovers._AT_ONCE", 5)
        add_tenant(store, queued=1000)
        first = add_run(store, max_queued=1000)
        for _ in range(22):
            add_run(store, max_queued=1000)
        store.lead("relay", lease=LONG)
        rows = store.stamp("relay", limit=1000)
        if isinstance(store, MemoryStore):
            self.published(store)
            store._events[0].published = False
        store.mark_published([row.pub_seq for row in rows if row.run_id != first.id])

        assert store.purge_events(older_than=RUN_OUT, dry_run=True) == 22
        assert store.purge_events(older_than=RUN_OUT, dry_run=False) == 22
        assert [row.run_id for row in store.unpublished(limit=10)] == [first.id]

    def test_a_deleted_tenant_is_purged_once_its_runs_have_ended_are_gone_and_are_told(self, store: Store) -> None:
        add_tenant(store, concurrent=9)
        add_tenant(store, name="other")
        finished_run(store)
        add_run(store)
        held = bring_to(store, Phase.RUNNING)
        others = add_run(store, tenant="other")
        store.begin_idempotent("acme", "key", stale_after=LONG)
        assert not store.purge_tenant("acme"), "it is not deleted"
        assert store.deleted_tenants() == []
        store.delete_tenant("acme")
        assert store.deleted_tenants() == ["acme"]

        assert not store.purge_tenant("acme"), "a run goes on"
        store.finish(held.run.id, held.fence, make_result())
        assert not store.purge_tenant("acme"), "its boundary is not known to be gone"
        store.record_destroyed(held.run.id, held.fence)
        assert not store.purge_tenant("acme"), "its events are not told"
        self.published(store)
        assert store.purge_tenant("acme")

        with pytest.raises(NotFound):
            store.get_run(held.run.id, None)
        assert told(store, held.run.id) == []
        assert "acme" in store.tenant_names()
        store.tenant_purged("acme")
        assert store.deleted_tenants() == []
        assert store.tenant_names() == ["other"]
        assert store.get_run(others.id, "other").id == others.id
        with pytest.raises(Conflict):
            add_tenant(store)

    def test_blobs_that_a_run_of_the_tenant_uses_are_not_unused(self, store: Store) -> None:
        add_tenant(store)
        used, unused = "sha256:" + "a" * 64, "sha256:" + "b" * 64
        add_run(store, bundle=used)

        assert list(store.unused_blobs("acme", [unused, used])) == [unused]
        assert list(store.unused_blobs("other", [used])) == [used]
