"""What the application knows of its customers' runs: one SQLite file, filled by two ways in that bring the same events.

Events arrive at least once, by the stream and by webhook, in no promised order between the two. So an event counts when
its id is new, and changes what is shown only when its `sequence` is higher than what was seen of that run. With this
rule nothing else has to be exactly once.
"""

import json
import sqlite3
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Way = Literal["stream", "webhook"]
FINISHED = "dev.blastdoor.run.finished"
DESTROYED = "dev.blastdoor.boundary.destroyed"

_TABLES = """
CREATE TABLE IF NOT EXISTS customer (tenant TEXT PRIMARY KEY, name TEXT NOT NULL, link TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS event (id TEXT PRIMARY KEY, run TEXT NOT NULL, type TEXT NOT NULL, sequence TEXT NOT NULL,
    first_by TEXT NOT NULL, again_by TEXT);
CREATE TABLE IF NOT EXISTS run (id TEXT PRIMARY KEY, tenant TEXT NOT NULL, sequence TEXT NOT NULL DEFAULT '',
    phase TEXT NOT NULL, story TEXT, destroyed_at TEXT);
CREATE TABLE IF NOT EXISTS put_aside (id TEXT PRIMARY KEY, event TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS setting (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


@dataclass(frozen=True)
class Customer:
    """`link` is what only this customer knows: the way to its page."""

    tenant: str
    name: str
    link: str


@dataclass(frozen=True)
class Shown:
    """A run as its customer sees it. `story`: `data` of the finished event, or None before."""

    id: str
    phase: str
    story: Mapping[str, Any] | None
    destroyed_at: str | None


class Inbox:
    """Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.executescript(_TABLES)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    # --- what comes in ------------------------------------------------------------------------------------------------

    def receive(self, event: Mapping[str, Any], *, by: Way) -> bool:
        """Take an event in, once. -> False for one that was there, or that is about nobody we know. When this returns,
        it is on disk: only then may it be acknowledged."""
        with self._lock, self._db:
            self._db.execute("BEGIN IMMEDIATE")
            if self._db.execute("SELECT 1 FROM customer WHERE tenant = ?", (event["tenant"],)).fetchone() is None:
                return False
            row = (event["id"], event["subject"], event["type"], event["sequence"], by)
            new = self._db.execute("INSERT OR IGNORE INTO event VALUES (?, ?, ?, ?, ?, NULL)", row).rowcount == 1
            if not new:
                self._db.execute("UPDATE event SET again_by = ? WHERE id = ? AND first_by <> ?", (by, event["id"], by))
                return False
            self._tell(event)
            return True

    def _tell(self, event: Mapping[str, Any]) -> None:
        run, data = event["subject"], event["data"]
        self._insert(run, event["tenant"])
        if event["type"] == DESTROYED:
            self._db.execute("UPDATE run SET destroyed_at = ? WHERE id = ?", (event["time"], run))
        elif event["type"] == FINISHED:
            self._db.execute("UPDATE run SET story = ? WHERE id = ?", (json.dumps(data), run))
        if "phase" in data:
            said = (event["sequence"], data["phase"], run, event["sequence"])
            self._db.execute("UPDATE run SET sequence = ?, phase = ? WHERE id = ? AND sequence < ?", said)

    def put_aside(self, event: Mapping[str, Any]) -> None:
        """What could not be taken in, however often it came: for somebody to look at."""
        with self._lock:
            self._db.execute("INSERT OR IGNORE INTO put_aside VALUES (?, ?)", (event["id"], json.dumps(event)))

    def submitted(self, run: str, tenant: str) -> None:
        """The answer to our own POST; its first event may have been here before it."""
        with self._lock:
            self._insert(run, tenant)

    def _insert(self, run: str, tenant: str) -> None:
        self._db.execute("INSERT OR IGNORE INTO run (id, tenant, phase) VALUES (?, ?, 'queued')", (run, tenant))

    # --- what is shown ------------------------------------------------------------------------------------------------

    def runs_of(self, tenant: str) -> list[Shown]:
        """Newest first; ids sort by time."""
        with self._lock:
            rows = self._db.execute(
                "SELECT * FROM run WHERE tenant = ? ORDER BY id DESC LIMIT 50", (tenant,)
            ).fetchall()
        return [
            Shown(row["id"], row["phase"], json.loads(row["story"]) if row["story"] else None, row["destroyed_at"])
            for row in rows
        ]

    def counts(self) -> dict[str, int]:
        """How many events came, first by which way, and how many came by both."""
        with self._lock:
            (row,) = self._db.execute(
                "SELECT count(*) AS events, coalesce(sum(first_by = 'stream'), 0) AS first_by_stream,"
                " coalesce(sum(first_by = 'webhook'), 0) AS first_by_webhook,"
                " count(again_by) AS by_both, (SELECT count(*) FROM put_aside) AS put_aside FROM event"
            ).fetchall()
        return dict(row)

    # --- customers and settings ---------------------------------------------------------------------------------------

    def add_customer(self, customer: Customer) -> None:
        with self._lock:
            row = (customer.tenant, customer.name, customer.link)
            self._db.execute("INSERT OR IGNORE INTO customer VALUES (?, ?, ?)", row)

    def customers(self) -> list[Customer]:
        with self._lock:
            rows = self._db.execute("SELECT tenant, name, link FROM customer ORDER BY name").fetchall()
        return [Customer(*row) for row in rows]

    def by_link(self, link: str) -> Customer | None:
        return next((customer for customer in self.customers() if customer.link == link), None)

    def setting(self, name: str) -> str | None:
        with self._lock:
            row = self._db.execute("SELECT value FROM setting WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row["value"])

    def set(self, name: str, value: str) -> None:
        with self._lock:
            self._db.execute("INSERT OR REPLACE INTO setting VALUES (?, ?)", (name, value))
