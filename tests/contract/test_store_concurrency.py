"""What must hold when many act at once: real threads and processes on the real databases."""

import multiprocessing
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import pytest
import sqlalchemy as sa

from service.adapters.sql.schema import run as run_table
from service.adapters.sql_store import SqlStore
from service.core.errors import BlastdoorError, IdempotencyInFlight, LeaseLost, NotFound, QuotaExceeded
from service.core.ports.runs import Claim
from service.core.run import Outcome, Phase
from tests.contract.store_steps import LEASE, RUN_OUT, add_run, add_tenant, bring_to, claim, claimed, told, types_told
from tests.factories import make_result

T = TypeVar("T")
MANY = 20


def at_once(calls: Sequence[Callable[[], T]]) -> list[T | BlastdoorError]:
    """Each call in a thread of its own, all let go at the same moment; what they return or refuse, in their order."""
    start = threading.Barrier(len(calls))

    def one(call: Callable[[], T]) -> T | BlastdoorError:
        start.wait()
        try:
            return call()
        except BlastdoorError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(one, calls))


@pytest.fixture
def stores(sql_store: SqlStore) -> Iterator[list[SqlStore]]:
    """The same database as many processes would have it: each with its own connections and its own locks."""
    url = sql_store._db.url.render_as_string(hide_password=False)
    opened = [SqlStore(url, synchronous="NORMAL") for _ in range(MANY)]
    yield opened
    for store in opened:
        store.close()


def fence_of(sql_store: SqlStore, run_id: str) -> int:
    view = sql_store.lease_of(run_id)
    assert view is not None
    return view.fence


