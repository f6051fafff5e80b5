"""From committed events to answered deliveries. SQL decides what is to be sent, and everything here may die any time.

An endpoint gets a few attempts at once, an owner a few more, the process as many as it can hold; one that fails again
and again is left alone for a while (`core.webhooks.breaker`). So who hangs or is dead costs the others nothing. What
was claimed and not recorded, by a process that was killed, is due again when its lease ends: at least once.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta

import structlog

from service.core.errors import BlastdoorError
from service.core.failpoints import Failpoint, reach
from service.core.webhooks.breaker import PAUSE, Breaker
from service.core.webhooks.models import Claimed, Owner, Settlement
from service.core.webhooks.ports import Deliveries, SecretBox, Sender
from service.core.webhooks.schedule import SCHEDULE, Answer, Fault, State, decide
from service.relay.metrics import WebhookMetrics
from service.relay.webhooks.signing import signed_headers, unsealed

AT_ONCE = 256
OF_AN_OWNER = 32
OF_AN_ENDPOINT = 4
LEASE = timedelta(seconds=60)
"""Much longer than one attempt may take."""
_EVENTS_AT_ONCE = 200
_NOT_ITS_FAULT = frozenset({Fault.SECRET, Fault.EVENT_GONE})
_LOG = structlog.get_logger()


class Dispatcher:
    """Of one event loop. `clock` is monotonic, in seconds; `chance` uniform in [0, 1). `ended` is called when an
    attempt ends: something else may have room now."""

    def __init__(
        self, store: Deliveries, sender: Sender, box: SecretBox, *, schedule: Sequence[timedelta] = SCHEDULE,
        pause: timedelta = PAUSE, lease: timedelta = LEASE, at_once: int = AT_ONCE,
        metrics: WebhookMetrics | None = None, clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random, ended: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._store = store
        self._sender = sender
        self._box = box
        self._schedule = schedule
        self._pause = pause
        self._lease = lease
        self._at_once = at_once
        self._metrics = metrics or WebhookMetrics()
        self._clock = clock
        self._chance = chance
        self._ended = ended
        self._tasks: dict[asyncio.Task[None], Claimed] = {}
        self._of_endpoint: Counter[str] = Counter()
        self._of_owner: Counter[Owner] = Counter()
        self._breakers: dict[str, Breaker] = {}
        self._unrecorded: list[Settlement] = []

    async def step(self) -> bool:
        """Record what has ended, fan out, and begin what is due. -> whether to call again at once. Raises
        BlastdoorError when the store is away; nothing is lost then."""
        await self._record()
        fanned = await asyncio.to_thread(self._store.fan_out, limit=_EVENTS_AT_ONCE)
        return await self._begin() > 0 or fanned > 0

    async def stop(self, *, within: timedelta) -> None:
        """Let what is under way end for so long, then give it back: it is sent again by whoever is there. Raises
        BlastdoorError."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=within.total_seconds())
        dropped = dict(self._tasks)
        for task in dropped:
            task.cancel()
        await asyncio.gather(*dropped, return_exceptions=True)
        await self._record()
        await asyncio.to_thread(self._store.give_back_deliveries, list(dropped.values()))

    @property
    def in_flight(self) -> int:
        return len(self._tasks)

    async def _begin(self) -> int:
        room = self._at_once - len(self._tasks)
        if room <= 0:
            return 0
        now = self._clock()
        # Nothing to remember of most: what is left is what is under way, or has failed.
        self._breakers = {
            id_: breaker for id_, breaker in self._breakers.items() if self._of_endpoint[id_] or not breaker.is_fresh
        }
        known = {*self._breakers, *self._of_endpoint}
        not_now = [id_ for id_ in known if self._allows(id_, now) == 0]
        due = await asyncio.to_thread(self._store.due_endpoints, not_now=not_now, limit=self._at_once)
        wanted: dict[str, int] = {}
        owners = dict[str, Owner]()
        of_owner = Counter(self._of_owner)
        for one in due:
            most = min(self._allows(one.endpoint_id, now), room, OF_AN_OWNER - of_owner[one.owner])
            if most > 0:
                wanted[one.endpoint_id], owners[one.endpoint_id] = most, one.owner
                room -= most
                of_owner[one.owner] += most
        if not wanted:
            return 0
        claimed = await asyncio.to_thread(self._store.claim_deliveries, wanted, lease=self._lease)
        if claimed:
            reach(Failpoint.HOOK_CLAIMED)
        for delivery in claimed:
            self._start(delivery, owners[delivery.endpoint_id])
        return len(claimed)

    def _allows(self, endpoint_id: str, now: float) -> int:
        breaker = self._breakers.get(endpoint_id) or Breaker(pause=self._pause)
        return breaker.allows(in_flight=self._of_endpoint[endpoint_id], most=OF_AN_ENDPOINT, now=now)

    def _start(self, claimed: Claimed, owner: Owner) -> None:
        self._of_endpoint[claimed.endpoint_id] += 1
        self._of_owner[owner] += 1
        task = asyncio.create_task(self._attempt(claimed))
        self._tasks[task] = claimed

        def ended(_: asyncio.Task[None]) -> None:
            del self._tasks[task]
            # What is not positive is dropped: the counters know only what is under way.
            self._of_endpoint -= Counter([claimed.endpoint_id])
            self._of_owner -= Counter([owner])
            self._ended()

        task.add_done_callback(ended)

    async def _attempt(self, claimed: Claimed) -> None:
        try:
            answer = await self._send(claimed)
            reach(Failpoint.HOOK_SENT)
        except Exception:  # noqa: BLE001 - ours, not the receiver's: it must not stop the others, and must be seen
            _LOG.exception("delivery_broke", delivery=claimed.delivery_id, endpoint=claimed.endpoint_id)
            answer = Answer(error=Fault.PROTOCOL)
        decision = decide(
            answer, tries=claimed.tries + 1, now=claimed.at, chance=self._chance(), schedule=self._schedule
        )
        breaker = self._breakers.setdefault(claimed.endpoint_id, Breaker(pause=self._pause))
        now = self._clock()
        if decision.error is None:
            breaker.succeeded()
        elif decision.error not in _NOT_ITS_FAULT:
            breaker.failed(now)
        if decision.hold is not None:
            breaker.hold(now, decision.hold)
        self._metrics.attempted(decision.error or "delivered", duration_s=answer.duration.total_seconds())
        self._unrecorded.append(
            Settlement(
                delivery_id=claimed.delivery_id, endpoint_id=claimed.endpoint_id, fence=claimed.fence,
                state=decision.state, status=answer.status, error=decision.error, wait=decision.wait,
                disable=decision.disable, duration=answer.duration,
            )
        )  # fmt: skip
        if decision.state is State.DEAD:
            _LOG.warning("dead_letter", delivery=claimed.delivery_id, endpoint=claimed.endpoint_id, why=decision.error)

    async def _send(self, claimed: Claimed) -> Answer:
        if claimed.body is None:
            return Answer(error=Fault.EVENT_GONE)
        try:
            secrets = unsealed(self._box, claimed.secrets)
        except BlastdoorError as error:
            _LOG.error("secret_unreadable", endpoint=claimed.endpoint_id, error=error.detail)
            return Answer(error=Fault.SECRET)
        headers = signed_headers(claimed, claimed.body, secrets)
        return await self._sender.send(claimed.url, headers=headers, body=claimed.body.encode())

    async def _record(self) -> None:
        """In one transaction. What cannot be recorded now is kept: it would be sent again otherwise."""
        settled, self._unrecorded = self._unrecorded, []
        if not settled:
            return
        try:
            await asyncio.to_thread(self._store.settle_deliveries, settled)
        except BaseException:
            self._unrecorded = settled + self._unrecorded
            raise
