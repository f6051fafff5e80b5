"""Composition root of the workers' side: settings and adapters in, a Celery worker and a reaper process out.

The worker's parent process probes, says that it lives, and consumes only the queues of what it can build; its children
play runs. The reaper is a process of its own, one per site, so that it outlives any worker.
"""

import os
import signal
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import Any

import structlog
from celery import bootsteps, signals

from service.adapters.blobs import FileBlobs
from service.adapters.celery_queue import RING_TASK, WORKER_OPTIONS, CeleryDoorbell, celery_app, queue_name
from service.adapters.redis_bus import RedisHints
from service.adapters.sql_store import SqlStore
from service.core.boundary import Boundary, BoundaryKind, Capabilities
from service.core.errors import BlastdoorError, Unavailable
from service.core.ids import new_id
from service.core.ports import WorkerRecord
from service.logs import configure
from service.settings import Settings
from workers.reaper import sweep
from workers.reconcile import reconcile
from workers.registry import load
from workers.run_scenario import Line
from workers.tasks import register
from workers.watch import WatchTimes

log = structlog.get_logger()


@dataclass(frozen=True)
class Site:
    """This host in its installation, as drivers see it (`registry.Host`)."""

    settings: Settings
    installation: str

    @property
    def site(self) -> str:
        return self.settings.site

    @property
    def state_dir(self) -> Any:
        return self.settings.state_dir

    @property
    def runtime_dir(self) -> Any:
        return self.settings.runtime_dir

    @property
    def runsc(self) -> Any:
        return self.settings.runsc


@dataclass
class Parts:
    """The adapters of one process. Never carried over a fork: `parts()` makes them anew for each process id."""

    settings: Settings
    store: SqlStore
    blobs: FileBlobs
    hints: RedisHints
    doorbell: CeleryDoorbell
    boundaries: Mapping[BoundaryKind, Boundary]
    installation: str
    pid: int = field(default_factory=os.getpid)


def build(settings: Settings) -> Parts:
    store = SqlStore(settings.sql_url)
    site = Site(settings, store.installation_id())
    return Parts(
        settings=settings,
        store=store,
        blobs=FileBlobs(settings.state_dir),
        hints=RedisHints(settings.broker_url),
        doorbell=CeleryDoorbell(settings.broker_url),
        boundaries={kind: load(kind, site) for kind in map(BoundaryKind, settings.boundaries)},
        installation=site.installation,
    )


def probe(boundaries: Mapping[BoundaryKind, Boundary]) -> tuple[Capabilities, ...]:
    """What this host can enforce now; each row that is missing something is logged with its reasons."""
    rows = tuple(row for boundary in boundaries.values() for row in boundary.probe())
    for row in rows:
        if not row.available:
            log.warning("cannot build a boundary", boundary=row.boundary, missing=list(row.missing))
    return rows


def start(role: str) -> int:
    """`worker` or `reaper`, with the settings of the environment; -> the exit status."""
    return {"worker": run_worker, "reaper": run_reaper}[role](Settings())


# --- the worker -----------------------------------------------------------------------------------------------------


def run_worker(settings: Settings) -> int:
    """Probe, register, consume. Returns when Celery stops; 3 when this host can build nothing."""
    configure(settings.log_level, program="worker")
    parts = build(settings)
    capabilities = probe(parts.boundaries)
    record = WorkerRecord(id=new_id("wrk"), host=socket.gethostname(), site=settings.site, capabilities=capabilities)
    parts.store.record_worker(record)
    offered = [row.boundary for row in capabilities if row.available]
    if not offered:
        log.error("this host can build no boundary; run `blastdoor doctor`")
        return 3
    runtimes = sorted({name for row in capabilities if row.available for name in row.runtimes})
    app = celery_app(settings.broker_url)
    lines = _LinePerProcess(settings, record.id, offered, runtimes)
    register(app, lines, ring_task=RING_TASK)
    signals.worker_process_init.connect(lambda **_: lines(), weak=False)
    app.steps["worker"].add(_registrar(parts.store, record, every_s=settings.probe_s))
    queues = ",".join(queue_name(boundary) for boundary in offered)
    log.info("worker starts", worker=record.id, queues=queues, concurrency=settings.worker_concurrency)
    arguments = ["worker", "-Q", queues, "-c", str(settings.worker_concurrency), "-P", "prefork", "-n", record.id]
    app.worker_main([*arguments, *WORKER_OPTIONS, "-l", settings.log_level])
    parts.store.forget_worker(record.id)
    return 0


