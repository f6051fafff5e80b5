"""Writes down what happened at a place, in the words of `history.py`: meanwhile, and what there is at the end."""

import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import redis

from service.core.events import STREAM
from tests.faults.history import Entry
from tests.faults.paper import JOURNAL
from tests.faults.place import WRITES_FILE, Place
from tests.sweep import CGROUPS

_NAME = re.compile(r"bd-([0-9a-f]{32})-f([0-9]+)")
LOOK_S = 0.1


class Recorder:
    """Safe to use from several threads. `path` gets a line for each entry at once: a test that hangs leaves it."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()
        self._file = path.open("a")
        self.entries: list[Entry] = []

    def add(self, kind: str, **entry: Any) -> None:
        with self._lock:
            self.entries.append({"kind": kind, "at": time.time()} | entry)
            self._file.write(json.dumps(self.entries[-1], default=str) + "\n")
            self._file.flush()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @contextmanager
    def watching(self, place: Place) -> Iterator[None]:
        """The stream is read, and the host looked at, from threads of our own, for as long as the block lasts."""
        stop = threading.Event()
        watched: list[Callable[[], None]] = [_StreamReader(self, place).look, _HostLook(self, place).look]
        threads = [threading.Thread(target=_again_and_again, args=(look, stop)) for look in watched]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def conclude(self, place: Place, *, leave_s: float = 10) -> None:
        """What there is at the end: rows, events, the whole stream, the journals, a sweep and one that must find.
        `leave_s`: for so long what is about to go may still be there."""
        for row in place.rows():
            if not row["tenant"].startswith("_"):
                self.add("row", run=row["id"], **{name: value for name, value in row.items() if name != "id"})
        for row in place.outbox():
            if not row["event"]["tenant"].startswith("_"):
                self.add("event", **as_judged(row["event"]))
        _StreamReader(self, place).look()
        journals = [*sorted((place.directory / "run").glob(f"*/*/paper/{JOURNAL}")), place.directory / WRITES_FILE]
        lines = [line for path in journals if path.exists() for line in path.read_text().splitlines()]
        for entry in sorted(map(json.loads, lines), key=lambda entry: float(entry["at"])):  # sites have one clock here
            self.add(entry.pop("kind"), **entry)
        self.add("sweep", planted=False, found=place.left(within_s=leave_s))
        with _planted(place):
            self.add("sweep", planted=True, found=place.left(within_s=0))

    def so_far(self, place: Place) -> list[Entry]:
        """The history as it would be if everything ended now."""
        with Recorder(Path(os.devnull)) as other:
            other.entries = list(self.entries)
            other.conclude(place, leave_s=0)
            return other.entries


def _again_and_again(look: Callable[[], None], stop: threading.Event) -> None:
    while not stop.wait(LOOK_S):
        with suppress(redis.RedisError):
            look()


class _StreamReader:
    """A consumer that starts from the beginning and reads on, whatever becomes of the stream."""

    def __init__(self, recorder: Recorder, place: Place) -> None:
        self._recorder, self._client, self._after = recorder, place.redis.client(), "0-0"

    def look(self) -> None:
        while entries := self._client.xrange(STREAM, min=f"({self._after}", count=500):
            for entry, fields in entries:
                self._recorder.add("bus", entry=entry, **as_judged(json.loads(fields["event"])))
                self._after = entry


class _HostLook:
    """Which boundaries stand, by their labels, directories and control groups; said when it changes."""

    def __init__(self, recorder: Recorder, place: Place) -> None:
        self._recorder, self._place, self._last = recorder, place, set[tuple[str, int]]()

    def look(self) -> None:
        names: list[str] = []
        for home in (self._place.directory / "run").glob(f"*/{self._place.installation}"):
            for directory in (home, home / "paper" / "labels"):
                with suppress(FileNotFoundError):
                    names += os.listdir(directory)
        for controller in ("memory", "pids", ""):
            with suppress(FileNotFoundError):
                names += [name for name in os.listdir(CGROUPS / controller) if self._place.installation in name]
        found = {(f"run_{match[1]}", int(match[2])) for match in map(_NAME.search, names) if match and match[2] != "0"}
        if found != self._last:
            self._last = found
            self._recorder.add("world", live=sorted(found))


def as_judged(event: dict[str, Any]) -> dict[str, Any]:
    """The part of an event that is judged."""
    data = event["data"]
    return {
        "id": event["id"], "run": event["subject"], "tenant": event["tenant"], "seq": int(event["sequence"]),
        "type": event["type"].removeprefix("dev.blastdoor."), "fence": data.get("fence"),
        "outcome": data.get("outcome"), "event_time": event["time"],
    }  # fmt: skip


@contextmanager
def _planted(place: Place) -> Iterator[None]:
    """A process with the installation's mark: what the sweep must find."""
    sleeper = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "sleep", "60"], env={"PATH": os.defpath, "LEFT": place.installation}
    )
    try:
        yield
    finally:
        sleeper.kill()
        sleeper.wait()
