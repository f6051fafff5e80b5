"""How often the store is asked whether a key is still valid."""

import asyncio

import pytest

from service.api import key_watch
from service.api.key_watch import KeyWatch
from service.core.errors import Unavailable


class World:
    def __init__(self) -> None:
        self.now = 100.0
        self.asked: list[str] = []
        self.revoked: set[str] = set()
        self.away = False
        self.watch = KeyWatch(self.ask, look_again_s=5, clock=lambda: self.now)

    async def ask(self, key_hash: str) -> bool:
        self.asked.append(key_hash)
        await asyncio.sleep(0)
        if self.away:
            raise Unavailable("away")
        return key_hash not in self.revoked

    def hold(self, *keys: str) -> list[bool]:
        async def together() -> list[bool]:
            return list(await asyncio.gather(*(self.watch.holds(key) for key in keys)))

        return asyncio.run(together())


def test_many_streams_of_one_key_ask_once_and_again_only_after_a_while() -> None:
    world = World()

    assert world.hold(*["a"] * 50, "b") == [True] * 51
    world.now += 4.9
    assert world.hold("a", "b") == [True, True]
    assert sorted(world.asked) == ["a", "b"]
    world.now += 0.2
    world.revoked.add("a")
    assert world.hold("a", "b") == [False, True]
    assert sorted(world.asked) == ["a", "a", "b", "b"]


def test_a_store_that_is_away_revokes_nothing_and_forgets_nothing() -> None:
    world = World()
    world.revoked.add("a")
    assert world.hold("a") == [False]
    world.away = True
    world.now += 6

    assert world.hold("a", "b") == [False, True]


def test_it_does_not_remember_keys_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_watch, "_REMEMBERED", 10)
    world = World()
    for n in range(100):
        world.hold(f"key {n}")
        world.now += 1

    assert len(world.watch._known) <= 10 + 1
