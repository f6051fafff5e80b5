"""What the relay's and the webhooks' processes count, and how things stand in the database when somebody looks."""

from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric
from prometheus_client.core import GaugeMetricFamily

from service.core.errors import BlastdoorError
from service.core.ports.publishing import OutboxRow, Standings
from service.core.ports.tenants import WorkerStore

_TYPE_PREFIX = "dev.blastdoor."
_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20)


class RelayMetrics:
    """Without a registry it counts for nobody."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self._published = Counter(
            "blastdoor_events_published_total", "Events put on the stream.", ("type",), registry=registry
        )
        self._republished = Counter(
            "blastdoor_events_republished_total", "Events marked to be published again, since the stream lost them.",
            registry=registry,
        )  # fmt: skip
        self._trimmed_unread = Counter(
            "blastdoor_events_trimmed_unread_total",
            "Events that a consumer group had not acknowledged when the stream grew too long; it gets them again.",
            registry=registry,
        )
        self._failures = Counter(
            "blastdoor_relay_failures_total", "Steps of the relay that failed, by whose answer was missing or wrong.",
            ("party",), registry=registry,
        )  # fmt: skip
        self._leading = Gauge(
            "blastdoor_relay_leading", "1 while this relay is the one that publishes.", registry=registry
        )

    def watch(self, *, leading: Callable[[], bool]) -> None:
        """What is asked at each scrape."""
        self._leading.set_function(leading)

    def published(self, rows: Sequence[OutboxRow]) -> None:
        for row in rows:
            self._published.labels(row.type.removeprefix(_TYPE_PREFIX)).inc()

    def republishing(self, rows: int) -> None:
        self._republished.inc(rows)

    def trimmed_unread(self, events: int) -> None:
        self._trimmed_unread.inc(events)

    def failed(self, party: str) -> None:
        """`party`: store or bus."""
        self._failures.labels(party).inc()


class WebhookMetrics:
    """For the process that delivers. `result` is a label, so its words must be few and ours."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self._deliveries = Counter(
            "blastdoor_webhook_deliveries_total", "Attempts to deliver, by how they went.", ("result",),
            registry=registry,
        )  # fmt: skip
        self._duration = Histogram(
            "blastdoor_webhook_delivery_duration_seconds", "Of one attempt, from its start to the end of the answer.",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._pending = Gauge(
            "blastdoor_webhook_pending_deliveries", "Deliveries that are still to be made.", registry=registry
        )
        self._dead = Gauge(
            "blastdoor_webhook_dead_letters", "Deliveries given up, and kept for a replay.", registry=registry
        )

    def watch(self, *, pending: Callable[[], float], dead: Callable[[], float]) -> None:
        """What is asked at each scrape. Each raises BlastdoorError when it cannot say, and NaN is shown."""
        self._pending.set_function(_or_nan(pending))
        self._dead.set_function(_or_nan(dead))

    def attempted(self, result: str, *, duration_s: float) -> None:
        self._deliveries.labels(result).inc()
        self._duration.observe(duration_s)


class StandingCollector:
    """What the database says at each scrape. Every relay tells the same, leading or not: take the `max`."""

    def __init__(self, standings: Standings, workers: WorkerStore, *, worker_fresh: timedelta) -> None:
        self._standings = standings
        self._workers = workers
        self._fresh = worker_fresh

    def describe(self) -> Iterator[Metric]:
        """The names, without a question to the database: what a registry asks when this is registered."""
        yield from _families()

    def collect(self) -> Iterator[Metric]:
        """Only `blastdoor_database_up` when the database does not answer: old numbers would look like new ones."""
        up, runs, waited, unpublished, lag, workers = _families()
        try:
            standing = self._standings.standing()
            live = self._workers.live_workers(fresh=self._fresh)
        except BlastdoorError:
            up.add_metric((), 0)
            yield up
            return
        up.add_metric((), 1)
        for phase, count in standing.runs.items():
            runs.add_metric((str(phase),), count)
        waited.add_metric((), standing.waited.total_seconds())
        unpublished.add_metric((), standing.unpublished)
        lag.add_metric((), standing.lag.total_seconds())
        known = sorted({row.boundary for worker in live for row in worker.capabilities})
        offered = [row.boundary for worker in live for row in worker.capabilities if row.available]
        for boundary in known:
            workers.add_metric((boundary,), offered.count(boundary))
        yield from (up, runs, waited, unpublished, lag, workers)


def _families() -> tuple[GaugeMetricFamily, ...]:
    return (
        GaugeMetricFamily("blastdoor_database_up", "1 when the database answered this scrape."),
        GaugeMetricFamily("blastdoor_runs", "Unfinished runs, by phase.", labels=("phase",)),
        GaugeMetricFamily("blastdoor_oldest_queued_run_age_seconds", "How long the first in the queue has waited."),
        GaugeMetricFamily("blastdoor_outbox_pending_events", "Committed events that are not yet on the stream."),
        GaugeMetricFamily("blastdoor_outbox_lag_seconds", "How long the oldest of them has waited."),
        GaugeMetricFamily(
            "blastdoor_live_workers", "Workers heard of lately that can build it, by boundary.", labels=("boundary",)
        ),
    )


def _or_nan(ask: Callable[[], float]) -> Callable[[], float]:
    def asked() -> float:
        try:
            return ask()
        except BlastdoorError:
            return float("nan")

    return asked
