"""The lease's keeper: it renews, hears of a cancellation, and gives up before anybody else may act.

Every time is a setting, and is scaled to milliseconds here; `within` waits for what must happen, and no test passes
because something took long.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest
import structlog

from service.adapters.memory import MemoryStore
from service.core.errors import LeaseLost, Unavailable
from service.core.ports.runs import Claim, Heartbeat
from service.core.run import Phase
from tests.contract.store_steps import add_run, add_tenant, bring_to
from tests.factories import make_result
from tests.scenes import RUN_OUT, Clock, eventually
from workers.watch import Watch, WatchTimes

LONG = timedelta(hours=1)


def times(**changed: timedelta) -> WatchTimes:
    words = {
        "lease": timedelta(seconds=30),
        "heartbeat": timedelta(milliseconds=2),
        "self_fence": LONG,
        "cancel_poll": timedelta(milliseconds=1),
    }
    return WatchTimes(**words | changed)


class Asked(MemoryStore):
    """Counts what it is asked, and answers as it is told: `away` (Unavailable), `hangs`, `breaks` (a defect)."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock=clock)
        self.renewals = self.looks = 0
        self.away = self.read_only = self.breaks = False
        self.hangs = threading.Event()
        self.released = threading.Event()

    def heartbeat(self, run_id: str, fence: int, *, lease: timedelta) -> Heartbeat:
        self._answer()
        if self.read_only:
            raise Unavailable("the database cannot be written")
        beat = super().heartbeat(run_id, fence, lease=lease)
        self.renewals += 1
        return beat

    def look(self, run_id: str, fence: int) -> Heartbeat:
        self._answer()
        self.looks += 1
        return super().look(run_id, fence)

    def _answer(self) -> None:
        if self.hangs.is_set():
            self.released.wait()
        if self.breaks:
            raise TypeError("a defect")
        if self.away:
            raise Unavailable("the database cannot be used at the moment")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> Asked:
    store = Asked(clock)
    add_tenant(store)
    add_run(store)
    return store


@pytest.fixture
def held(store: Asked) -> Claim:
    return bring_to(store, Phase.RUNNING)


@contextmanager
def watching(store: Asked, held: Claim, **changed: timedelta) -> Iterator[Watch]:
    watch = Watch(store, run_id=held.run.id, fence=held.fence, times=times(**changed))
    try:
        with watch:
            yield watch
    finally:
        store.released.set()


def test_a_lease_is_renewed_for_as_long_as_the_run_is_watched(store: Asked, held: Claim, clock: Clock) -> None:
    with watching(store, held) as watch:
        for _ in range(3):
            before = store.renewals
            clock.now += timedelta(seconds=20)
            eventually(lambda seen=before: store.renewals > seen)  # type: ignore[misc]
        assert not watch.is_set()
        watch.raise_if_lost()

    lease = store.lease_of(held.run.id)
    assert lease is not None
    assert lease.lease_until == clock.now + timedelta(seconds=30)


def test_between_two_renewals_it_only_looks(store: Asked, held: Claim) -> None:
    with watching(store, held, heartbeat=LONG):
        eventually(lambda: store.looks > 5)

    assert store.renewals == 0


def test_nobody_renews_after_the_watch_has_ended(store: Asked, held: Claim, clock: Clock) -> None:
    with watching(store, held) as watch:
        eventually(lambda: store.renewals > 0)
    asked = store.renewals + store.looks
    clock.now += RUN_OUT
    time.sleep(0.01)

    assert store.renewals + store.looks == asked
    assert not watch.is_set()
    assert f"watch-{held.run.id}" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("by", ["tenant", "operator"])
def test_a_cancellation_is_seen_between_two_renewals(store: Asked, held: Claim, by: str) -> None:
    with watching(store, held, heartbeat=LONG) as watch:
        eventually(lambda: store.looks > 0)
        assert not watch.is_set()
        store.request_cancel(held.run.id, None, by=by)
        eventually(watch.is_set)

        assert (watch.cancelled_by, watch.lost) == (by, None)
        watch.raise_if_lost()


def test_a_cancelled_run_keeps_its_lease_until_it_is_ended(store: Asked, held: Claim) -> None:
    store.request_cancel(held.run.id, None, by="tenant")
    with watching(store, held) as watch:
        eventually(watch.is_set)
        before = store.renewals
        eventually(lambda: store.renewals > before + 2)

        store.finish(held.run.id, held.fence, make_result())


def test_a_lease_that_ran_out_is_lost(store: Asked, held: Claim, clock: Clock) -> None:
    with watching(store, held) as watch:
        clock.now += RUN_OUT
        eventually(watch.is_set)

        assert watch.cancelled_by is None
        with pytest.raises(LeaseLost, match="may no longer be acted under"):
            watch.raise_if_lost()


def test_a_run_that_another_fence_holds_is_lost(store: Asked, held: Claim, clock: Clock) -> None:
    stale = Claim.model_copy(held, update={"fence": held.fence - 1})
    with watching(store, stale) as watch:
        eventually(watch.is_set)

        assert watch.lost is not None


def test_a_watch_whose_database_is_away_fences_itself(store: Asked, held: Claim) -> None:
    with watching(store, held, self_fence=timedelta(milliseconds=30)) as watch:
        store.away = True
        eventually(watch.is_set)

        with pytest.raises(LeaseLost, match="no successful heartbeat for"):
            watch.raise_if_lost()


def test_a_database_that_is_away_for_less_than_that_changes_nothing(store: Asked, held: Claim) -> None:
    with watching(store, held) as watch:
        store.away = True
        time.sleep(0.01)
        store.away = False
        before = store.renewals
        eventually(lambda: store.renewals > before)

        assert not watch.is_set()


def test_looks_that_succeed_do_not_stand_for_renewals_that_fail(store: Asked, held: Claim) -> None:
    store.read_only = True
    with watching(store, held, heartbeat=timedelta(milliseconds=100), self_fence=timedelta(milliseconds=300)) as watch:
        eventually(watch.is_set)

        assert store.looks > 0
        assert watch.lost is not None


def test_a_watch_whose_database_hangs_fences_itself_too(store: Asked, held: Claim) -> None:
    store.hangs.set()
    with watching(store, held, self_fence=timedelta(milliseconds=30)) as watch:
        eventually(watch.is_set)

        with pytest.raises(LeaseLost, match="no successful heartbeat for"):
            watch.raise_if_lost()
        store.released.set()


def test_raise_if_lost_measures_the_silence_by_itself(store: Asked, held: Claim) -> None:
    store.hangs.set()
    with watching(store, held, self_fence=timedelta(milliseconds=20)) as watch:
        time.sleep(0.03)
        with pytest.raises(LeaseLost):
            watch.raise_if_lost()
        store.released.set()


def test_a_keeper_that_fails_by_a_defect_of_ours_gives_up_the_lease(store: Asked, held: Claim) -> None:
    store.breaks = True
    with watching(store, held) as watch:
        eventually(watch.is_set)

        assert watch.lost == "the lease's keeper failed"


def test_a_pause_is_as_long_as_between_two_questions(store: Asked, held: Claim) -> None:
    with watching(store, held, cancel_poll=timedelta(milliseconds=5)) as watch:
        store.request_cancel(held.run.id, None, by="tenant")
        eventually(watch.is_set)
        began = time.monotonic()
        watch.pause()

        assert time.monotonic() - began >= 0.004, "also when it is set: nobody spins"