class _LinePerProcess:
    """Each child makes its own connections, once, after the fork."""

    def __init__(self, settings: Settings, worker_id: str, offered: Sequence[str], runtimes: Sequence[str]) -> None:
        self._settings, self._worker_id, self._offered, self._runtimes = settings, worker_id, offered, runtimes
        self._line: tuple[int, Line] | None = None

    def __call__(self) -> Line:
        if self._line is None or self._line[0] != os.getpid():
            self._line = os.getpid(), self._build()
        return self._line[1]

    def _build(self) -> Line:
        settings, parts = self._settings, build(self._settings)
        times = WatchTimes(
            lease=timedelta(seconds=settings.lease_s),
            heartbeat=timedelta(seconds=settings.heartbeat_s),
            self_fence=timedelta(seconds=settings.self_fence_s),
            cancel_poll=timedelta(seconds=settings.cancel_poll_s),
        )
        return Line(
            runs=parts.store,
            blobs=parts.blobs,
            hints=parts.hints,
            doorbell=parts.doorbell,
            boundaries=parts.boundaries,
            offered=self._offered,
            runtimes=self._runtimes,
            installation=parts.installation,
            site=settings.site,
            worker_id=self._worker_id,
            times=times,
        )


def _registrar(store: SqlStore, record: WorkerRecord, *, every_s: float) -> type[Any]:
    """A step of the worker's parent that says `alive` on its event loop's timer: no thread, since the parent forks."""

    class Registrar(bootsteps.StartStopStep):  # type: ignore[misc]
        requires = ("celery.worker.components:Timer",)

        def start(self, worker: Any) -> None:
            self.timer = worker.timer.call_repeatedly(every_s, self.beat)

        def stop(self, worker: Any) -> None:
            self.timer.cancel()

        def beat(self) -> None:
            try:
                store.record_worker(record)
            except Unavailable as error:
                log.warning("cannot say that this worker lives", error=str(error))

    return Registrar


# --- the reaper -----------------------------------------------------------------------------------------------------


def run_reaper(settings: Settings) -> int:
    """Reconcile and sweep on a timer until SIGTERM or SIGINT, then once more. Returns 0."""
    configure(settings.log_level, program="reaper")
    parts = build(settings)
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    log.info("reaper starts", site=settings.site, installation=parts.installation)
    while not stop.is_set():
        housekeep(parts)
        stop.wait(settings.housekeeping_s)
    housekeep(parts)
    return 0


def housekeep(parts: Parts) -> None:
    """One pass. What cannot be reached now is reached by the next pass; nothing here keeps state between passes."""
    settings = parts.settings
    try:
        reconcile(
            parts.store,
            parts.doorbell,
            parts.hints,
            max_queue=timedelta(seconds=settings.max_queue_s),
            ring_after=timedelta(seconds=settings.ring_after_s),
        )
        swept = sweep(
            parts.boundaries.values(), parts.store, parts.hints, installation=parts.installation, site=settings.site
        )
    except BlastdoorError as error:
        log.warning("housekeeping was interrupted; the next pass goes on", error=str(error))
        return
    if swept.destroyed or swept.resisted:
        log.info("swept", destroyed=len(swept.destroyed), resisted=len(swept.resisted), recorded=swept.recorded)
