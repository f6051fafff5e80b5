"""Endpoints, deliveries and their log on every store."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest

from service.adapters.sql_store import SqlStore
from service.core.errors import Conflict, NotFound, QuotaExceeded
from service.core.ids import new_id
from service.core.webhooks.models import Claimed, Endpoint, Owner, SealedEndpoint, Settlement
from service.core.webhooks.schedule import Fault, State
from tests.contract.conftest import Store
from tests.contract.store_steps import DAY, LEASE, RUN_OUT, add_run, add_tenant, finished_run

ACME = Owner(tenant="acme")
EVENTS_OF_A_RUN = 6
LATER = timedelta(minutes=5)


def add_endpoint(store: Store, owner: Owner = ACME, *, types: Sequence[str] = ("*",), most: int = 20) -> Endpoint:
    sealed = SealedEndpoint(id=new_id("whk"), owner=owner, url="https://a.example/x", types=tuple(types), secret="s1")
    return store.add_endpoint(sealed, most=most)


def sent(store: Store, endpoint: Endpoint, *, most: int = 100, lease: timedelta = LEASE) -> Sequence[Claimed]:
    store.fan_out(limit=1000)
    return store.claim_deliveries({endpoint.id: most}, lease=lease)


def settlement(claimed: Claimed, **more: Any) -> Settlement:
    words: dict[str, Any] = {"state": State.DELIVERED, "status": 200, "error": None}
    same = {name: getattr(claimed, name) for name in ("delivery_id", "endpoint_id", "fence")}
    return Settlement(**same | words | more)


def failed(claimed: Claimed, *, wait: timedelta | None = LATER, **more: Any) -> Settlement:
    state = State.DEAD if wait is None else State.PENDING
    return settlement(claimed, **{"state": state, "status": 500, "error": Fault.STATUS, "wait": wait} | more)


@pytest.fixture
def endpoint(store: Store) -> Endpoint:
    add_tenant(store)
    return add_endpoint(store)


class TestEndpoints:
    def test_one_comes_back_as_it_was_made_and_only_to_its_owner(self, store: Store, endpoint: Endpoint) -> None:
        add_tenant(store, name="other")
        service = store.create_service("shop")
        assert store.get_endpoint(endpoint.id, ACME) == endpoint
        assert (endpoint.types, endpoint.enabled, endpoint.old_secret_until) == (("*",), True, None)
        for owner in (Owner(tenant="other"), Owner(service_id=service.id)):
            assert list(store.list_endpoints(owner)) == []
            for refused in (
                lambda owner=owner: store.get_endpoint(endpoint.id, owner),
                lambda owner=owner: store.delete_endpoint(endpoint.id, owner),
                lambda owner=owner: store.rotate_secret(endpoint.id, owner, secret="x", old_signs=DAY),
                lambda owner=owner: store.list_attempts(endpoint.id, owner, limit=9, before=None),
            ):
                with pytest.raises(NotFound):
                    refused()
        for never in ("whk_never", "\0"):
            with pytest.raises(NotFound):
                store.get_endpoint(never, ACME)

        assert list(store.list_endpoints(ACME)) == [endpoint]

    def test_an_owner_has_so_many_and_no_more(self, store: Store, endpoint: Endpoint) -> None:
        second = add_endpoint(store, most=2)
        with pytest.raises(QuotaExceeded):
            add_endpoint(store, most=2)
        store.delete_endpoint(endpoint.id, ACME)

        assert list(store.list_endpoints(ACME)) == [second]
        assert add_endpoint(store, most=2).id > second.id

    def test_an_owner_that_is_not_there_has_none(self, store: Store) -> None:
        for owner in (ACME, Owner(service_id="svc_never")):
            with pytest.raises(NotFound):
                add_endpoint(store, owner)

    def test_after_a_rotation_both_secrets_sign_for_a_while(self, store: Store, endpoint: Endpoint) -> None:
        add_run(store)
        rotated = store.rotate_secret(endpoint.id, ACME, secret="s2", old_signs=DAY)
        (claimed,) = sent(store, endpoint, lease=RUN_OUT)
        assert claimed.secrets == ("s2", "s1")
        assert rotated.old_secret_until is not None
        assert abs(rotated.old_secret_until - store.now() - DAY) < LEASE

        store.rotate_secret(endpoint.id, ACME, secret="s3", old_signs=RUN_OUT)
        (claimed,) = sent(store, endpoint)
        assert claimed.secrets == ("s3",)

    def test_a_deleted_tenant_s_are_gone_and_its_services_stay(self, store: Store) -> None:
        service = store.create_service("shop")
        add_tenant(store, service_id=service.id)
        mine, whole = add_endpoint(store), add_endpoint(store, Owner(service_id=service.id))
        add_run(store)
        store.fan_out(limit=10)
        store.delete_tenant("acme")

        assert list(store.list_endpoints(ACME)) == []
        assert list(store.claim_deliveries({mine.id: 9}, lease=LEASE)) == []
        types = [claimed.body for claimed in sent(store, whole)]
        assert len(types) == 2  # queued, and the end that the deletion made


class TestFanOut:
    def test_each_event_becomes_one_delivery_for_each_that_wants_it(self, store: Store) -> None:
        service = store.create_service("shop")
        add_tenant(store, service_id=service.id)
        add_tenant(store, name="other")
        everything = add_endpoint(store)
        ends = add_endpoint(store, types=("dev.blastdoor.run.finished",))
        whole = add_endpoint(store, Owner(service_id=service.id))
        others = add_endpoint(store, Owner(tenant="other"))
        run = finished_run(store)

        assert store.fan_out(limit=4) == 4
        assert store.fan_out(limit=100) == EVENTS_OF_A_RUN - 4
        assert store.fan_out(limit=100) == 0
        bodies = {e.id: [c.body for c in sent(store, e)] for e in (everything, ends, whole, others)}
        assert {id_: len(found) for id_, found in bodies.items()} == {
            everything.id: EVENTS_OF_A_RUN, ends.id: 1, whole.id: EVENTS_OF_A_RUN, others.id: 0,
        }  # fmt: skip
        assert bodies[whole.id] == bodies[everything.id]
        assert run.id in str(bodies[ends.id][0])

    def test_what_was_before_the_endpoint_and_what_is_internal_is_not_sent(self, store: Store) -> None:
        add_tenant(store)
        add_tenant(store, name="_canary")
        first = add_endpoint(store)
        add_run(store)  # not yet fanned out when the second one is made
        second = add_endpoint(store)
        add_run(store, tenant="_canary")

        assert len(sent(store, first)) == 1
        assert len(sent(store, second)) == 0

    def test_where_nobody_listens_there_is_nothing_to_do(self, store: Store) -> None:
        add_tenant(store)
        finished_run(store)
        add_endpoint(store)
        if isinstance(store, SqlStore):
            assert store.fan_out(limit=100) == 0
        assert list(store.due_endpoints(not_now=(), limit=9)) == []


class TestSending:
    def test_a_claimed_one_is_nobody_else_s_until_its_lease_ends(self, store: Store, endpoint: Endpoint) -> None:
        for _ in range(3):
            add_run(store)
        store.fan_out(limit=9)
        assert [due.endpoint_id for due in store.due_endpoints(not_now=(), limit=9)] == [endpoint.id]
        assert list(store.due_endpoints(not_now=[endpoint.id], limit=9)) == []
        dropped = sent(store, endpoint, most=2, lease=RUN_OUT)
        again = sent(store, endpoint)

        assert {one.event_id for one in dropped} < {one.event_id for one in again}
        assert len(again) == 3
        assert [one.fence for one in sorted(again, key=lambda one: one.delivery_id)] == [2, 2, 1]
        assert list(store.due_endpoints(not_now=(), limit=9)) == []
        assert list(sent(store, endpoint)) == []
        assert store.settle_deliveries([settlement(dropped[0])]) == 0  # its lease was taken over
        store.give_back_deliveries(again[:1])
        assert [one.event_id for one in sent(store, endpoint)] == [again[0].event_id]

    def test_every_attempt_is_in_the_log_the_newest_first(self, store: Store, endpoint: Endpoint) -> None:
        add_run(store)
        (one,) = sent(store, endpoint)
        assert store.settle_deliveries([failed(one, wait=RUN_OUT, duration=timedelta(seconds=1.5))]) == 1
        assert store.settle_deliveries([failed(one)]) == 0
        (two,) = sent(store, endpoint)
        assert (two.tries, two.event_id) == (1, one.event_id)
        store.settle_deliveries([settlement(two)])
        page = store.list_attempts(endpoint.id, ACME, limit=9, before=None)

        assert [(i.attempt, i.status, i.error) for i in page.items] == [(2, 200, None), (1, 500, "status")]
        assert {(i.id, i.event_id, i.type) for i in page.items} == {
            (one.delivery_id, one.event_id, "dev.blastdoor.run.queued")
        }
        assert page.items[0].next_at is None
        assert page.items[1].next_at is not None
        assert page.items[1].duration_s == 1.5
        assert (page.next_before, page.pending) == (None, 0)
        first = store.list_attempts(endpoint.id, ACME, limit=1, before=None)
        assert first.items == page.items[:1]
        assert store.list_attempts(endpoint.id, ACME, limit=1, before=first.next_before).items == page.items[1:]

    def test_a_failed_one_waits_its_time(self, store: Store, endpoint: Endpoint) -> None:
        add_run(store)
        (one,) = sent(store, endpoint)
        store.settle_deliveries([failed(one)])

        assert list(sent(store, endpoint)) == []
        assert list(store.due_endpoints(not_now=(), limit=9)) == []
        assert store.list_attempts(endpoint.id, ACME, limit=9, before=None).pending == 1

    def test_what_wants_nothing_any_more_gets_nothing(self, store: Store, endpoint: Endpoint) -> None:
        for _ in range(3):
            add_run(store)
        one, two = sent(store, endpoint, most=2)
        gone = failed(one, wait=None, status=410, error=Fault.GONE, disable=True)
        store.settle_deliveries([gone])
        add_run(store)
        disabled = store.get_endpoint(endpoint.id, ACME)

        assert (disabled.enabled, disabled.disabled_reason) == (False, "gone")
        assert list(sent(store, endpoint)) == []
        assert store.settle_deliveries([settlement(two)]) == 0
        letters = store.dead_letters(limit=9, before=None).items
        assert [letter.error for letter in letters] == ["endpoint_disabled", "endpoint_disabled", "gone"]
        with pytest.raises(Conflict) as refusal:
            store.replay_delivery(one.delivery_id, endpoint_id=endpoint.id, owner=ACME)
        assert refusal.value.code == "webhook_disabled"

    def test_a_dead_letter_can_be_sent_again_by_its_owner_and_by_an_operator(
        self, store: Store, endpoint: Endpoint
    ) -> None:
        add_tenant(store, name="other")
        elsewhere = add_endpoint(store, Owner(tenant="other"))
        for _ in range(2):
            add_run(store)
        both = sent(store, endpoint)
        store.settle_deliveries([failed(one, wait=None) for one in both])
        first = store.dead_letters(limit=1, before=None)
        (older,) = store.dead_letters(limit=1, before=first.next_before).items
        assert first.items[0].id > older.id
        assert (older.tenant, older.webhook_id, older.attempts, older.status) == ("acme", endpoint.id, 1, 500)
        for wrong in (
            {"endpoint_id": elsewhere.id, "owner": Owner(tenant="other")},
            {"endpoint_id": endpoint.id, "owner": Owner(tenant="other")},
            {"endpoint_id": elsewhere.id, "owner": ACME},
        ):
            with pytest.raises(NotFound):
                store.replay_delivery(older.id, **wrong)  # type: ignore[arg-type]
        for never in ("dlv_never", "\0"):
            with pytest.raises(NotFound):
                store.replay_delivery(never, endpoint_id=None, owner=None)

        assert store.replay_delivery(older.id, endpoint_id=endpoint.id, owner=ACME) == endpoint.id
        assert store.replay_delivery(first.items[0].id, endpoint_id=None, owner=None) == endpoint.id
        again = sent(store, endpoint)
        assert [(one.tries, one.fence) for one in again] == [(0, 4), (0, 4)]
        assert list(store.dead_letters(limit=9, before=None).items) == []
        store.settle_deliveries([settlement(again[0])])
        assert store.list_attempts(endpoint.id, ACME, limit=1, before=None).items[0].attempt == 2

    def test_what_has_ended_is_forgotten_by_its_age_and_what_waits_is_not(
        self, store: Store, endpoint: Endpoint
    ) -> None:
        for _ in range(3):
            add_run(store)
        one, two, three = sent(store, endpoint)
        store.settle_deliveries([settlement(one), failed(two, wait=None), failed(three)])
        at_once = timedelta(0)
        assert store.delivery_counts() == (1, 1)
        assert store.purge_deliveries(older_than=DAY, limit=9, dry_run=False) == 0
        assert store.purge_deliveries(older_than=at_once, limit=1, dry_run=True) == 2
        assert store.purge_deliveries(older_than=at_once, limit=1, dry_run=False) == 1
        assert store.purge_deliveries(older_than=at_once, limit=9, dry_run=False) == 1
        page = store.list_attempts(endpoint.id, ACME, limit=9, before=None)

        assert [item.id for item in page.items] == [three.delivery_id]
        assert page.pending == 1
        assert store.fan_out(limit=9) == 0


class TestManyDispatchers:
    def test_they_share_the_work_and_nothing_twice(self, sql_store: SqlStore) -> None:
        add_tenant(sql_store)
        endpoints = [add_endpoint(sql_store) for _ in range(2)]
        runs = 20
        for _ in range(runs):
            add_run(sql_store)
        url = sql_store._db.url.render_as_string(hide_password=False)

        def work(_: int) -> list[tuple[str, str]]:
            own, found = SqlStore(url, synchronous="NORMAL"), []
            try:
                while own.fan_out(limit=3):
                    pass
                while batch := own.claim_deliveries(dict.fromkeys((e.id for e in endpoints), 2), lease=LEASE):
                    own.settle_deliveries([settlement(one) for one in batch])
                    found += [(one.endpoint_id, one.event_id) for one in batch]
            finally:
                own.close()
            return found

        with ThreadPoolExecutor(4) as pool:
            told = Counter(pair for found in pool.map(work, range(4)) for pair in found)
        left = [(one.endpoint_id, one.event_id) for e in endpoints for one in sent(sql_store, e)]
        told.update(left)

        assert len(told) == runs * len(endpoints)
        assert set(told.values()) == {1}
