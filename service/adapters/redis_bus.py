"""The event stream that the main application reads, and hints that wake whoever waits. Redis may be lost at any time.

Each entry's id is the relay's own number, so Redis itself refuses a second copy and anything out of order. A stream
that has lost its tail would accept a later number and leave a hole for ever: so each batch is added under WATCH, after
a look that the stream still ends where we left it. No scripting: our users of Redis are not allowed any.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import redis
import structlog
from redis.backoff import NoBackoff
from redis.client import Pipeline, PubSub
from redis.retry import Retry

from service.core.errors import Conflict, Unavailable
from service.core.events import STREAM
from service.core.ports.publishing import OutboxRow
from service.core.readers import Reader, StreamState

MAX_LENGTH = 100_000
"""Entries that the stream keeps: ten times the peak of a day."""
_PENDING_AT_ONCE = 1000

_TIMEOUT_S = 2.0
_HINT_TIMEOUT_S = 0.25
_HINT_PAUSE_S = 1.0
_CHANNEL = "blastdoor:hint:"
_ATTEMPTS = 20
_LOG = structlog.get_logger()


def _client(url: str, *, timeout_s: float) -> redis.Redis:
    """No retries of its own: who calls knows better, and asks first what became of the last attempt."""
    return redis.Redis.from_url(
        url,
        protocol=2,
        decode_responses=True,
        encoding_errors="backslashreplace",
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        socket_keepalive=True,
        health_check_interval=25,
        retry=Retry(NoBackoff(), 0),
    )


class RedisBus:
    """Implements ports.Bus. For one thread; forks make their own."""

    def __init__(self, url: str, *, max_length: int = MAX_LENGTH, stream: str = STREAM) -> None:
        self._redis = _client(url, timeout_s=_TIMEOUT_S)
        self._max_length = max_length
        self._stream = stream
        self._top = 0
        """Where the stream ended when we last saw it. It may grow (another relay), never shrink."""

    def publish(self, rows: Sequence[OutboxRow]) -> None:
        """All of them, or an unknown part from the front. Raises Unavailable: ask `last_published` what is there, also
        when the stream is gone or has lost its tail, in which case nothing was added. Raises Conflict(bus_conflict)
        when the stream holds something else under one of the ids: somebody else writes on it, or the database is older
        than the stream."""
        rows = [row for row in rows if not row.tenant.startswith("_")]
        if not rows:
            return
        with _unavailable():
            refused = self._add(rows)
            if refused:
                self._check(refused)
        self._top = max(self._top, rows[-1].pub_seq)

    def last_published(self) -> int | None:
        with _unavailable():
            self._top = _top(self._redis, self._stream)
        return None if self._top < 0 else self._top

    def create_stream(self) -> None:
        """An empty stream, so that what is added later needs no MKSTREAM; one that exists is left as it is."""
        group = f"blastdoor-makes-the-stream-{os.getpid()}"
        with _unavailable(), self._redis.pipeline(transaction=True) as pipe:
            pipe.xgroup_create(self._stream, group, id="0", mkstream=True)
            pipe.xgroup_destroy(self._stream, group)
            pipe.execute(raise_on_error=False)
            self._redis.xinfo_stream(self._stream)

    def ping(self) -> None:
        """Raises Unavailable."""
        with _unavailable():
            self._redis.ping()

    def identity(self) -> str:
        with _unavailable():
            server: Any = self._redis.info("server")
        return str(server["run_id"])

    def max_length(self) -> int:
        return self._max_length

    def stream(self) -> StreamState | None:
        with _unavailable():
            with self._redis.pipeline(transaction=True) as pipe:
                pipe.xinfo_stream(self._stream)
                pipe.xinfo_groups(self._stream)
                about, groups = pipe.execute(raise_on_error=False)
            for answer in (about, groups):
                if isinstance(answer, Exception):
                    if "no such key" in str(answer):
                        return None
                    raise answer
            last = _number(about["last-generated-id"])
            first = _number(about["first-entry"][0]) if about["first-entry"] else last + 1
            readers = [self._reader(group, first=first) for group in groups]
        return StreamState(length=about["length"], first=first, last=last, readers=tuple(readers))

    def pending(self, group: str, *, first: int, below: int) -> Sequence[int]:
        found: list[int] = []
        with _unavailable():
            while first < below:
                page: Any = self._pending(group, first=first, below=below)
                found += [_number(entry["message_id"]) for entry in page]
                if len(page) < _PENDING_AT_ONCE:
                    break
                first = found[-1] + 1
        return found

    def trim(self, below: int) -> None:
        with _unavailable():
            self._redis.xtrim(self._stream, minid=f"{below}-0", approximate=False)

    def _reader(self, group: Any, *, first: int) -> Reader:
        """A group that went away since it was listed counts as one that waits for nothing that it was given."""
        pending = None
        if group["pending"]:
            lowest: Any = self._pending(group["name"], first=first, count=1)
            pending = _number(lowest[0]["message_id"]) if lowest else None
        return Reader(group=group["name"], delivered=_number(group["last-delivered-id"]), pending=pending)

    def _pending(self, group: str, *, first: int, below: int | None = None, count: int = _PENDING_AT_ONCE) -> Any:
        until = "+" if below is None else f"({below}-0"
        try:
            return self._redis.xpending_range(self._stream, group, min=f"{first}-0", max=until, count=count)
        except redis.ResponseError as error:
            if str(error).startswith("NOGROUP"):
                return []
            raise

    def _add(self, rows: Sequence[OutboxRow]) -> list[OutboxRow]:
        """-> the rows whose ids were refused."""
        fields = [_fields(row) for row in rows]
        for _ in range(_ATTEMPTS):
            with self._redis.pipeline(transaction=True) as pipe, suppress(redis.WatchError):
                pipe.watch(self._stream)  # type: ignore[no-untyped-call]
                self._check_top(pipe)
                pipe.multi()
                for row, entry in zip(rows, fields, strict=True):
                    pipe.xadd(self._stream, entry, id=f"{row.pub_seq}-0", nomkstream=True)
                return _refused(rows, pipe.execute(raise_on_error=False))
        raise Unavailable("the stream is being changed all the time")

    def _check_top(self, watched: Pipeline) -> None:
        top = _top(watched, self._stream)
        if top < 0:
            raise Unavailable("the stream does not exist")
        if top < self._top:
            raise Unavailable(f"the stream ends at {top}, below {self._top}: it has lost its tail")
        self._top = top

    def _check(self, refused: Sequence[OutboxRow]) -> None:
        """An id that is not above the stream's last one: the same event must stand there, or have stood there and been
        trimmed away since."""
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.xrange(self._stream, count=1)
            for row in refused:
                pipe.xrange(self._stream, min=f"{row.pub_seq}-0", max=f"{row.pub_seq}-0")
            oldest, *found = pipe.execute()
        for row, entries in zip(refused, found, strict=True):
            if entries and _event_id(entries[0][1]) == row.event_id:
                continue
            if not entries and (not oldest or _number(oldest[0][0]) > row.pub_seq):
                continue
            held = _event_id(entries[0][1]) if entries else None
            raise Conflict(
                f"the stream refuses {row.pub_seq}-0 for {row.event_id}, and holds {held} there", code="bus_conflict"
            )


def _fields(row: OutboxRow) -> dict[Any, Any]:
    event = json.dumps(row.event, separators=(",", ":"), ensure_ascii=False)
    return {"event": event, "tenant": row.tenant, "type": row.type}


def _refused(rows: Sequence[OutboxRow], answers: Sequence[Any]) -> list[OutboxRow]:
    refused = []
    for row, answer in zip(rows, answers, strict=True):
        if isinstance(answer, redis.ResponseError) and "equal or smaller" in str(answer):
            refused.append(row)
        elif isinstance(answer, Exception):
            raise answer
        elif answer is None:
            raise Unavailable("the stream does not exist")
    return refused


def _top(client: redis.Redis | Pipeline, stream: str) -> int:
    """The number of the stream's last id; -1 when there is no stream."""
    try:
        about: Any = client.xinfo_stream(stream)
    except redis.ResponseError as error:
        if "no such key" in str(error):
            return -1
        raise
    return _number(about["last-generated-id"])


