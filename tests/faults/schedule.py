"""A seeded schedule of faults over two sites (and one with real sandboxes), under load; then quiet; then the judge.

`run(Setup(...))` is what both `make test` and `make soak` call. What is decided at random is decided by the seed alone:
what is hit, when, and for how long. When everything is to be quiet, whatever is stopped goes on and whatever is dead is
started again, as a supervisor would, and nothing else is done by hand.
"""

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from cryptography.fernet import Fernet

from service.adapters.redis_bus import RedisBus
from service.adapters.sealing import FernetBox
from service.core.events import EventType
from service.core.tenancy import KeyKind
from service.core.webhooks.models import Owner
from service.usecases.keys import mint
from service.usecases.webhooks import create_webhook
from tests.contract.store_steps import add_tenant
from tests.faults.clients import Clients
from tests.faults.history import FINISHED, Entry, Violation, judge
from tests.faults.inflict import OF_A_SITE, Fault, Faults, Supervisor, plan
from tests.faults.place import LOOPBACK, SCALED, Forks, Place, Program, eventually, is_up, run_place
from tests.faults.recorder import Recorder, as_judged
from tests.receivers import Receiver, answering, receiving
from tests.servers import _free_port

TENANTS = ("acme", "umbrella")
REAL_SANDBOXES = "g"
SAY_EVERY_S = 30.0
_SLOWER_BY = 1.5
"""So much longer than planned the load may take, and still meet faults to its end. On a machine that is slower still
the rest is played in peace: every restart costs it seconds."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """`pace_s`: seconds between two runs; `calm_s`: the longest between two faults; `longest_s`: of a stop;
    `database`: the URL of an empty one, SQLite in `directory` when absent."""

    seed: int
    runs: int
    directory: Path
    database: str | None = None
    settings: Mapping[str, str] = field(default_factory=lambda: dict(SCALED))
    pace_s: float = 0.18
    calm_s: float = 2.0
    longest_s: float = 4.0
    quiet_within_s: float = 240.0
    gvisor: bool = True


@dataclass
class Done:
    setup: Setup
    faults: list[Fault]
    entries: list[Entry]
    violations: list[Violation]
    told: str

    def __str__(self) -> str:
        """What a failing test needs to happen again."""
        wrong = "\n".join(map(str, self.violations))
        return f"seed {self.setup.seed}\n{wrong}\n" + "\n".join(map(str, self.faults)) + f"\n{self.told}"

    def figures(self) -> dict[str, Any]:
        accepted = {entry["run"] for entry in self.entries if entry["kind"] == "accepted"}
        rows = {entry["run"]: entry for entry in self.entries if entry["kind"] == "row" and entry["run"] in accepted}
        ends: dict[str, set[str]] = {}
        for entry in self.entries:
            if entry["kind"] == "bus" and entry["type"] == FINISHED:
                ends.setdefault(entry["run"], set()).add(entry["id"])
        swept = [entry["found"] for entry in self.entries if entry["kind"] == "sweep" and not entry["planted"]]
        refused = sum(entry["kind"] == "write" and not entry["accepted"] for entry in self.entries)
        times = sorted(recoveries_s(self.entries))
        return {
            "seed": self.setup.seed,
            "accepted": len(accepted),
            "terminal": sum(row["phase"] == "finished" for row in rows.values()),
            "duplicated": sum(len(ids) > 1 for ids in ends.values()),
            "lost": len(accepted - rows.keys()) + len(rows.keys() - ends.keys()),
            "left_behind": len(swept[-1]),
            "planted_leak_found": any(entry["found"] for entry in self.entries if entry.get("planted")),
            "violations": len(self.violations),
            "recover_s": {name: _at(times, share) for name, share in (("p50", 0.5), ("p95", 0.95), ("max", 1.0))},
            "faults": dict(Counter(f"{fault.action} {fault.what}" for fault in sorted(self.faults, key=str))),
            "outcomes": dict(Counter(str(row["reason"] or row["outcome"]) for row in rows.values())),
            "played_at": dict(Counter(str(row["site"]) for row in rows.values())),
            "stale_writes_refused": refused,
        }


def _at(times: list[float], share: float) -> float | None:
    return round(times[min(int(share * len(times)), len(times) - 1)], 2) if times else None


class _Hooks:
    """A receiver for each tenant, its endpoint, and what the process that delivers needs to know."""

    def __init__(self, place: Place, receivers: Mapping[str, Receiver]) -> None:
        self._receivers, key = receivers, Fernet.generate_key().decode()
        box = FernetBox([key])
        for tenant, receiver in receivers.items():
            create_webhook(place.store, box, owner=Owner(tenant=tenant), url=receiver.url, types=[EventType.FINISHED])
        pairs = ",".join(receiver.pair for receiver in receivers.values())
        self.environment = {"BLASTDOOR_SECRETS_KEY": key, "BLASTDOOR_WEBHOOK_ALLOW": pairs}

    def record(self, recorder: Recorder) -> None:
        for tenant, receiver in self._receivers.items():
            for hit in receiver.hits:
                if len(hit.body) < int(hit.headers["content-length"]):
                    continue  # who sent it died over it
                recorder.add("webhook", receiver=tenant, **as_judged(json.loads(hit.body)))


def run(forks: Forks, setup: Setup, *, say: Callable[[str], None] = lambda _: None) -> Done:
    """Load and faults, then quiet, then the judge. The history is left in the setup's directory."""
    sites = ["a", "b", *([REAL_SANDBOXES] if setup.gvisor else [])]
    lasts_s = _SLOWER_BY * setup.runs * setup.pace_s  # how many of them come is for the load to say
    planned = plan(setup.seed, sites, lasts_s=lasts_s, calm_s=setup.calm_s, longest_s=setup.longest_s)
    with ExitStack() as stack:
        place = stack.enter_context(run_place(forks, setup.directory, database=setup.database, settings=setup.settings))
        recorder = stack.enter_context(Recorder(setup.directory / "history.jsonl"))
        keys = {}
        for tenant in TENANTS:
            add_tenant(place.store, name=tenant, concurrent=8, queued=10_000)
            keys[tenant] = mint(place.store, kind=KeyKind.TENANT, tenant=tenant).key
            recorder.add("endpoint", receiver=tenant)
        hooks = _Hooks(place, {tenant: stack.enter_context(receiving(answering(204))) for tenant in TENANTS})
        RedisBus(place.redis.url).create_stream()
        port = _free_port()
        starts = _starts(place, sites, port=port, hooks=hooks.environment)
        with recorder.watching(place), Supervisor(starts) as supervisor:
            url = f"http://{LOOPBACK}:{port}"
            eventually(lambda: is_up(url) and len(place.query("SELECT id FROM worker")) >= len(sites), why=place.told)
            clients = Clients(url, keys, recorder, seed=setup.seed)
            with ThreadPoolExecutor(1) as pool, _progress(clients, place, say):
                loading = pool.submit(clients.load, setup.runs, pace_s=setup.pace_s)
                hits = Faults(place, supervisor, random.Random(setup.seed + 1))
                faults = _inflict(planned, hits, recorder, until=loading.done)
                say(f"{len(faults)} faults were done; now quiet")
                loading.result()
                eventually(
                    lambda: place.settled() and _delivered(place),
                    seconds=setup.quiet_within_s,
                    why=lambda: f"seed {setup.seed}: {_late(place)}",
                )
            clients.read_all()
            clients.close()
        for program in place.programs:
            program.ask_to_end()
        for program in place.programs:
            program.end()
        hooks.record(recorder)
        recorder.conclude(place)
        return Done(setup, faults, recorder.entries, judge(recorder.entries), place.told())


