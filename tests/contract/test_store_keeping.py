"""What is kept beside the runs, on every store: outputs, sizes, the storage quota, and what is given up for its age."""

from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from service.adapters.memory import MemoryStore
from service.adapters.sql.schema import idempotency
from service.adapters.sql_store import SqlStore
from service.core.boundary import Artifact
from service.core.errors import NotFound, QuotaExceeded
from service.core.run import Phase, Run
from tests.contract.conftest import Store
from tests.contract.store_steps import DAY, LEASE, RUN_OUT, add_run, add_tenant, bring_to, finished_run
from tests.factories import make_bundle, make_result, make_run, make_run_id, make_scenario

A, B, C = ("sha256:" + letter * 64 for letter in "abc")
AT_ONCE = timedelta(0)


def bring(store: Store, digest: str, size: int, *, max_stored: int | None = None, tenant: str = "acme") -> Run:
    """Submit a run with a bundle of that size."""
    bundle, scenario = make_bundle(digest=digest, bytes_=size), make_scenario()
    run = make_run(tenant=tenant, scenario=scenario, bundle=bundle)
    return store.submit(run, scenario, bundle, max_queued=100, max_stored=max_stored)


def leave(store: Store, *, tenant: str = "acme", bundle: tuple[str, int] | None = None, **result: Any) -> Run:
    """A finished run that left this."""
    run = bring(store, *bundle, tenant=tenant) if bundle else add_run(store, tenant=tenant)
    held = bring_to(store, Phase.COLLECTING)
    store.finish(held.run.id, held.fence, make_result(**result))
    store.record_destroyed(held.run.id, held.fence)
    return store.get_run(run.id, tenant)


def outputs(**digests: tuple[str, int]) -> dict[str, Any]:
    named = {name.replace("_", "."): value for name, value in digests.items()}
    return {
        "outputs": {name.lstrip("."): digest for name, (digest, _) in named.items()},
        "output_bytes": {name.lstrip("."): size for name, (_, size) in named.items()},
    }


class TestOutputs:
    def test_they_are_found_with_the_run_and_are_no_part_of_it(self, store: Store) -> None:
        add_tenant(store)
        run = leave(store, **outputs(_1_stdout=(A, 3), _1_stderr=(B, 4)))
        kept = store.get_kept(run.id, "acme")

        assert kept.outputs == {"1.stdout": A, "1.stderr": B}
        assert (kept.run, kept.purged) == (run, False)
        assert "outputs" not in run.model_dump()
        assert store.get_kept(add_run(store).id, "acme").outputs == {}

    def test_another_tenants_are_the_same_not_found_as_what_never_was(self, store: Store) -> None:
        add_tenant(store)
        run = leave(store, **outputs(_1_stdout=(A, 3)))
        for id_, who in ((run.id, "other"), (make_run_id(), "acme"), ("run_\0", "acme")):
            with pytest.raises(NotFound) as refusal:
                store.get_kept(id_, who)
            assert refusal.value.detail == NotFound().detail

    def test_their_blobs_are_given_up_with_the_last_run_that_uses_them(self, store: Store) -> None:
        add_tenant(store)
        first = leave(store, **outputs(_1_stdout=(A, 3), _2_stdout=(A, 3), _1_stderr=(B, 4)))
        second = leave(store, artifacts=(Artifact(path="a", bytes=3, sha256="a" * 64),))

        assert store.delete_run(first.id, "acme") == (B,)
        assert store.delete_run(second.id, "acme") == (A,)


