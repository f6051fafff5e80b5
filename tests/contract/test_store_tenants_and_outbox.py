"""Tenants, keys, workers and the outbox on every store."""

from datetime import timedelta

import pytest

from service.core.errors import Conflict, NotFound
from service.core.ports.tenants import KeyRecord, WorkerRecord
from service.core.run import Outcome, Phase, Reason
from service.core.tenancy import CeilingLimits, Ceilings, KeyKind, Quota, Trust
from tests.contract.conftest import Store
from tests.contract.store_steps import LEASE, RUN_OUT, add_run, add_tenant, bring_to, claimed, told, types_told
from tests.factories import make_capabilities, make_result, make_tenant


def make_key(*, id_: str = "key_1", hash_: str = "hash-1", **more: str) -> KeyRecord:
    return KeyRecord(id=id_, kind=KeyKind(more.pop("kind", "tenant")), hash=hash_, **more)


class TestTenants:
    def test_a_tenant_comes_back_as_it_was_made(self, store: Store) -> None:
        service = store.create_service("shop")
        tenant = make_tenant(
            trust=Trust.TRUSTED, affinity="gpu", service_id=service.id,
            ceilings=Ceilings(limits=CeilingLimits.model_validate({"memory": "1GiB", "wall": "90s", "cpu": 1.5})),
        )  # fmt: skip

        assert store.create_tenant(tenant) == tenant == store.get_tenant("acme", service_id=service.id)

    def test_a_name_is_taken_once_and_for_ever(self, store: Store) -> None:
        add_tenant(store)
        for deleted in (False, True):
            with pytest.raises(Conflict) as refusal:
                add_tenant(store)
            assert refusal.value.code == "tenant_exists"
            if not deleted:
                store.delete_tenant("acme")

    def test_what_is_absent_deleted_or_another_services_is_the_same_not_found(self, store: Store) -> None:
        mine, other = store.create_service("mine"), store.create_service("other")
        add_tenant(store, name="theirs", service_id=other.id)
        add_tenant(store, name="operators")
        add_tenant(store, name="gone", service_id=mine.id)
        store.delete_tenant("gone")
        refusals = set()
        for name in ("theirs", "operators", "gone", "never", "\0"):
            with pytest.raises(NotFound) as refusal:
                store.get_tenant(name, service_id=mine.id)
            refusals.add(refusal.value.detail)

        assert len(refusals) == 1
        for change in (lambda: store.delete_tenant("gone"), lambda: store.update_tenant(make_tenant(name="gone"))):
            with pytest.raises(NotFound):
                change()

    def test_lists_show_a_service_its_own_and_an_operator_all_but_the_internal(self, store: Store) -> None:
        service = store.create_service("shop")
        for name, owner in (("bbb", None), ("aaa", service.id), ("_canary", None), ("ccc", service.id)):
            add_tenant(store, name=name, service_id=owner)
        store.delete_tenant("ccc")

        assert [tenant.name for tenant in store.list_tenants()] == ["aaa", "bbb"]
        assert [tenant.name for tenant in store.list_tenants(service_id=service.id)] == ["aaa"]
        assert store.get_tenant("_canary").name == "_canary"

    def test_an_update_changes_all_but_the_owner(self, store: Store) -> None:
        service = store.create_service("shop")
        tenant = add_tenant(store, service_id=service.id)
        wanted = tenant.model_copy(update={"trust": Trust.TRUSTED, "quota": Quota(concurrent=9), "affinity": "gpu"})

        changed = store.update_tenant(wanted.model_copy(update={"service_id": None}))
        assert changed == wanted == store.get_tenant("acme")

    def test_deleting_a_tenant_cancels_its_runs_and_revokes_its_keys(self, store: Store) -> None:
        for name in ("acme", "other"):
            add_tenant(store, name=name)
            store.add_key(make_key(id_=f"key_{name}", hash_=name, tenant=name))
        running, queued = add_run(store), add_run(store)
        held = bring_to(store, Phase.RUNNING)
        others = add_run(store, tenant="other")
        store.delete_tenant("acme")
        done = store.get_run(queued.id, None)

        assert store.find_key("acme") is None
        assert store.find_key("other") is not None
        assert (done.outcome, done.reason) == (Outcome.CANCELLED, Reason.CANCELLED_BY_OPERATOR)
        assert types_told(store, queued.id) == ["run.queued", "run.finished"]
        assert store.look(running.id, held.fence).cancel_requested_by == "operator"
        assert store.get_run(others.id, None).phase is Phase.QUEUED

    def test_a_service_name_is_taken_once(self, store: Store) -> None:
        services = [store.create_service(name) for name in ("b", "a")]
        with pytest.raises(Conflict) as refusal:
            store.create_service("a")

        assert refusal.value.code == "service_exists"
        assert list(store.list_services()) == services[::-1]


