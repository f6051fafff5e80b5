"""What a worker and a reaper count. Labels are words of ours: boundaries, phases, outcomes, reasons.

A worker's runs are played by processes that it forks, so its numbers are in prometheus-client's multiprocess mode: a
file for each process and kind of metric, in a directory of the runtime directory, added up at each scrape. A file is
named by its child's place in the pool and not by its pid: the child that takes a dead one's place counts on in the same
file, so that no number falls and no file is left behind, however often Celery replaces its children.

The parent answers scrapes on its own event loop: a thread in it could hold a lock at the moment of a fork.
"""

import fcntl
import io
import os
import shutil
import socket
import socketserver
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import structlog
from billiard.process import current_process
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app, values
from prometheus_client.multiprocess import MultiProcessCollector

from service.core.lease import LeaseView
from service.core.placement import boundary_of
from service.core.ports.runs import Claim, RunLine
from service.core.run import Outcome, Phase, Reason, Result, Verdict

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_PATIENCE_S = 1.0
_MAX_HEAD = 16 * 1024
_PREFIX = "metrics-"

log = structlog.get_logger()


class WorkerMetrics:
    """Without a registry they are added up by `PoolMetrics`, or seen by nobody."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.finished = Counter(
            "blastdoor_runs_finished_total", "Runs ended by this worker, with how they ended.",
            ("boundary", "outcome", "reason"), registry=registry,
        )  # fmt: skip
        self.requeued = Counter(
            "blastdoor_runs_requeued_total", "Runs given back to the queue, since their boundary could not be built.",
            ("boundary",), registry=registry,
        )  # fmt: skip
        self.phase = Histogram(
            "blastdoor_run_phase_duration_seconds",
            "How long runs take: queue_wait, provisioning, playing (their steps), collecting, teardown.",
            ("boundary", "phase"), buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.built = Counter(
            "blastdoor_boundaries_built_total", "Boundaries built, with the bundle in them.", ("boundary",),
            registry=registry,
        )  # fmt: skip
        self.destroyed = Counter(
            "blastdoor_boundaries_destroyed_total", "Boundaries destroyed by the worker that had them.", ("boundary",),
            registry=registry,
        )  # fmt: skip
        self.lost = Counter(
            "blastdoor_leases_lost_total", "Runs that this worker had to let go of before their end.", ("boundary",),
            registry=registry,
        )  # fmt: skip
        self.active = Gauge(
            "blastdoor_active_runs", "Runs being played now.", registry=registry, multiprocess_mode="sum"
        )


class MeteredLine:
    """A RunLine that times and counts what one process, playing one run at a time, writes through it."""

    def __init__(self, behind: RunLine, metrics: WorkerMetrics, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._behind, self._metrics, self._clock = behind, metrics, clock
        self._boundary, self._phase, self._since, self._held = "", "", 0.0, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._behind, name)

    def claim(self, **asked: Any) -> Claim | None:
        claim = self._behind.claim(**asked)
        if claim is not None:
            self._boundary, self._phase = claim.run.placement.boundary, "provisioning"
            self._since, self._held = self._clock(), True
            self._metrics.phase.labels(self._boundary, "queue_wait").observe(claim.waited.total_seconds())
            self._metrics.active.set(1)
        return claim

    def mark_running(self, run_id: str, fence: int, **more: Any) -> None:
        self._behind.mark_running(run_id, fence, **more)
        self._metrics.built.labels(self._boundary).inc()
        self._next("playing")

    def mark_collecting(self, run_id: str, fence: int, **more: Any) -> None:
        self._behind.mark_collecting(run_id, fence, **more)
        self._next("collecting")

    def finish(self, run_id: str, fence: int, result: Result, **more: Any) -> None:
        self._behind.finish(run_id, fence, result, **more)
        self._ended(result.verdict)

    def requeue(self, run_id: str, fence: int, **more: Any) -> Phase:
        phase = self._behind.requeue(run_id, fence, **more)
        if phase is Phase.QUEUED:
            self._metrics.requeued.labels(self._boundary).inc()
            self._held = False
            self._next("teardown")
        else:
            self._ended(Verdict(outcome=Outcome.ERRORED, reason=Reason.PROVISION_FAILED))
        return phase

    def record_destroyed(self, run_id: str, fence: int) -> bool:
        recorded = self._behind.record_destroyed(run_id, fence)
        self._metrics.destroyed.labels(self._boundary).inc()
        if not self._held:
            self._next("")
        return recorded

    def rest(self) -> None:
        """Whatever was played is over; a run that neither ended nor went back was lost."""
        if self._held:
            self._metrics.lost.labels(self._boundary).inc()
        self._held = False
        self._metrics.active.set(0)

    def _ended(self, verdict: Verdict) -> None:
        self._metrics.finished.labels(self._boundary, *_words(verdict)).inc()
        self._held = False
        self._next("teardown")

    def _next(self, phase: str) -> None:
        now = self._clock()
        self._metrics.phase.labels(self._boundary, self._phase).observe(now - self._since)
        self._phase, self._since = phase, now


class ReaperMetrics:
    """Without a registry it counts for nobody."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.passes = Histogram(
            "blastdoor_reaper_pass_duration_seconds", "Of one pass: reconcile, list what exists, destroy what is left.",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.failed = Counter(
            "blastdoor_reaper_failed_passes_total", "Passes that were interrupted; the next goes on.", registry=registry
        )
        self.swept = Counter(
            "blastdoor_boundaries_swept_total", "Boundaries without a run, destroyed.", ("boundary",), registry=registry
        )
        self.resisted = Counter(
            "blastdoor_boundaries_resisted_total", "Attempts to destroy a boundary without a run that did not succeed.",
            ("boundary",), registry=registry,
        )  # fmt: skip
        self.quarantined = Counter(
            "blastdoor_boundaries_quarantined_total", "Boundaries that resisted destruction past their deadline.",
            registry=registry,
        )  # fmt: skip
        self.orphans = Gauge(
            "blastdoor_orphan_boundaries", "Boundaries without a run that the last pass left behind.", registry=registry
        )
        self._standby = Gauge(
            "blastdoor_standby_clusters", "Kept ready for whoever comes next: wanted, ready, being made.", ("state",),
            registry=registry,
        )  # fmt: skip
        self._standby_used = Gauge(
            "blastdoor_standby_clusters_ended", "Of this host so far: claimed by a run, too old, failed.", ("how",),
            registry=registry,
        )  # fmt: skip
        self.recovered = Counter(
            "blastdoor_runs_recovered_total", "Runs that nobody acted on: ended, or requeued (outcome `none`).",
            ("boundary", "outcome", "reason"), registry=registry,
        )  # fmt: skip

    def standing(self, counted: Mapping[str, int]) -> None:
        """As `workers.registry.Keeping.standing` has it; nothing where none are kept."""
        for name, number in counted.items():
            if name in ("wanted", "ready", "being_made"):
                self._standby.labels(name).set(number)
            else:
                self._standby_used.labels(name).set(number)


