"""One thread wakes everybody who waits for a run: by hint at once, by polling soon, at the end always."""

import asyncio
import queue
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence

from service.api.notifier import Notifier
from service.core.errors import Unavailable
from service.core.news import Mark, Newest
from service.core.ports.publishing import Hints
from service.core.run import Phase


class HandHints(Hints):
    """Hints given by hand; `None` is a poll that came round."""

    def __init__(self) -> None:
        self.given: queue.Queue[tuple[str, str] | None] = queue.Queue()

    def hint(self, topic: str, run_id: str) -> None:
        self.given.put((topic, run_id))

    def listen(self, topics: Sequence[str], *, poll_s: float) -> Iterator[tuple[str, str] | None]:
        while True:
            yield self.given.get()


class Asked:
    """A store that remembers what it was asked; `finished` and `told` are the truth."""

    def __init__(self) -> None:
        self.finished: set[str] = set()
        self.told: dict[str, Mark] = {}
        self.gone: set[str] = set()
        self.questions: list[frozenset[str]] = []
        self.fails = 0

    def newest(self, run_ids: Iterable[str]) -> Mapping[str, Newest]:
        asked = frozenset(run_ids)
        self.questions.append(asked)
        if self.fails:
            self.fails -= 1
            raise Unavailable("the database cannot be used at the moment")
        return {run_id: self._newest(run_id) for run_id in asked - self.gone}

    def _newest(self, run_id: str) -> Newest:
        seq, k = self.told.get(run_id, (1, 0))
        return Newest(seq=seq, k=k, phase=Phase.FINISHED if run_id in self.finished else Phase.RUNNING)


def _play(test: Callable[[Notifier, HandHints, Asked], Awaitable[None]], *, poll_s: float) -> None:
    async def play() -> None:
        hints, asked = HandHints(), Asked()
        notifier = Notifier(hints, asked.newest, poll_s=poll_s)
        notifier.start()
        try:
            await asyncio.wait_for(test(notifier, hints, asked), timeout=10)
        finally:
            notifier.close()
            hints.given.put(None)
            notifier.join()

    asyncio.run(play())


def test_a_hint_wakes_those_who_wait_for_that_run_and_no_others() -> None:
    async def test(notifier: Notifier, hints: HandHints, asked: Asked) -> None:
        with notifier.waiting("a") as first, notifier.waiting("a") as second, notifier.waiting("b") as other:
            asked.finished.update({"a", "b"})
            hints.hint("run", "a")
            await first.wait()
            await second.wait()
            assert not other.is_set()
            assert asked.questions == [frozenset({"a"})]

    _play(test, poll_s=1000)


def test_a_hint_of_a_run_that_goes_on_wakes_nobody() -> None:
    async def test(notifier: Notifier, hints: HandHints, asked: Asked) -> None:
        with notifier.waiting("a") as event:
            hints.hint("run", "a")
            asked_before = asyncio.get_running_loop().time()
            while not asked.questions:
                assert asyncio.get_running_loop().time() - asked_before < 5
                await asyncio.sleep(0.001)
            await asyncio.sleep(0)
            assert not event.is_set()
            asked.finished.add("a")
            hints.hint("run", "a")
            await event.wait()

    _play(test, poll_s=1000)


def test_a_hint_of_a_run_that_nobody_waits_for_asks_nothing() -> None:
    async def test(notifier: Notifier, hints: HandHints, asked: Asked) -> None:
        with notifier.waiting("a") as event:
            asked.finished.add("a")
            for _ in range(50):
                hints.hint("run", "other")
            hints.hint("run", "a")
            await event.wait()
            assert asked.questions == [frozenset({"a"})]

    _play(test, poll_s=1000)


def test_a_poll_asks_for_all_in_one_question() -> None:
    async def test(notifier: Notifier, hints: HandHints, asked: Asked) -> None:
        with notifier.waiting("a") as first, notifier.waiting("b") as second, notifier.waiting("c") as third:
            asked.finished.update({"a", "c"})
            hints.given.put(None)
            await first.wait()
            await third.wait()
            assert not second.is_set()
            assert asked.questions == [frozenset({"a", "b", "c"})]

    _play(test, poll_s=1000)