class TestKeys:
    def test_a_key_is_found_by_its_hash_until_it_is_revoked(self, store: Store) -> None:
        add_tenant(store)
        service = store.create_service("shop")
        store.add_key(make_key(tenant="acme"))
        store.add_key(make_key(id_="key_2", hash_="hash-2", kind="service", service_id=service.id))
        store.add_key(make_key(id_="key_3", hash_="hash-3", kind="operator"))
        found = [store.find_key(f"hash-{n}") for n in (1, 2, 3, 4)]

        assert [p and (p.key_id, p.kind, p.tenant, p.service_id) for p in found] == [
            ("key_1", KeyKind.TENANT, "acme", None),
            ("key_2", KeyKind.SERVICE, None, service.id),
            ("key_3", KeyKind.OPERATOR, None, None),
            None,
        ]
        store.revoke_key("key_2")
        assert store.find_key("hash-2") is None

    def test_a_key_of_another_tenant_or_one_that_is_no_more_cannot_be_revoked(self, store: Store) -> None:
        add_tenant(store)
        store.add_key(make_key(tenant="acme"))
        for key_id, tenant in (("key_1", "other"), ("key_9", None), ("\0", None)):
            with pytest.raises(NotFound):
                store.revoke_key(key_id, tenant=tenant)
        store.revoke_key("key_1", tenant="acme")
        with pytest.raises(NotFound):
            store.revoke_key("key_1", tenant="acme")

    def test_a_key_needs_whom_it_speaks_for(self, store: Store) -> None:
        for key in (make_key(tenant="nobody"), make_key(kind="service", service_id="svc_nobody")):
            with pytest.raises(NotFound):
                store.add_key(key)

    def test_the_keys_of_the_last_start_are_revoked_together(self, store: Store) -> None:
        for n, minted_by in enumerate(("up", "up", "api")):
            store.add_key(make_key(id_=f"key_{n}", hash_=f"hash-{n}", kind="operator", minted_by=minted_by))

        assert [store.revoke_minted_by("up") for _ in range(2)] == [2, 0]
        assert [store.find_key(f"hash-{n}") is not None for n in range(3)] == [False, False, True]


class TestWorkers:
    def test_a_worker_lives_as_long_as_it_says_so(self, store: Store) -> None:
        rows = (make_capabilities(), make_capabilities(boundary="microvm", available=False, missing=("no KVM",)))
        worker = WorkerRecord(id="wrk_1", host="host-1", site="host-1", capabilities=rows)
        store.record_worker(worker)
        store.record_worker(worker.model_copy(update={"host": "renamed"}))
        (live,) = store.live_workers(fresh=LEASE)

        assert (live.host, live.capabilities) == ("renamed", rows)
        assert live.measured_at is not None
        assert store.now() - live.measured_at < LEASE
        assert list(store.live_workers(fresh=RUN_OUT)) == []
        assert store.get_worker("wrk_1") == live
        store.forget_worker("wrk_1")
        store.forget_worker("wrk_1")
        assert store.get_worker("wrk_1") is None
        assert list(store.live_workers(fresh=LEASE)) == []


