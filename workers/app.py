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
from functools import partial
from types import FrameType
from typing import Any, cast

import celery.apps.worker
import structlog
from celery import bootsteps, signals

from service.adapters import failpoints
from service.adapters.blobs import FileBlobs
from service.adapters.celery_queue import RING_TASK, WORKER_OPTIONS, CeleryDoorbell, celery_app, queue_name
from service.adapters.redis_bus import RedisHints
from service.adapters.sql_store import SqlStore
from service.core.boundary import Boundary, BoundaryKind, Capabilities, ClusterChoices
from service.core.custody import ReaperStore
from service.core.errors import BlastdoorError
from service.core.ids import new_id
from service.core.placement import queues
from service.core.ports.runs import RunLine
from service.core.ports.tenants import WorkerRecord
from service.logs import configure, own_the_streams, say_unknown
from service.metrics import Address, new_registry, serve_if_asked
from service.settings import Settings, unknown_names
from workers.drain import draining
from workers.environment import cluster_choices
from workers.housekeeping import Housekeeping, Times
from workers.metrics import MeteredLine, MeteredRecovery, PoolMetrics, ReaperMetrics
from workers.reaper import Reaper
from workers.registrar import registering
from workers.registry import Keeping, Warmable, load
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

    @property
    def kubeconfig(self) -> Any:
        return self.settings.kubeconfig

    @property
    def kube_image(self) -> str:
        return self.settings.kube_image

    @property
    def namespace_variants(self) -> Sequence[str]:
        return self.settings.namespace_variants

    @property
    def clusters(self) -> ClusterChoices:
        return cluster_choices(self.settings)


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
    settings = Settings()
    failpoints.arm(settings.failpoints, environment=settings.environment)
    return {"worker": run_worker, "reaper": run_reaper}[role](settings)


# --- the worker -----------------------------------------------------------------------------------------------------


def run_worker(settings: Settings) -> int:
    """Probe, register, consume. Returns when Celery stops; 3 when this host can build nothing."""
    configure(settings.log_level, program="worker")
    own_the_streams()
    say_unknown(unknown_names())
    _silence_celery()
    parts = build(settings)
    capabilities = probe(parts.boundaries)
    record = WorkerRecord(
        id=new_id("wrk"), host=socket.gethostname(), site=settings.site, capabilities=capabilities,
        slots=settings.worker_concurrency,
    )  # fmt: skip
    parts.store.record_worker(record)
    heard = {one: queue_name(one) for one in queues(capabilities)}
    if not heard:
        log.error("this host can build no boundary; run `blastdoor doctor`")
        return 3
    app = celery_app(settings.broker_url)
    pool = PoolMetrics(settings.runtime_dir) if settings.metrics_address else None
    lines = _LinePerProcess(settings, record, pool)
    busy = _Busy()
    register(app, lines, ring_task=RING_TASK, playing=partial(_playing, busy, lines))
    app.Worker = _soft_shutdown(app.Worker, busy)
    signals.worker_process_init.connect(lambda **_: lines.warm(), weak=False)
    app.steps["worker"].add(
        registering(
            parts.store, record, measure=lambda: probe(parts.boundaries), heard=heard, queue_name=queue_name,
            every_s=settings.probe_s,
        )
    )  # fmt: skip
    app.steps["worker"].add(
        draining(
            parts.store, parts.doorbell, worker_id=record.id, queues=heard, busy=busy.anybody,
            every_s=settings.orders_poll_s,
        )
    )  # fmt: skip
    if pool is not None:
        app.steps["worker"].add(_scraped(pool, settings.metrics_address))
    listed = ",".join(heard.values())
    log.info("worker starts", worker=record.id, queues=listed, concurrency=settings.worker_concurrency)
    pool_size = str(settings.worker_concurrency)
    arguments = ["--quiet", "worker", "-Q", listed, "-c", pool_size, "-P", "prefork", "-n", record.id]
    try:
        app.worker_main([*arguments, *WORKER_OPTIONS, "-l", settings.log_level])
    finally:
        if pool is not None:
            pool.close()
    parts.store.forget_worker(record.id)
    return 0


def _silence_celery() -> None:
    """The log is ours: Celery adds no handlers to it, and says nothing past it. What it says in a signal handler goes
    straight to the descriptor; the same is logged as well."""
    signals.setup_logging.connect(lambda **_: None, weak=False)
    celery.apps.worker.safe_say = lambda *_: None


