"""Bus, bell, hints and blobs that a test can look into and break."""

import hashlib
import queue
import secrets
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO

from service.core.errors import Conflict, NotFound, TooLarge, Unavailable
from service.core.ports.publishing import OutboxRow
from service.core.readers import Reader, StreamState


@dataclass
class MemoryGroup:
    """A consumer group of `MemoryBus`."""

    delivered: int = 0
    pending: set[int] = field(default_factory=set)


class MemoryBus:
    """A stream in memory. `away=True` makes every call raise Unavailable; `lose` is a FLUSHALL and a restart. A reader
    joins, reads and acknowledges as one of a consumer group does."""

    def __init__(self, *, max_length: int = 100_000) -> None:
        self.away = False
        self._max_length = max_length
        self._identity = secrets.token_hex(20)
        self._entries: dict[int, OutboxRow] | None = None
        self._last = 0
        self._groups: dict[str, MemoryGroup] = {}

    @property
    def rows(self) -> list[OutboxRow]:
        """What a consumer group would read, in order."""
        return list((self._entries or {}).values())

    def join(self, group: str) -> None:
        self._groups[group] = MemoryGroup()

    def read(self, group: str, *, count: int, acknowledge: bool = True) -> list[OutboxRow]:
        """What is new to the group, from the oldest on."""
        reader = self._groups[group]
        fresh = [row for row in self.rows if row.pub_seq > reader.delivered][:count]
        for row in fresh:
            reader.delivered = row.pub_seq
            if not acknowledge:
                reader.pending.add(row.pub_seq)
        return fresh

    def publish(self, rows: Sequence[OutboxRow]) -> None:
        self._there()
        if self._entries is None:
            raise Unavailable("the stream does not exist")
        for row in (row for row in rows if not row.tenant.startswith("_")):
            if row.pub_seq > self._last:
                self._entries[row.pub_seq] = row
                self._last = row.pub_seq
            elif self._entries.get(row.pub_seq, row).event_id != row.event_id:
                raise Conflict(f"the stream holds another event as {row.pub_seq}", code="bus_conflict")

    def last_published(self) -> int | None:
        self._there()
        return None if self._entries is None else self._last

    def create_stream(self) -> None:
        self._there()
        self._entries = self._entries or {}

    def identity(self) -> str:
        self._there()
        return self._identity

    def max_length(self) -> int:
        return self._max_length

    def stream(self) -> StreamState | None:
        self._there()
        if self._entries is None:
            return None
        first = min(self._entries, default=self._last + 1)
        readers = [
            Reader(
                group=name, delivered=group.delivered, pending=min(group.pending & set(self._entries), default=None)
            )
            for name, group in self._groups.items()
        ]  # fmt: skip
        return StreamState(length=len(self._entries), first=first, last=self._last, readers=tuple(readers))

    def pending(self, group: str, *, first: int, below: int) -> Sequence[int]:
        self._there()
        there = self._groups.get(group, MemoryGroup()).pending
        return sorted(number for number in there if first <= number < below)

    def trim(self, below: int) -> None:
        self._there()
        self._entries = {number: row for number, row in (self._entries or {}).items() if number >= below}

    def lose(self) -> None:
        self._entries, self._last, self._groups = None, 0, {}
        self._identity = secrets.token_hex(20)

    def _there(self) -> None:
        if self.away:
            raise Unavailable("the bus is away")


class MemoryDoorbell:
    """Remembers its rings, in order. `away=True` makes it raise Unavailable."""

    def __init__(self) -> None:
        self.away = False
        self.rings: list[str] = []

    def ring(self, boundary: str) -> None:
        if self.away:
            raise Unavailable("the broker is away")
        self.rings.append(boundary)


class MemoryHints:
    """Wakes listeners of this process. `lost=True` drops every hint, which nobody may depend on."""

    def __init__(self) -> None:
        self.lost = False
        self.given: list[tuple[str, str]] = []
        self._listeners: list[tuple[frozenset[str], queue.SimpleQueue[tuple[str, str]]]] = []

    def hint(self, topic: str, run_id: str) -> None:
        if self.lost:
            return
        self.given.append((topic, run_id))
        for topics, heard in self._listeners:
            if topic in topics:
                heard.put((topic, run_id))

    def listen(self, topics: Sequence[str], *, poll_s: float) -> Iterator[tuple[str, str] | None]:
        heard: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        listener = (frozenset(topics), heard)
        self._listeners.append(listener)  # before the first value is asked for: nothing said from now on is missed
        return self._heard(listener, poll_s=poll_s)

    def _heard(
        self, listener: tuple[frozenset[str], queue.SimpleQueue[tuple[str, str]]], *, poll_s: float
    ) -> Iterator[tuple[str, str] | None]:
        try:
            while True:
                try:
                    yield listener[1].get(timeout=poll_s)
                except queue.Empty:
                    yield None
        finally:
            self._listeners.remove(listener)


class MemoryBlobs:
    """Blobs in a directory that goes with the object: they need paths, as the real ones do."""

    def __init__(self) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="blastdoor-blobs-"))
        weakref.finalize(self, shutil.rmtree, self._root, True)

    def put_file(self, tenant: str, path: Path, digest: str) -> None:
        path.replace(self._place(tenant, digest))

    def put_bytes(self, tenant: str, data: bytes) -> str:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self._place(tenant, digest).write_bytes(data)
        return digest

    def put_stream(self, tenant: str, source: BinaryIO, *, max_bytes: int) -> tuple[str, int]:
        data = source.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise TooLarge(f"more than {max_bytes} bytes")
        return self.put_bytes(tenant, data), len(data)

    def path(self, tenant: str, digest: str) -> Path:
        path = self._place(tenant, digest)
        if not path.is_file():
            raise NotFound
        return path

    def delete(self, tenant: str, digest: str) -> None:
        self._place(tenant, digest).unlink(missing_ok=True)

    def older_than(self, tenant: str, age: timedelta) -> Sequence[str]:
        prefix, until = self._place(tenant, "").name, time.time() - age.total_seconds()
        return sorted(
            f"sha256:{path.name.removeprefix(prefix)}"
            for path in self._root.iterdir()
            if path.name.startswith(prefix) and path.stat().st_mtime <= until
        )

    def discard(self, tenant: str, digest: str, *, age: timedelta) -> bool:
        is_old = digest in self.older_than(tenant, age)
        if is_old:
            self.delete(tenant, digest)
        return is_old

    def clear(self, tenant: str) -> None:
        for digest in self.older_than(tenant, timedelta(0)):
            self.delete(tenant, digest)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        directory = Path(tempfile.mkdtemp(dir=self._root))
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def _place(self, tenant: str, digest: str) -> Path:
        """One flat directory: the tenant's part keeps equal bytes of two tenants apart."""
        return self._root / f"{hashlib.sha256(tenant.encode()).hexdigest()[:16]}-{digest.removeprefix('sha256:')}"