class MeteredRecovery:
    """A RunLine that counts what is recovered through it."""

    def __init__(self, behind: RunLine, metrics: ReaperMetrics) -> None:
        self._behind, self._metrics = behind, metrics

    def __getattr__(self, name: str) -> Any:
        return getattr(self._behind, name)

    def recover_finish(self, view: LeaseView, verdict: Verdict) -> bool:
        done = self._behind.recover_finish(view, verdict)
        if done:
            self._metrics.recovered.labels(boundary_of(view.boundary), *_words(verdict)).inc()
        return done

    def recover_requeue(self, view: LeaseView) -> bool:
        done = self._behind.recover_requeue(view)
        if done:
            self._metrics.recovered.labels(boundary_of(view.boundary), "none", "none").inc()
        return done


def _words(verdict: Verdict) -> tuple[str, str]:
    return str(verdict.outcome), str(verdict.reason or "none")


class PoolMetrics:
    """A worker's, added up over its processes. Make it before the fork, and before any other metric."""

    def __init__(self, runtime_dir: Path) -> None:
        runtime_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        _sweep(runtime_dir)
        self.directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=runtime_dir))
        self._lock = os.open(self.directory, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_SH)  # the children inherit it: it is held for as long as one of them lives
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(self.directory)
        values.ValueClass = values.MultiProcessValue(place)  # type: ignore[assignment, no-untyped-call, unused-ignore]
        self.metrics = WorkerMetrics()
        self._server: WSGIServer | None = None

    def listen(self, registry: CollectorRegistry, host: str, port: int) -> tuple[int, Callable[[], None]]:
        """-> what becomes readable when somebody scrapes, and what answers then; within a second, whoever it is.
        Raises OSError. The port is `self.port`."""
        MultiProcessCollector(registry, path=str(self.directory))  # type: ignore[no-untyped-call, unused-ignore]
        kind = _Server6 if ":" in host else _Server
        server = make_server(host, port, make_wsgi_app(registry), kind, _Scrape)
        server.timeout = 0
        self._server, self.port = server, server.server_port
        return server.fileno(), server.handle_request

    def forked(self) -> None:
        """In a child: the parent answers."""
        if self._server is not None:
            self._server.socket.close()

    def close(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        os.close(self._lock)


def place() -> str:
    """A name that no two processes of the pool have at the same time."""
    index = getattr(current_process(), "index", None)
    return "parent" if index is None else f"child{index}"


def _sweep(runtime_dir: Path) -> None:
    """What workers that were killed left."""
    for left in runtime_dir.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # it has just gone, or it is not ours to open
            lock = os.open(left, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
            finally:
                os.close(lock)


class _Server(WSGIServer):
    def server_bind(self) -> None:
        """Without the look-up of the host's name, which may take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def handle_error(self, request: object, client_address: object) -> None:
        log.debug("scrape_failed", error=str(sys.exc_info()[1]))


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Scrape(WSGIRequestHandler):
    """Waits for a whole request no longer than `_PATIENCE_S`: the event loop has other things to do."""

    def setup(self) -> None:
        super().setup()
        deadline, head = time.monotonic() + _PATIENCE_S, b""
        while b"\r\n\r\n" not in head and len(head) < _MAX_HEAD:
            self.connection.settimeout(max(deadline - time.monotonic(), 0.001))
            chunk = self.connection.recv(4096)
            if not chunk:
                break
            head += chunk
        self.connection.settimeout(_PATIENCE_S)
        self.rfile = io.BytesIO(head)  # type: ignore[assignment, unused-ignore]

    def log_message(self, format: str, *args: object) -> None:
        return
