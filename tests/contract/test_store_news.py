"""What is told of a run while it goes on: who may tell it, in which order it comes back, and how long it is kept."""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa

from service.adapters.memory import MemoryStore
from service.adapters.sql.schema import outbox
from service.adapters.sql_store import SqlStore
from service.core.errors import LeaseLost, NotFound
from service.core.news import START, Mark, Newest, News, NewsKind, NewsPage, one_line
from service.core.run import Phase
from service.usecases.follow import next_told
from tests.contract.conftest import Store
from tests.contract.store_steps import (
    DAY,
    RUN_OUT,
    add_run,
    add_tenant,
    bring_to,
    claimed,
    finished_run,
    told,
)
from tests.factories import make_result, make_run_id

ANYTHING = "\0\x1b[2J\r\n\ndata: {}\n\nevent: result\u2028\u2029\x85\x0b\x0c\x1c\u202e𝄞\ud800é"


def news(*ks: int, text: str = "x", kind: NewsKind = NewsKind.OUTPUT) -> list[News]:
    return [News(k=k, kind=kind, data=one_line({"text": f"{text}{k}"})) for k in ks]


def page(store: Store, run_id: str, *, after: Mark = START, limit: int = 100) -> NewsPage:
    return store.read_news(run_id, "acme", after=after, limit=limit)


def marks(found: NewsPage) -> list[Mark]:
    return [one.mark for one in found.news]


def running(store: Store, **more: Any) -> tuple[str, int]:
    add_tenant(store)
    add_run(store)
    held = bring_to(store, Phase.RUNNING, **more)
    return held.run.id, held.fence


def all_told(store: Store, run_id: str, *, after: Mark = START) -> list[tuple[Mark, str, str]]:
    """As a watcher sees it, page by page."""
    seen: list[tuple[Mark, str, str]] = []
    while True:
        found = next_told(store, run_id=run_id, tenant="acme", after=after, worker_fresh=DAY)
        seen += [(one.mark, one.event, one.data) for one in found.items]
        after = found.after
        if not found.more:
            return seen