def _number(entry_id: str) -> int:
    return int(entry_id.partition("-")[0])


def _event_id(fields: dict[str, str]) -> str | None:
    with suppress(KeyError, ValueError, TypeError):
        return str(json.loads(fields["event"])["id"])
    return None


@contextmanager
def _unavailable() -> Iterator[None]:
    try:
        yield
    except redis.RedisError as error:
        raise Unavailable(f"the bus does not answer: {type(error).__name__}: {error}") from error


class RedisHints:
    """Implements ports.Hints by pub/sub. Safe to share between threads; each `listen` has a connection of its own."""

    def __init__(self, url: str) -> None:
        self._redis = _client(url, timeout_s=_HINT_TIMEOUT_S)
        self._silent_until = 0.0

    def hint(self, topic: str, run_id: str) -> None:
        """Costs little also while Redis is away: after a failure nothing is tried for a second."""
        if time.monotonic() < self._silent_until:
            return
        try:
            self._redis.publish(_CHANNEL + topic, run_id)
        except redis.RedisError:
            self._silent_until = time.monotonic() + _HINT_PAUSE_S

    def listen(self, topics: Sequence[str], *, poll_s: float) -> Iterator[tuple[str, str] | None]:
        """A None comes also right after each new subscription: hints may have been missed, so look now."""
        away = False
        while True:
            began = time.monotonic()
            try:
                with self._redis.pubsub(ignore_subscribe_messages=True) as subscription:  # type: ignore[no-untyped-call]
                    subscription.subscribe(*(_CHANNEL + topic for topic in topics))
                    if away:
                        _LOG.info("hints_are_back")
                    away = False
                    yield None
                    yield from _messages(subscription, poll_s=poll_s)
            except redis.RedisError as error:
                if not away:
                    _LOG.warning("hints_are_away", error=f"{type(error).__name__}: {error}")
                away = True
            time.sleep(max(0.0, poll_s - (time.monotonic() - began)))
            yield None


def _messages(subscription: PubSub, *, poll_s: float) -> Iterator[tuple[str, str] | None]:
    deadline = time.monotonic() + poll_s
    while True:
        message = subscription.get_message(timeout=max(0.0, deadline - time.monotonic()))
        if message is not None:
            yield message["channel"].removeprefix(_CHANNEL), message["data"]
        elif time.monotonic() < deadline:
            continue
        else:
            yield None
        deadline = time.monotonic() + poll_s
