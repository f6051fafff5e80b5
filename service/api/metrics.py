"""What an API process counts. Labels are words of ours: route templates, methods, classes of status, problem codes."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import Scope

from service.api.errors import code_of

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
UNMATCHED = "unmatched"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class ApiMetrics:
    """Without a registry it counts for nobody, which is what tests that do not look want."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self._requests = Counter(
            "blastdoor_http_requests_total", "Requests answered.", ("method", "route", "status"), registry=registry
        )
        self._duration = Histogram(
            "blastdoor_http_request_duration_seconds",
            "From a request's head to the end of its answer; one that waits for a run counts its waiting.",
            ("method", "route"),
            buckets=_SECONDS,
            registry=registry,
        )
        self._in_flight = Gauge(
            "blastdoor_http_requests_in_flight", "Requests being answered now.", registry=registry
        )  # fmt: skip
        self._uploads = Gauge("blastdoor_uploads_in_progress", "Uploads being received now.", registry=registry)
        self._waiters = Gauge(
            "blastdoor_waiters", "Requests that wait now for a run to end or to say something.", registry=registry
        )
        self._streams = Gauge("blastdoor_event_streams", "Open event streams (SSE).", registry=registry)
        self._accepted = Counter("blastdoor_runs_accepted_total", "Runs queued.", registry=registry)
        self._replayed = Counter(
            "blastdoor_runs_replayed_total", "Submissions answered again by their Idempotency-Key.", registry=registry
        )
        self._refused = Counter(
            "blastdoor_runs_refused_total", "Submissions refused, by the problem's code.", ("code",), registry=registry
        )

    def watch(
        self, *, in_flight: Callable[[], float] | None = None, uploads: Callable[[], float] | None = None,
        waiters: Callable[[], float] | None = None,
    ) -> None:  # fmt: skip
        """What is asked at each scrape, and costs nothing between."""
        asked = ((self._in_flight, in_flight), (self._uploads, uploads), (self._waiters, waiters))
        for gauge, ask in asked:
            if ask is not None:
                gauge.set_function(ask)

    def streaming(self) -> AbstractContextManager[None]:
        """Around an event stream."""
        return self._streams.track_inprogress()

    def answered(self, scope: Scope, *, status: int | None, duration_s: float) -> None:
        """`status` None: the client was gone before there was one."""
        method = scope["method"] if scope["method"] in METHODS else "other"
        route = route_of(scope)
        kind = f"{status // 100}xx" if status is not None else "none"
        self._requests.labels(method, route, kind).inc()
        self._duration.labels(method, route).observe(duration_s)

    @contextmanager
    def submission(self) -> Iterator[Callable[..., None]]:
        """Around one: what is yielded is called when it is accepted; an error is counted as the refusal that it is."""

        def accepted(*, replayed: bool) -> None:
            (self._replayed if replayed else self._accepted).inc()

        try:
            yield accepted
        except BaseException as error:
            self._refused.labels(code_of(error)).inc()
            raise


def route_of(scope: Scope) -> str:
    """The template that the path matched, such as `/v1/runs/{run_id}`."""
    path = getattr(scope.get("route"), "path", None)
    return path if isinstance(path, str) else UNMATCHED
