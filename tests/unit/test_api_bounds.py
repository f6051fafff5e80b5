"""What one process takes on: slots that one tenant cannot use up, readiness that cannot be asked too often."""

import asyncio
import threading
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from service.api.context import Bounds
from service.api.frame import Frame
from service.api.metrics import ApiMetrics
from service.api.readiness import Readiness
from service.api.slots import UploadSlots
from service.core.errors import Unavailable


def test_one_tenant_gets_half_of_the_slots_and_another_the_rest() -> None:
    async def test() -> None:
        slots = UploadSlots(4, wait_s=0.01)
        async with AsyncExitStack() as held:
            for _ in range(2):
                await held.enter_async_context(slots.take("acme"))
            with pytest.raises(Unavailable):
                await held.enter_async_context(slots.take("acme"))
            for _ in range(2):
                await held.enter_async_context(slots.take("globex"))
            with pytest.raises(Unavailable):
                await held.enter_async_context(slots.take("initech"))
        async with slots.take("initech"):
            pass

    asyncio.run(test())


def test_who_comes_while_all_are_taken_gets_the_first_that_is_freed() -> None:
    async def test() -> None:
        slots = UploadSlots(1, wait_s=5)
        order: list[str] = []

        async def upload(name: str) -> None:
            async with slots.take(name):
                order.append(name)
                await asyncio.sleep(0)

        await asyncio.gather(*(upload(name) for name in "abcdef"))
        assert sorted(order) == list("abcdef")

    asyncio.run(test())


def test_readiness_is_asked_once_however_many_ask() -> None:
    asked = []

    async def test() -> None:
        readiness = Readiness({"database": lambda: asked.append(1)})
        answers = await asyncio.gather(*(readiness.ask() for _ in range(50)))
        assert all(answer == {"database": True} for answer in answers)

    asyncio.run(test())
    assert len(asked) == 1


def test_a_check_that_hangs_is_failing_and_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.api.readiness.CHECK_WITHIN_S", 0.5)
    monkeypatch.setattr("service.api.readiness.KEPT_S", 0.0)
    hanging, asked = threading.Event(), []

    def hangs() -> None:
        asked.append(1)
        hanging.wait(10)

    async def test() -> None:
        readiness = Readiness({"redis": hangs, "database": lambda: None})
        for _ in range(3):
            assert await readiness.ask() == {"redis": False, "database": True}
        assert len(asked) == 1
        hanging.set()
        for _ in range(500):
            await asyncio.sleep(0.01)
            if await readiness.ask() == {"redis": True, "database": True}:
                return
        pytest.fail("it never came back")

    asyncio.run(test())


def test_a_check_that_raises_anything_is_failing() -> None:
    def breaks() -> None:
        raise KeyError("surprise")

    assert asyncio.run(Readiness({"database": breaks}).ask()) == {"database": False}


# --- around every request ---------------------------------------------------------------------------------------------


async def _ask(frame: Frame, path: str = "/v1/runs") -> tuple[int, dict[str, Any]]:
    transport = httpx.ASGITransport(app=frame, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
        answer = await client.get(path)
        return answer.status_code, answer.json()


def test_requests_beyond_what_fits_are_told_to_come_again_and_health_is_not_counted() -> None:
    async def test() -> None:
        let_go = asyncio.Event()

        async def waits(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["path"] != "/healthz":
                await let_go.wait()
            await JSONResponse({"path": scope["path"]})(scope, receive, send)

        frame = Frame(waits, bounds=Bounds(requests_at_once=2), metrics=ApiMetrics())
        waiting = [asyncio.create_task(_ask(frame)) for _ in range(2)]
        await asyncio.sleep(0.05)
        assert (await _ask(frame))[1]["code"] == "unavailable"
        assert (await _ask(frame, "/healthz"))[0] == 200
        let_go.set()
        assert [status for status, _ in await asyncio.gather(*waiting)] == [200, 200]
        assert (await _ask(frame))[0] == 200

    asyncio.run(test())


def test_what_nobody_caught_is_a_problem_that_says_nothing() -> None:
    async def breaks(scope: Scope, receive: Receive, send: Send) -> None:
        raise KeyError("s3cret")

    status, problem = asyncio.run(_ask(Frame(breaks, bounds=Bounds(), metrics=ApiMetrics())))

    assert (status, problem["code"]) == (500, "internal")
    assert "s3cret" not in str(problem)


def test_half_an_answer_is_not_finished_as_a_whole_one() -> None:
    async def breaks_off(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise KeyError("s3cret")

    async def test() -> None:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        async def receive() -> Message:
            return {"type": "http.disconnect"}

        scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "state": {}}
        with pytest.raises(KeyError):
            await Frame(breaks_off, bounds=Bounds(), metrics=ApiMetrics())(scope, receive, send)
        assert [message["type"] for message in sent] == ["http.response.start"]

    asyncio.run(test())