def _starts(
    place: Place, sites: list[str], *, port: int, hooks: Mapping[str, str]
) -> dict[tuple[str, str], Callable[[], Program]]:
    starts: dict[tuple[str, str], Callable[[], Program]] = {
        ("api", "here"): lambda: place.start("api", BLASTDOOR_PORT=str(port)),
        ("relay", "here"): lambda: place.start("relay"),
        ("webhooks", "here"): lambda: place.start("webhooks", **hooks),
    }
    for site in sites:
        more = {"PAPER": ""} if site == REAL_SANDBOXES else {"BLASTDOOR_WORKER_CONCURRENCY": "2"}
        for role in OF_A_SITE:
            starts[role, site] = partial(place.start, role, site=site, **more)
    return starts


def _inflict(faults: list[Fault], hits: Faults, recorder: Recorder, *, until: Callable[[], bool]) -> list[Fault]:
    """-> those that were done."""
    began, done = time.monotonic(), list[Fault]()
    try:
        for fault in faults:
            while (left_s := began + fault.at - time.monotonic()) > 0 and not until():
                time.sleep(min(left_s, 0.1))
            if until():
                break
            done.append(fault)
            recorder.add("fault", what=fault.what, action=fault.action, site=fault.site, lasts=fault.lasts)
            hits.do(fault)
    finally:
        hits.undo()
    return done


@contextmanager
def _progress(clients: Clients, place: Place, say: Callable[[str], None]) -> Iterator[None]:
    """A line now and then, from a thread of its own."""
    stop, began = threading.Event(), time.monotonic()

    def tell() -> None:
        while not stop.wait(SAY_EVERY_S):
            finished = sum(row["phase"] == "finished" for row in place.rows())
            say(f"{time.monotonic() - began:6.0f} s: {len(clients.accepted)} accepted, {finished} finished")

    thread = threading.Thread(target=tell)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _delivered(place: Place) -> bool:
    pending, dead = place.store.delivery_counts()
    assert not dead, "a receiver that always takes it was given up"
    (row,) = place.query("SELECT count(*) AS waiting FROM outbox WHERE NOT fanned AND NOT internal")
    return pending == 0 and row["waiting"] == 0


def _late(place: Place) -> str:
    late = [row for row in place.rows() if row["phase"] != "finished" or row["fence"] != row["destroyed_fence"]]
    return f"{late[:10]} of {len(late)}; deliveries (pending, dead): {place.store.delivery_counts()}\n{place.told()}"


def recoveries_s(entries: list[Entry]) -> list[float]:
    """For each fault, from its beginning (so what was stopped or down counts in full) until the stream had told of the
    end of every run that was not over when it came, and of a run that was accepted after it and has passed."""
    accepted = {entry["run"]: float(entry["at"]) for entry in entries if entry["kind"] == "accepted"}
    told, passed = dict[str, float](), set[str]()
    for entry in entries:
        if entry["kind"] == "bus" and entry["type"] == FINISHED and entry["run"] in accepted:
            told.setdefault(entry["run"], float(entry["at"]))
            passed |= {entry["run"]} if entry["outcome"] == "passed" else set()
    found = []
    for fault in (entry for entry in entries if entry["kind"] == "fault"):
        at = float(fault["at"])
        under_way = [told[run] for run in told if accepted[run] <= at < told[run]]
        after = [told[run] for run in passed if accepted[run] > at]
        if after:
            found.append(max([min(after), *under_way]) - at)
    return found