class TestOutbox:
    def test_one_leads_until_its_lease_runs_out_or_it_steps_down(self, store: Store) -> None:
        assert store.lead("one", lease=LEASE)
        assert store.lead("one", lease=LEASE)
        assert not store.lead("two", lease=LEASE)
        assert store.lead("one", lease=RUN_OUT)
        assert store.lead("two", lease=LEASE)
        assert not store.lead("one", lease=LEASE)

    def test_only_the_leader_stamps(self, store: Store) -> None:
        add_tenant(store)
        add_run(store)
        assert list(store.stamp("one", limit=9)) == []
        store.lead("one", lease=RUN_OUT)
        assert list(store.stamp("one", limit=9)) == []
        store.lead("two", lease=LEASE)

        assert list(store.stamp("one", limit=9)) == []
        assert [row.pub_seq for row in store.stamp("two", limit=9)] == [1]

    def test_stamps_have_no_gaps_and_go_by_age(self, store: Store) -> None:
        add_tenant(store, concurrent=9)
        runs = [add_run(store).id for _ in range(5)]
        claimed(store)
        store.lead("relay", lease=LEASE)
        first, second = store.stamp("relay", limit=4), store.stamp("relay", limit=4)

        assert [row.pub_seq for row in (*first, *second)] == [1, 2, 3, 4, 5, 6]
        assert [row.run_id for row in (*first, *second)] == [*runs, runs[0]]
        assert list(store.stamp("relay", limit=4)) == []
        assert store.last_stamp() == 6
        assert all(row.event["id"] == row.event_id and row.event["type"] == row.type for row in first)

    def test_what_is_not_known_to_be_published_stays_so(self, store: Store) -> None:
        add_tenant(store)
        for _ in range(3):
            add_run(store)
        store.lead("relay", lease=LEASE)
        store.stamp("relay", limit=9)
        store.mark_published([1, 3])
        store.mark_published([])

        assert [row.pub_seq for row in store.unpublished(limit=9)] == [2]
        assert [row.pub_seq for row in store.retained(after=1, limit=1)] == [2]
        assert store.mark_unpublished_after(0) == 2
        assert [row.pub_seq for row in store.unpublished(limit=2)] == [1, 2]
        assert store.mark_unpublished_after(3) == 0

    def test_an_event_that_is_told_again_gets_a_new_number_and_keeps_all_else(self, store: Store) -> None:
        add_tenant(store, concurrent=9)
        for _ in range(5):
            add_run(store)
        store.lead("relay", lease=LEASE)
        first = {row.pub_seq: row.event_id for row in store.stamp("relay", limit=9)}
        store.mark_published(list(first))

        assert store.stamp_again("relay", first=2, last=4, limit=2) == 2
        assert store.stamp_again("relay", first=2, last=4, limit=2) == 1
        assert store.stamp_again("relay", first=2, last=4, limit=2) == 0
        assert {row.pub_seq: row.event_id for row in store.unpublished(limit=9)} == {
            6: first[2], 7: first[3], 8: first[4]
        }  # fmt: skip
        assert [row.pub_seq for row in store.retained(after=0, limit=9)] == [1, 5, 6, 7, 8]
        assert store.last_stamp() == 8
        add_run(store)
        assert [row.pub_seq for row in store.stamp("relay", limit=9)] == [9]

    def test_what_readers_are_owed_is_kept_and_only_the_leader_writes_it(self, store: Store) -> None:
        owed = {"app": ((1, 5), (9, 9)), 'odd "group"\u20ac': ((2, 2),)}
        assert store.owed() == {}
        assert not store.record_owed("one", owed)
        store.lead("one", lease=LEASE)
        assert store.record_owed("one", owed)

        assert store.owed() == owed
        assert not store.record_owed("two", {})
        assert store.stamp_again("two", first=1, last=9, limit=9) == 0
        store.lead("one", lease=RUN_OUT)
        assert not store.record_owed("one", {})
        assert store.stamp_again("one", first=1, last=9, limit=9) == 0
        assert store.owed() == owed

    def test_the_events_of_internal_tenants_get_no_number(self, store: Store) -> None:
        add_tenant(store, name="_canary")
        add_tenant(store)
        canary = add_run(store, tenant="_canary")

        assert told(store, canary.id) == []
        assert len(told(store, add_run(store).id)) == 1
        assert store.last_stamp() == 1

    def test_the_bus_is_remembered_by_its_identity(self, store: Store) -> None:
        assert store.bus_identity() is None
        for identity in ("one", "two"):
            store.record_bus_identity(identity)
            assert store.bus_identity() == identity

    def test_the_installation_has_a_name_that_is_safe_in_labels(self, store: Store) -> None:
        name = store.installation_id()

        assert name == store.installation_id()
        assert len(name) >= 8
        assert set(name) <= set("0123456789abcdef")

    def test_the_last_event_has_the_result_without_its_output(self, store: Store) -> None:
        add_tenant(store)
        add_run(store)
        held = claimed(store)
        store.finish(held.run.id, held.fence, make_result())
        data = told(store, held.run.id)[-1]["data"]

        assert data["id"] == held.run.id
        assert (data["phase"], data["outcome"]) == ("finished", "passed")
        assert "text" not in data["steps"][0]["stdout"]
        assert store.now() - timedelta(minutes=1) < store.get_run(held.run.id, None).created_at