def test_many_hints_of_others_do_not_put_off_the_poll() -> None:
    async def test(notifier: Notifier, hints: HandHints, asked: Asked) -> None:
        with notifier.waiting("a") as event:
            asked.finished.add("a")
            while not event.is_set():
                hints.hint("run", "other")
                await asyncio.sleep(0.001)

    _play(test, poll_s=0.05)


def test_a_store_that_fails_once_is_asked_again() -> None:
    async def test(notifier: Notifier, hints: HandHints, asked: Asked) -> None:
        with notifier.waiting("a") as event:
            asked.fails = 1
            asked.finished.add("a")
            hints.given.put(None)
            hints.given.put(None)
            await event.wait()

    _play(test, poll_s=0.01)


def test_closing_lets_everybody_go_now_and_later_and_ends_the_thread() -> None:
    async def test(notifier: Notifier, hints: HandHints, asked: Asked) -> None:
        with notifier.waiting("a") as event:
            notifier.close()
            await event.wait()
        with notifier.waiting("b") as late:
            assert late.is_set()
        hints.given.put(None)
        await asyncio.to_thread(notifier.join)
        assert "notifier" not in {thread.name for thread in threading.enumerate()}

    _play(test, poll_s=1000)


def test_who_leaves_is_forgotten() -> None:
    async def test(notifier: Notifier, hints: HandHints, asked: Asked) -> None:
        with notifier.waiting("a"), notifier.waiting("a"):
            assert notifier.waiters == 2
        assert notifier.waiters == 0

    _play(test, poll_s=1000)


# --- those who follow ------------------------------------------------------------------------------------------------


def test_a_poll_wakes_a_follower_only_for_what_it_has_not_seen() -> None:
    async def test(notifier: Notifier, hints: HandHints, asked: Asked) -> None:
        with (
            notifier.following("a", seen=(2, 3)) as behind,
            notifier.following("a", seen=(2, 4)) as up_to_date,
            notifier.waiting("a") as for_the_end,
        ):
            asked.told["a"] = (2, 4)
            hints.given.put(None)
            await behind.event.wait()
            assert not up_to_date.event.is_set()
            assert not for_the_end.is_set()

    _play(test, poll_s=1000)


def test_a_new_phase_and_a_run_that_is_gone_wake_a_follower() -> None:
    async def test(notifier: Notifier, hints: HandHints, asked: Asked) -> None:
        with notifier.following("a", seen=(2, 9)) as first, notifier.following("b", seen=(2, 9)) as second:
            asked.told, asked.gone = {"a": (3, 0)}, {"b"}
            hints.given.put(None)
            await first.event.wait()
            await second.event.wait()

    _play(test, poll_s=1000)


def test_a_hint_of_news_wakes_the_followers_of_that_run_without_a_question() -> None:
    async def test(notifier: Notifier, hints: HandHints, asked: Asked) -> None:
        with (
            notifier.following("a", seen=(2, 0)) as follower,
            notifier.following("b", seen=(2, 0)) as other,
            notifier.waiting("a") as for_the_end,
        ):
            hints.hint("news", "a")
            await follower.event.wait()
            assert not other.event.is_set()
            assert not for_the_end.is_set()
            assert asked.questions == []

    _play(test, poll_s=1000)


def test_many_hints_of_news_do_not_put_off_the_poll() -> None:
    async def test(notifier: Notifier, hints: HandHints, asked: Asked) -> None:
        with notifier.waiting("a") as event:
            asked.finished.add("a")
            while not event.is_set():
                hints.hint("news", "a")
                await asyncio.sleep(0.001)

    _play(test, poll_s=0.05)


def test_closing_lets_followers_go_too() -> None:
    async def test(notifier: Notifier, hints: HandHints, asked: Asked) -> None:
        with notifier.following("a", seen=(1, 0)) as waiter:
            assert not notifier.closed
            notifier.close()
            await waiter.event.wait()
            assert notifier.closed
        with notifier.following("a", seen=(1, 0)) as late:
            assert late.event.is_set()

    _play(test, poll_s=1000)