class TestAppending:
    def test_what_is_told_comes_back_as_it_is_in_its_phase(self, store: Store) -> None:
        run_id, fence = running(store)
        said = [News(k=1, kind=NewsKind.PROGRESS, data=one_line({"text": ANYTHING})), *news(2)]
        store.append_news(run_id, fence, said)

        found = page(store, run_id)
        assert [(one.seq, one.k, one.kind, one.data) for one in found.news] == [
            (3, each.k, each.kind, each.data) for each in said
        ]
        assert (found.seq, found.now.phase, found.more) == (3, Phase.RUNNING, False)

    def test_each_phase_counts_from_one_and_is_ordered_by_phase(self, store: Store) -> None:
        add_tenant(store)
        add_run(store)
        held = claimed(store)
        run_id, fence = held.run.id, held.fence
        store.append_news(run_id, fence, news(1))
        store.mark_running(run_id, fence, news=news(2, 3))
        store.append_news(run_id, fence, news(1, 2))
        store.mark_collecting(run_id, fence, news=news(3))
        store.finish(run_id, fence, make_result(), news=news(1))

        assert marks(page(store, run_id)) == [(2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (3, 3), (4, 1)]
        assert page(store, run_id).seq == 5

    def test_telling_it_again_changes_nothing_and_adds_what_is_new(self, store: Store) -> None:
        run_id, fence = running(store)
        store.append_news(run_id, fence, news(1, 2))
        store.append_news(run_id, fence, news(1, 2, 3, text="other"))

        assert [one.data for one in page(store, run_id).news] == [
            one.data for one in [*news(1, 2), *news(3, text="other")]
        ]

    def test_what_was_told_before_a_requeue_stays(self, store: Store) -> None:
        add_tenant(store)
        add_run(store)
        held = claimed(store)
        store.append_news(held.run.id, held.fence, news(1))
        store.requeue(held.run.id, held.fence, why="not ready", news=news(2))
        store.record_destroyed(held.run.id, held.fence)
        again = claimed(store)
        store.append_news(again.run.id, again.fence, news(1))

        # 3 is the requeueing, 4 the destroyed boundary, 5 the second claim.
        assert marks(page(store, held.run.id)) == [(2, 1), (2, 2), (5, 1)]


def _other_fence(store: Store, run_id: str, fence: int) -> tuple[str, int]:
    return run_id, fence + 1


def _finished(store: Store, run_id: str, fence: int) -> tuple[str, int]:
    store.mark_collecting(run_id, fence)
    store.finish(run_id, fence, make_result())
    return run_id, fence


def _never(store: Store, run_id: str, fence: int) -> tuple[str, int]:
    return make_run_id(), fence


class TestOnlyItsHolderTells:
    @pytest.mark.parametrize("change", [_other_fence, _finished, _never])
    def test_who_may_not_act_on_a_run_tells_nothing(
        self, store: Store, change: Callable[[Store, str, int], tuple[str, int]]
    ) -> None:
        run_id, fence = running(store)
        store.append_news(run_id, fence, news(1))
        with pytest.raises(LeaseLost):
            store.append_news(*change(store, run_id, fence), news(2))

        assert marks(page(store, run_id)) == [(3, 1)]

    def test_nor_who_let_the_lease_run_out(self, store: Store) -> None:
        add_tenant(store)
        add_run(store)
        held = claimed(store, lease=RUN_OUT)
        with pytest.raises(LeaseLost):
            store.append_news(held.run.id, held.fence, news(1))

        assert page(store, held.run.id).news == ()

    @pytest.mark.parametrize("write", ["mark_running", "mark_collecting", "finish", "requeue"])
    def test_a_change_that_is_refused_tells_nothing_either(self, store: Store, write: str) -> None:
        add_tenant(store)
        add_run(store)
        held = claimed(store, lease=RUN_OUT)
        writes: dict[str, Callable[[Sequence[News]], object]] = {
            "mark_running": lambda said: store.mark_running(held.run.id, held.fence, news=said),
            "mark_collecting": lambda said: store.mark_collecting(held.run.id, held.fence, news=said),
            "finish": lambda said: store.finish(held.run.id, held.fence, make_result(), news=said),
            "requeue": lambda said: store.requeue(held.run.id, held.fence, why="", news=said),
        }
        with pytest.raises(LeaseLost):
            writes[write](news(1))

        assert page(store, held.run.id).news == ()


class TestReading:
    def test_it_goes_on_after_any_mark_in_pages_of_any_size(self, store: Store) -> None:
        run_id, fence = running(store)
        store.append_news(run_id, fence, news(*range(1, 8)))
        store.mark_collecting(run_id, fence)
        store.append_news(run_id, fence, news(1, 2))
        every = [*((3, k) for k in range(1, 8)), (4, 1), (4, 2)]

        assert marks(page(store, run_id)) == every
        for start, mark in enumerate(every, start=1):
            found = page(store, run_id, after=mark, limit=3)
            assert marks(found) == every[start : start + 3]
            assert found.more == (len(every) - start > 3)
            assert set(found.phases) == {seq for seq in (1, 2, 3, 4) if seq > mark[0]}
        assert marks(page(store, run_id, after=(3, 999))) == every[7:]
        assert marks(page(store, run_id, after=(9, 0))) == []

    def test_the_phases_are_the_runs_events_but_not_its_boundarys(self, store: Store) -> None:
        add_tenant(store)
        run = finished_run(store)

        found = page(store, run.id)
        assert {seq: event["type"].rpartition(".")[2] for seq, event in found.phases.items()} == {
            1: "queued", 2: "provisioning", 3: "running", 4: "collecting", 5: "finished"
        }  # fmt: skip
        assert found.seq == 5
        assert found.now.outcome == run.outcome
        assert [event["type"] for event in told(store, run.id)][-1] == "dev.blastdoor.boundary.destroyed"

    def test_another_tenants_are_the_same_not_found_as_what_never_was(self, store: Store) -> None:
        run_id, _ = running(store)
        for id_, who in ((run_id, "other"), (make_run_id(), "acme"), ("run_\0", "acme")):
            with pytest.raises(NotFound) as refusal:
                store.read_news(id_, who, after=START, limit=1)
            assert refusal.value.detail == NotFound().detail
        assert store.read_news(run_id, None, after=START, limit=1).now.phase is Phase.RUNNING

    def test_the_newest_of_many_runs_is_one_question(self, store: Store) -> None:
        run_id, fence = running(store)
        store.append_news(run_id, fence, news(1, 2))
        waiting, never = add_run(store).id, make_run_id()

        assert store.newest([run_id, waiting, never, "\0"]) == {
            run_id: Newest(seq=3, k=2, phase=Phase.RUNNING), waiting: Newest(seq=1, k=0, phase=Phase.QUEUED)
        }  # fmt: skip
        assert store.newest([]) == {}
        _finished(store, run_id, fence)
        store.record_destroyed(run_id, fence)
        assert store.newest([run_id])[run_id] == Newest(seq=5, k=0, phase=Phase.FINISHED)

    def test_a_queued_run_says_where_it_stands(self, store: Store) -> None:
        add_tenant(store)
        add_run(store)
        second = add_run(store)

        assert page(store, second.id).now.queue_position == 2


class TestKeeping:
    def test_it_goes_with_the_blobs_and_with_the_run(self, store: Store) -> None:
        run_id, fence = running(store)
        store.append_news(run_id, fence, news(1))
        store.give_up_blobs(run_id)
        assert marks(page(store, run_id)) == [(3, 1)], "not finished: nothing is given up"
        _finished(store, run_id, fence)
        store.give_up_blobs(run_id)

        assert page(store, run_id).news == ()
        assert [event for _, event, _ in all_told(store, run_id)] == ["phase"] * 5 + ["result"]
        store.delete_run(run_id, "acme")
        with pytest.raises(NotFound):
            page(store, run_id)

    def test_output_that_was_told_counts_as_the_tenants_until_then_and_is_no_blob(self, store: Store) -> None:
        run_id, fence = running(store)
        room = store.storage_left("acme")
        store.append_news(run_id, fence, [*news(1, kind=NewsKind.PROGRESS), *news(2, 3)])
        store.mark_collecting(run_id, fence)
        store.finish(run_id, fence, make_result(), news=news(1))
        size = sum(len(one.data) for one in [*news(2, 3), *news(1)])

        assert store.storage_left("acme") == room - size
        assert store.give_up_blobs(run_id) == ()
        assert store.storage_left("acme") == room

    def test_a_deleted_run_gives_its_room_back_and_names_no_blob(self, store: Store) -> None:
        run_id, fence = running(store)
        room = store.storage_left("acme")
        store.append_news(run_id, fence, news(1))
        _finished(store, run_id, fence)
        assert store.storage_left("acme") < room

        assert store.delete_run(run_id, "acme") == ()
        assert store.storage_left("acme") == room

    def test_a_deleted_run_leaves_nothing(self, sql_store: SqlStore) -> None:
        run_id, fence = running(sql_store)
        sql_store.append_news(run_id, fence, news(1))
        _finished(sql_store, run_id, fence)
        sql_store.delete_run(run_id, "acme")
        with sql_store._db.read() as connection:
            assert connection.scalar(sa.text("SELECT count(*) FROM run_news")) == 0

    def test_phase_and_result_are_told_from_the_record_when_the_events_are_purged(self, store: Store) -> None:
        run_id, fence = running(store)
        store.append_news(run_id, fence, news(1))
        _finished(store, run_id, fence)
        store.record_destroyed(run_id, fence)
        before = all_told(store, run_id)
        if isinstance(store, MemoryStore):
            store._events.clear()
        else:
            with store._db.write() as connection:
                connection.execute(sa.delete(outbox))

        after = all_told(store, run_id)
        assert [(mark, event) for mark, event, _ in after] == [
            ((3, 1), "output"),
            ((5, 0), "phase"),
            ((5, 1), "result"),
        ]
        assert [_without_time(data) for _, _, data in after] == [
            _without_time(data) for mark, _, data in before if mark in {(3, 1), (5, 0), (5, 1)}
        ]


def _without_time(data: str) -> dict[str, Any]:
    """The record's instant and the event's are microseconds apart."""
    return {name: value for name, value in json.loads(data).items() if name != "at"}


class TestWhatAWatcherSees:
    def test_it_is_the_same_from_every_mark_on(self, store: Store) -> None:
        add_tenant(store)
        add_run(store)
        held = claimed(store)
        run_id, fence = held.run.id, held.fence
        store.mark_running(run_id, fence, news=news(1))
        store.append_news(run_id, fence, news(*range(1, 40)))
        store.mark_collecting(run_id, fence)
        store.finish(run_id, fence, make_result(), news=news(1))
        store.record_destroyed(run_id, fence)

        every = all_told(store, run_id)
        assert [mark for mark, _, _ in every] == sorted(mark for mark, _, _ in every)
        assert [event for _, event, _ in every] == [
            "phase", "phase", "output", "phase", *["output"] * 39, "phase", "output", "phase", "result"
        ]  # fmt: skip
        for start, (mark, _, _) in enumerate(every, start=1):
            assert all_told(store, run_id, after=mark) == every[start:]

    def test_a_run_that_is_deleted_or_anothers_is_not_found(self, store: Store) -> None:
        add_tenant(store)
        run = finished_run(store)
        with pytest.raises(NotFound):
            next_told(store, run_id=run.id, tenant="other", after=START, worker_fresh=DAY)
        store.delete_run(run.id, "acme")
        with pytest.raises(NotFound):
            next_told(store, run_id=run.id, tenant="acme", after=START, worker_fresh=DAY)

    def test_who_reads_while_it_is_told_misses_nothing_and_sees_nothing_twice(self, store: Store) -> None:
        add_tenant(store)
        add_run(store)
        held = claimed(store)
        run_id, fence = held.run.id, held.fence

        def follow() -> list[tuple[Mark, str, str]]:
            seen: list[tuple[Mark, str, str]] = []
            after = START
            while True:
                found = next_told(store, run_id=run_id, tenant="acme", after=after, worker_fresh=DAY)
                seen += [(one.mark, one.event, one.data) for one in found.items]
                after = found.after
                if found.ended:
                    return seen

        with ThreadPoolExecutor(3) as pool:
            following = [pool.submit(follow) for _ in range(3)]
            store.mark_running(run_id, fence, news=news(1, 2))
            for first in range(1, 60, 3):
                store.append_news(run_id, fence, news(first, first + 1, first + 2))
            store.mark_collecting(run_id, fence, news=news(61))
            store.append_news(run_id, fence, news(1))
            store.finish(run_id, fence, make_result(), news=news(2))
            seen = [each.result(60) for each in following]

        every = all_told(store, run_id)
        assert len(every) == 5 + 2 + 61 + 2 + 1
        for one in seen:
            assert [mark for mark, _, _ in one] == [mark for mark, _, _ in every]
            assert one[1:] == every[1:], "but for the place in the queue, which was told then"