class TestClaims:
    def test_claims_at_once_exceed_no_cap_and_share_no_run(self, sql_store: SqlStore, stores: list[SqlStore]) -> None:
        for name, cap in (("aaa", 3), ("bbb", 4)):
            add_tenant(sql_store, name=name, concurrent=cap)
            for _ in range(MANY // 2):
                add_run(sql_store, tenant=name)
        found = [got for got in at_once([partial(claim, own) for own in stores]) if got is not None]

        assert all(isinstance(got, Claim) for got in found), found
        claims = [got for got in found if isinstance(got, Claim)]
        assert Counter(got.run.tenant for got in claims) == {"aaa": 3, "bbb": 4}
        assert len({got.run.id for got in claims}) == 7

    def test_a_whole_queue_is_worked_off_with_no_cap_exceeded_at_any_moment(self, sql_store: SqlStore) -> None:
        caps = {"aaa": 1, "bbb": 2}
        waiting = set()
        for name, cap in caps.items():
            add_tenant(sql_store, name=name, concurrent=cap)
            waiting |= {add_run(sql_store, tenant=name).id for _ in range(MANY // 2)}
        seen, active, lock = Counter[str](), Counter[str](), threading.Lock()
        exceeded: list[str] = []

        def work() -> None:
            while len(seen) < MANY:
                held = claim(sql_store)
                if held is None:
                    continue
                with lock:  # counted from after the claim to before the end: never more than the database's own count
                    seen[held.run.id] += 1
                    active[held.run.tenant] += 1
                    exceeded.extend(name for name, cap in caps.items() if active[name] > cap)
                sql_store.mark_running(held.run.id, held.fence)
                with lock:
                    active[held.run.tenant] -= 1
                sql_store.finish(held.run.id, held.fence, make_result())

        assert at_once([work] * 6) == [None] * 6
        assert exceeded == []
        assert seen == Counter(waiting)

    def test_a_run_that_is_being_changed_is_passed_over_not_waited_for(self, postgresql_store: SqlStore) -> None:
        add_tenant(postgresql_store)
        changed, next_ = add_run(postgresql_store).id, add_run(postgresql_store).id
        with postgresql_store._db.write() as connection:
            connection.execute(sa.select(run_table.c.id).where(run_table.c.id == changed).with_for_update())

            assert claimed(postgresql_store).run.id == next_

    def test_a_tenant_deleted_among_claims_stops_nobody(self, sql_store: SqlStore) -> None:
        for name in ("aaa", "bbb"):
            add_tenant(sql_store, name=name, concurrent=MANY)
            for _ in range(MANY // 2):
                add_run(sql_store, tenant=name)
        answers: list[Any] = at_once([lambda: sql_store.delete_tenant("aaa"), *[lambda: claim(sql_store)] * 12])

        assert [answer for answer in answers if isinstance(answer, BlastdoorError)] == []
        for held in answers[1:]:
            if held is not None and held.run.tenant == "aaa":
                assert sql_store.look(held.run.id, held.fence).cancel_requested_by == "operator"
        assert all(view.phase is not Phase.QUEUED or view.run_id for view in sql_store.leases())
        left = sql_store.list_runs("aaa", phase=Phase.QUEUED, outcome=None, limit=100, before=None)
        assert left.items == ()

    @pytest.mark.parametrize("sql_store", ["sqlite", "postgresql"], indirect=True)
    def test_a_store_that_was_used_before_a_fork_works_on_both_sides(self, sql_store: SqlStore) -> None:
        add_tenant(sql_store, concurrent=MANY)
        waiting = {add_run(sql_store).id for _ in range(MANY)}
        fork = multiprocessing.get_context("fork")
        found = fork.SimpleQueue()

        def child() -> None:
            while (held := claim(sql_store)) is not None:
                sql_store.mark_running(held.run.id, held.fence)
                found.put(held.run.id)

        children = [fork.Process(target=child) for _ in range(3)]
        for process in children:
            process.start()
        seen = [found.get() for _ in range(MANY)]
        for process in children:
            process.join(30)

        assert [process.exitcode for process in children] == [0, 0, 0]
        assert Counter(seen) == Counter(waiting)
        for run_id in waiting:
            sql_store.finish(run_id, fence_of(sql_store, run_id), make_result())


class TestSubmissions:
    def test_submissions_with_one_idempotency_key_make_one_run(self, sql_store: SqlStore) -> None:
        add_tenant(sql_store)

        def submit() -> str:
            held = sql_store.begin_idempotent("acme", "k", stale_after=LEASE)
            if held.answer is not None:
                return str(held.answer["id"])
            return add_run(sql_store, idempotency=("k", held.token, "sha256:same")).id

        answers = at_once([submit] * MANY)
        runs = sql_store.list_runs("acme", phase=None, outcome=None, limit=100, before=None).items

        assert len(runs) == 1
        assert {a for a in answers if not isinstance(a, IdempotencyInFlight)} == {runs[0].id}
        assert submit() == runs[0].id

    def test_a_bounded_queue_is_never_longer(self, sql_store: SqlStore, stores: list[SqlStore]) -> None:
        add_tenant(sql_store)
        for _ in range(90):
            add_run(sql_store)
        answers = at_once([partial(add_run, own, max_queued=100) for own in stores])

        assert sum(isinstance(answer, QuotaExceeded) for answer in answers) == MANY - 10
        queued = sql_store.list_runs("acme", phase=Phase.QUEUED, outcome=None, limit=200, before=None)
        assert len(queued.items) == 100


class TestEnds:
    def test_of_many_who_finish_a_run_one_does(self, sql_store: SqlStore) -> None:
        add_tenant(sql_store)
        run = add_run(sql_store)
        held = bring_to(sql_store, Phase.COLLECTING)
        answers = at_once([lambda: sql_store.finish(run.id, held.fence, make_result())] * 8)

        assert Counter(type(answer) for answer in answers) == {type(None): 1, LeaseLost: 7}
        assert types_told(sql_store, run.id).count("run.finished") == 1

    def test_a_cancel_that_races_a_claim_or_a_finish_leaves_one_end(self, sql_store: SqlStore) -> None:
        add_tenant(sql_store, concurrent=MANY)
        for _ in range(MANY // 2):
            run = add_run(sql_store)
            _, held = at_once([lambda: sql_store.request_cancel(run.id, "acme", by="tenant"), lambda: claim(sql_store)])  # noqa: B023
            if isinstance(held, Claim):
                assert sql_store.look(run.id, held.fence).cancel_requested_by == "tenant"
                at_once(
                    [
                        lambda: sql_store.request_cancel(run.id, None, by="operator"),  # noqa: B023
                        lambda: sql_store.finish(run.id, held.fence, make_result()),  # noqa: B023
                        lambda: sql_store.heartbeat(run.id, held.fence, lease=LEASE),  # noqa: B023
                    ]
                )
            done = sql_store.get_run(run.id, "acme")
            assert done.phase is Phase.FINISHED
            assert done.outcome in (Outcome.PASSED, Outcome.CANCELLED)
            assert types_told(sql_store, run.id).count("run.finished") == 1

    def test_of_many_who_recover_a_run_one_does(self, sql_store: SqlStore) -> None:
        add_tenant(sql_store)
        add_run(sql_store)
        claimed(sql_store, lease=RUN_OUT)
        (view,) = sql_store.leases()

        assert sorted(map(bool, at_once([lambda: sql_store.recover_requeue(view)] * 8))) == [False] * 7 + [True]

    def test_a_boundary_is_recorded_as_destroyed_by_one_of_many(self, sql_store: SqlStore) -> None:
        add_tenant(sql_store)
        run = add_run(sql_store)
        bring_to(sql_store, Phase.FINISHED)

        assert sum(map(bool, at_once([lambda: sql_store.record_destroyed(run.id, 1)] * 8))) == 1

    def test_a_run_deleted_among_submissions_gives_up_no_blob_that_one_of_them_uses(self, sql_store: SqlStore) -> None:
        add_tenant(sql_store)
        digest = "sha256:" + "a" * 64
        for _ in range(5):
            run = add_run(sql_store, bundle=digest)
            sql_store.request_cancel(run.id, "acme", by="tenant")
        runs = sql_store.list_runs("acme", phase=None, outcome=None, limit=9, before=None).items
        deletions: list[Callable[[], Any]] = [partial(sql_store.delete_run, run.id, "acme") for run in runs]
        submit: Callable[[], Any] = partial(add_run, sql_store, bundle=digest)
        freed: list[Any] = at_once([submit, *deletions])[1:]

        assert sum(digest in given_up for given_up in freed) <= 1
        with pytest.raises(NotFound):
            sql_store.get_run(runs[0].id, "acme")


class TestRelays:
    def test_two_who_stamp_at_once_leave_no_gap_and_no_number_twice(self, sql_store: SqlStore) -> None:
        add_tenant(sql_store)
        for _ in range(MANY):
            add_run(sql_store)
        at_once([lambda: sql_store.lead("one", lease=LEASE), lambda: sql_store.lead("two", lease=LEASE)])
        calls = [partial(sql_store.stamp, who, limit=3) for who in ("one", "two") * MANY]
        stamped = [row for rows in at_once(calls) if not isinstance(rows, BlastdoorError) for row in rows]

        assert sorted(row.pub_seq for row in stamped) == list(range(1, MANY + 1))

    def test_of_many_who_want_to_lead_one_does(self, sql_store: SqlStore) -> None:
        calls = [partial(sql_store.lead, str(who), lease=LEASE) for who in range(8)]

        assert sum(map(bool, at_once(calls))) == 1

    def test_events_are_numbered_in_the_order_of_their_run_while_others_write(self, sql_store: SqlStore) -> None:
        add_tenant(sql_store, concurrent=MANY)
        runs = [add_run(sql_store).id for _ in range(6)]
        assert sql_store.lead("relay", lease=LEASE)

        def stamp() -> None:
            for _ in range(30):
                sql_store.stamp("relay", limit=2)

        at_once([*[lambda: bring_to(sql_store, Phase.FINISHED)] * len(runs), stamp])
        for run_id in runs:
            assert [event["sequence"] for event in told(sql_store, run_id)] == [f"{n:010d}" for n in range(1, 6)]
