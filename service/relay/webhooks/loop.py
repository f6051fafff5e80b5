"""Dispatch until told to stop: woken by hints, by attempts that end, and every now and then without either."""

import asyncio
import threading
from collections.abc import Callable
from datetime import timedelta

import structlog

from service.core.errors import BlastdoorError
from service.core.ports.publishing import Hints
from service.relay.webhooks.dispatcher import Dispatcher

POLL = timedelta(milliseconds=250)
GRACE = timedelta(seconds=1)
"""For what is under way when the end comes."""
LONGEST_PAUSE = timedelta(seconds=2)
_LOG = structlog.get_logger()


async def run(
    dispatcher: Dispatcher, hints: Hints, *, woken: asyncio.Event, stopping: Callable[[], bool], poll: timedelta = POLL
) -> None:
    """`woken` is set by whoever has news: the dispatcher's `ended`, a signal. A store that is away is waited for, and
    said once."""
    _listen(hints, woken, stopping, poll=poll)
    failures = 0
    while not stopping():
        woken.clear()
        try:
            again = await dispatcher.step()
        except BlastdoorError as error:
            if not failures:
                _LOG.warning("webhooks_store_away", error=error.detail)
            failures += 1
            await asyncio.sleep(min(LONGEST_PAUSE, POLL * 2 ** min(failures, 8)).total_seconds())
            continue
        if failures:
            _LOG.info("webhooks_store_back")
            failures = 0
        if not again:
            await _first(woken, poll)
    try:
        await dispatcher.stop(within=GRACE)
    except BlastdoorError as error:
        _LOG.warning("webhooks_not_given_back", error=error.detail)  # due again when the lease ends


async def _first(woken: asyncio.Event, poll: timedelta) -> None:
    try:
        await asyncio.wait_for(woken.wait(), poll.total_seconds())
    except TimeoutError:
        return


def _listen(hints: Hints, woken: asyncio.Event, stopping: Callable[[], bool], *, poll: timedelta) -> None:
    loop = asyncio.get_running_loop()

    def listen() -> None:
        for hint in hints.listen(["outbox"], poll_s=poll.total_seconds()):
            if stopping() or loop.is_closed():
                return
            if hint is not None:
                try:
                    loop.call_soon_threadsafe(woken.set)
                except RuntimeError:  # the loop was closed this moment
                    return

    threading.Thread(target=listen, name="hints", daemon=True).start()
