"""Composition root of the workers' side: settings and adapters in, a Celery worker and a reaper process out.

The worker's parent process probes, says that it lives, and consumes only the queues of what it can build; its children
play runs. The reaper is a process of its own, one per site, so that it outlives any worker.
"""

import fcntl
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from workers.registry import Warmable, load
from workers.run_scenario import Line
from workers.tasks import register
from workers.watch import WatchTimes

_JUST_HEARD_S = 0.2
"""A child that was handed a bell has begun to play by then."""

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
    """The adapters of one process. Never carried over a fork: each child makes them anew."""

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
    offered = _offered(capabilities)
    if not offered:
        log.error("this host can build no boundary; run `blastdoor doctor`")
        return 3
    app = celery_app(settings.broker_url)
    lines = _LinePerProcess(settings, record)
    busy = _Busy()
    register(app, lines, ring_task=RING_TASK, playing=busy.playing)
    app.Worker = _soft_shutdown(app.Worker, busy)
    signals.worker_process_init.connect(lambda **_: lines.warm(), weak=False)
    app.steps["worker"].add(_registrar(parts, record))
    queues = ",".join(queue_name(boundary) for boundary in offered)
    log.info("worker starts", worker=record.id, queues=queues, concurrency=settings.worker_concurrency)
    arguments = ["worker", "-Q", queues, "-c", str(settings.worker_concurrency), "-P", "prefork", "-n", record.id]
    app.worker_main([*arguments, *WORKER_OPTIONS, "-l", settings.log_level])
    parts.store.forget_worker(record.id)
    return 0


def _offered(capabilities: Sequence[Capabilities]) -> list[str]:
    return [row.boundary for row in capabilities if row.available]


class _LinePerProcess:
    """Each child makes its own connections, once, after the fork. At each bell it offers what its parent measured last,
    which is what the API places runs by: older news would let a bell for a new runtime's first run be used up."""

    def __init__(self, settings: Settings, record: WorkerRecord) -> None:
        self._settings, self._record = settings, record
        self._parts: Parts | None = None

    def __call__(self) -> Line:
        settings, parts = self._settings, self._mine()
        self._record = parts.store.get_worker(self._record.id) or self._record
        capabilities = self._record.capabilities
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
            offered=_offered(capabilities),
            runtimes=sorted({name for row in capabilities if row.available for name in row.runtimes}),
            installation=parts.installation,
            site=settings.site,
            worker_id=self._record.id,
            times=times,
        )

    def warm(self) -> None:
        """What the first run would otherwise wait for. Celery kills a child that takes four seconds to start."""
        for boundary in self._mine().boundaries.values():
            if isinstance(boundary, Warmable):
                boundary.warm()

    def _mine(self) -> Parts:
        if self._parts is None or self._parts.pid != os.getpid():
            self._parts = build(self._settings)
        return self._parts


class _Busy:
    """Which children play a run: each holds a shared lock on a file without a name, and one that dies lets go of it."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("blastdoor-busy")

    @contextmanager
    def playing(self) -> Iterator[None]:
        fcntl.lockf(self._fd, fcntl.LOCK_SH)
        try:
            yield
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN)

    def anybody(self) -> bool:
        """Asked by the parent."""
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        fcntl.lockf(self._fd, fcntl.LOCK_UN)
        return False


def _soft_shutdown(worker: type[Any], busy: _Busy) -> type[Any]:
    """Celery's worker waits on the first SIGTERM for all of `worker_soft_shutdown_timeout`; once the last run has ended
    it need not."""

    class Worker(worker):  # type: ignore[misc]
        def wait_for_soft_shutdown(self) -> None:
            deadline = time.monotonic() + self.app.conf.worker_soft_shutdown_timeout
            time.sleep(_JUST_HEARD_S)
            while busy.anybody() and time.monotonic() < deadline:
                time.sleep(_JUST_HEARD_S)

    return Worker


def _registrar(parts: Parts, record: WorkerRecord) -> type[Any]:
    """A step of the worker's parent that says on its event loop's timer what this host can build: no thread, since the
    parent forks."""

    class Registrar(bootsteps.StartStopStep):  # type: ignore[misc]
        requires = ("celery.worker.components:Timer",)

        def start(self, worker: Any) -> None:
            self.timer = worker.timer.call_repeatedly(parts.settings.probe_s, self.beat)

        def stop(self, worker: Any) -> None:
            self.timer.cancel()

        def beat(self) -> None:
            try:
                measured = record.model_copy(update={"capabilities": probe(parts.boundaries)})
                parts.store.record_worker(measured)
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
    except Exception:  # a defect; the reaper outlives it, since nothing else ends what a dead worker left
        log.exception("housekeeping failed; the next pass goes on")
        return
    if swept.destroyed or swept.resisted:
        log.info("swept", destroyed=len(swept.destroyed), resisted=len(swept.resisted), recorded=swept.recorded)