class TestStorageQuota:
    def test_bundles_outputs_and_artifacts_count_each_of_a_tenants_blobs_once(self, store: Store) -> None:
        quota = add_tenant(store).quota.storage_bytes
        add_tenant(store, name="other")
        assert store.storage_left("acme") == quota
        for _ in range(2):
            leave(
                store, bundle=(A, 100), artifacts=(Artifact(path="a", bytes=20, sha256="b" * 64),),
                **outputs(_1_stdout=(B, 20), _1_stderr=(C, 3)),
            )  # fmt: skip

        assert store.storage_left("acme") == quota - 123
        assert store.storage_left("other") == quota
        assert store.storage_left("nobody") == 0

    def test_what_is_deleted_makes_room(self, store: Store) -> None:
        quota = add_tenant(store).quota.storage_bytes
        run = leave(store, bundle=(A, 100))
        store.delete_run(run.id, "acme")

        assert store.storage_left("acme") == quota

    def test_a_bundle_that_would_exceed_it_is_refused_in_numbers_and_stores_nothing(self, store: Store) -> None:
        add_tenant(store)
        bring(store, A, 700, max_stored=1000)
        with pytest.raises(QuotaExceeded, match=r"700 bytes of its quota of 1000; this bundle has 301"):
            bring(store, B, 301, max_stored=1000)

        assert len(store.list_runs("acme", phase=None, outcome=None, limit=10, before=None).items) == 1
        assert bring(store, B, 300, max_stored=1000).phase is Phase.QUEUED

    def test_a_bundle_that_is_kept_already_and_none_at_all_need_no_room(self, store: Store) -> None:
        add_tenant(store)
        bring(store, A, 700, max_stored=700)

        assert bring(store, A, 700, max_stored=700).phase is Phase.QUEUED
        assert add_run(store).phase is Phase.QUEUED

    def test_the_same_bytes_of_another_tenant_are_not_kept_already(self, store: Store) -> None:
        add_tenant(store)
        add_tenant(store, name="other")
        bring(store, A, 700)
        with pytest.raises(QuotaExceeded):
            bring(store, A, 700, tenant="other", max_stored=699)

    def test_a_quota_that_shrank_leaves_no_room_and_never_less(self, store: Store) -> None:
        tenant = add_tenant(store)
        bring(store, A, 700)
        shrunk = tenant.quota.model_copy(update={"storage_bytes": 500})
        store.update_tenant(tenant.model_copy(update={"quota": shrunk}))

        assert store.storage_left("acme") == 0

    def test_of_many_bundles_at_once_only_as_many_get_in_as_fit(self, sql_store: SqlStore) -> None:
        add_tenant(sql_store)

        def submitted(number: int) -> bool:
            try:
                bring(sql_store, f"sha256:{number:064x}", 100, max_stored=350)
            except QuotaExceeded:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(submitted, range(12))) == 3


class TestRetention:
    def test_only_finished_runs_of_that_age_have_expired(self, store: Store) -> None:
        add_tenant(store)
        done = [finished_run(store).id for _ in range(3)]
        add_run(store)

        assert [run.run_id for run in store.expired(older_than=AT_ONCE)] == done
        assert {run.tenant for run in store.expired(older_than=AT_ONCE)} == {"acme"}
        assert store.expired(older_than=DAY) == []

    def test_they_come_in_pages(self, store: Store) -> None:
        add_tenant(store)
        done = [finished_run(store).id for _ in range(3)]
        first = store.expired(older_than=AT_ONCE, limit=2)

        assert [run.run_id for run in first] == done[:2]
        assert [run.run_id for run in store.expired(older_than=AT_ONCE, after=done[1])] == done[2:]

    def test_blobs_are_given_up_once_and_the_record_stays(self, store: Store) -> None:
        quota = add_tenant(store).quota.storage_bytes
        run = leave(store, bundle=(A, 100), **outputs(_1_stdout=(B, 20)))
        other = leave(store, **outputs(_1_stdout=(B, 20)))

        assert store.give_up_blobs(run.id) == (A,)
        assert store.give_up_blobs(run.id) == ()
        assert store.get_run(run.id, "acme") == run
        assert store.get_kept(run.id, "acme").purged
        assert not store.get_kept(other.id, "acme").purged
        assert store.storage_left("acme") == quota - 20
        assert [run.run_id for run in store.expired(older_than=AT_ONCE, with_blobs=True)] == [other.id]
        assert store.delete_run(run.id, "acme") == ()
        assert store.give_up_blobs(other.id) == (B,)

    def test_a_run_that_is_not_finished_or_not_there_gives_up_nothing(self, store: Store) -> None:
        add_tenant(store)
        run = bring(store, A, 100)

        assert store.give_up_blobs(run.id) == store.give_up_blobs(make_run_id()) == store.give_up_blobs("\0") == ()
        assert not store.get_kept(run.id, "acme").purged

    def test_idempotency_keys_are_forgotten_after_their_day_and_not_before(self, store: Store) -> None:
        for key in ("old", "new"):
            store.begin_idempotent("acme", key, stale_after=LEASE)
        take_back(store, "old", by=DAY + timedelta(seconds=1))

        assert store.purge_idempotency(dry_run=True) == 1
        assert store.purge_idempotency(dry_run=False) == 1
        assert store.purge_idempotency(dry_run=True) == 0
        assert store.begin_idempotent("acme", "old", stale_after=LEASE).answer is None
        assert store.begin_idempotent("acme", "new", stale_after=RUN_OUT).answer is None


def take_back(store: Store, key: str, *, by: timedelta) -> None:
    """As if the key had been taken so long ago."""
    at: datetime = store.now() - by
    if isinstance(store, MemoryStore):
        store._idempotency["acme", key].at = at
        return
    with store._db.write() as connection:
        connection.execute(sa.update(idempotency).where(idempotency.c.key == key).values(taken_at=at))