class _LinePerProcess:
    """Each child makes its own connections, once, after the fork. At each bell it offers what its parent measured last,
    which is what the API places runs by: older news would let a bell for a new runtime's first run be used up."""

    def __init__(self, settings: Settings, record: WorkerRecord, pool: PoolMetrics | None) -> None:
        self._settings, self._record, self._pool = settings, record, pool
        self._parts: Parts | None = None
        self._metered: MeteredLine | None = None

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
            runs=parts.store if self._metered is None else cast(RunLine, self._metered),
            blobs=parts.blobs,
            hints=parts.hints,
            doorbell=parts.doorbell,
            boundaries=parts.boundaries,
            offered=queues(capabilities),
            runtimes=sorted({name for row in capabilities if row.available for name in row.runtimes}),
            installation=parts.installation,
            site=settings.site,
            worker_id=self._record.id,
            times=times,
        )

    def warm(self) -> None:
        """What the first run would otherwise wait for. Celery kills a child that takes four seconds to start."""
        if self._pool is not None:
            self._pool.forked()
        self.rest()
        for boundary in self._mine().boundaries.values():
            if isinstance(boundary, Warmable):
                boundary.warm()

    def rest(self) -> None:
        """Nothing is being played: what is counted of it is final."""
        self._mine()
        if self._metered is not None:
            self._metered.rest()

    def _mine(self) -> Parts:
        if self._parts is None or self._parts.pid != os.getpid():
            self._parts = build(self._settings)
            if self._pool is not None:
                self._metered = MeteredLine(self._parts.store, self._pool.metrics)
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


@contextmanager
def _playing(busy: _Busy, lines: _LinePerProcess) -> Iterator[None]:
    with busy.playing():
        try:
            yield
        finally:
            lines.rest()


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


def _scraped(pool: PoolMetrics, asked: str) -> type[Any]:
    """A step of the worker's parent that answers Prometheus on its event loop: no thread, since the parent forks."""
    address, registry = Address.parse(asked), new_registry("worker")
    assert address is not None
    try:
        fd, answer = pool.listen(registry, address.host, address.port)
    except OSError as error:
        raise BlastdoorError(f"metrics cannot be served on {address}: {error.strerror}") from error
    log.info("metrics_served", address=str(Address(address.host, pool.port)))

    class Scraped(bootsteps.StartStopStep):  # type: ignore[misc]
        def register_with_event_loop(self, worker: Any, hub: Any) -> None:
            hub.add_reader(fd, answer)

    return Scraped


# --- the reaper -----------------------------------------------------------------------------------------------------


def run_reaper(settings: Settings) -> int:
    """Reconcile and sweep on a timer until SIGTERM or SIGINT, then once more. Returns 0."""
    configure(settings.log_level, program="reaper")
    own_the_streams()
    say_unknown(unknown_names())
    parts = build(settings)
    registry = new_registry("reaper")
    metrics = ReaperMetrics(registry)
    serve_if_asked(registry, settings.metrics_address)
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    log.info("reaper starts", site=settings.site, installation=parts.installation)
    runs = cast(ReaperStore, MeteredRecovery(parts.store, metrics))
    reaper = Reaper(
        parts.boundaries.values(), runs, parts.hints, installation=parts.installation, site=settings.site,
        quarantine_after=timedelta(seconds=settings.quarantine_after_s), on_quarantine=metrics.quarantined.inc,
        silent_after=timedelta(seconds=settings.site_silent_s),
    )  # fmt: skip
    housekeeping = Housekeeping(
        reaper=reaper, runs=runs, doorbell=parts.doorbell, hints=parts.hints, metrics=metrics, site=settings.site,
        kept=[boundary for boundary in parts.boundaries.values() if isinstance(boundary, Keeping)],
        times=Times(
            every=timedelta(seconds=settings.housekeeping_s), orders=timedelta(seconds=settings.orders_poll_s),
            max_queue=timedelta(seconds=settings.max_queue_s), ring_after=timedelta(seconds=settings.ring_after_s),
            site_silent=timedelta(seconds=settings.site_silent_s),
        ),
    )  # fmt: skip
    return housekeeping.run(stop)
