"""The doorbell, and the one configuration of Celery that the API and the workers share.

Celery is a doorbell here, not a record. A message says which queue it is in and nothing else, so a lost one costs time
(the reconciler rings again), a doubled one costs a look, and a forged one can do no more than a real one.
`celery_app` is that configuration, each setting with its reason; where 5.7 reads no such setting, a comment says so.
"""

import os
import re
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from celery import Celery
from celery.exceptions import OperationalError
from kombu.exceptions import KombuError
from kombu.messaging import Producer
from redis import RedisError

from service.core.controls import PLATFORM_CEILINGS
from service.core.errors import Unavailable

RING_TASK = "workers.ring"
AROUND_WALL = timedelta(seconds=120)
"""Provisioning (30 s), an `always` step after the wall time (10 s), the kill ladder, collecting and the reap."""
LONGEST_RING = PLATFORM_CEILINGS.wall + AROUND_WALL
BELL_EXPIRES = timedelta(hours=1)
"""As long as a run may wait by default. Judged by the worker's clock: far above any skew between hosts."""

WORKER_OPTIONS = ("--without-gossip", "--without-mingle", "--without-heartbeat")
"""Of `celery worker`: they have no setting. Workers learn nothing from each other through the broker."""
WORKER_ENVIRONMENT = {"REMAP_SIGTERM": "SIGQUIT"}
"""Must be there before celery is imported: SIGTERM then starts the soft shutdown, and what is not done is requeued."""

_BOUNDARY = re.compile(r"[a-z0-9]+(([/+.]|-+)[a-z0-9]+)*", re.ASCII)
_TIMEOUT_S = 0.5
_RETRY_WITHIN_S = 0.3
_AWAY = (OperationalError, RedisError, KombuError, OSError)


def queue_name(boundary: str) -> str:
    """`gvisor` -> `boundary.gvisor`, `namespace/runc+affinity/blue` -> `boundary.namespace.runc+affinity.blue`."""
    if not _BOUNDARY.fullmatch(boundary):
        raise ValueError(f"{boundary!r} is not a boundary")
    return "boundary." + boundary.replace("/", ".")


def celery_app(broker_url: str, *, longest_ring: timedelta = LONGEST_RING) -> Celery:
    """An app with no tasks, Celery's own included: whoever starts a worker registers RING_TASK on it.

    `longest_ring`: how long one ring may take to be served, from claim to destroyed; Celery's limits stand above it, as
    they must never be what stops a boundary. Raises ValueError when Celery's environment variables say otherwise than
    we do.
    """
    app = Celery("blastdoor", set_as_current=False, fixups=[])
    visibility_timeout = _seconds(longest_ring) + 120
    app.conf.update(
        broker_url=broker_url,
        broker_transport="service.adapters.celery_transport:Transport",
        # Nothing but JSON is read or written.
        accept_content=["json"],
        result_accept_content=["json"],
        task_serializer="json",
        result_serializer="json",
        event_serializer="json",
        # State is in SQL.
        task_ignore_result=True,
        result_backend=None,
        # A bell is acknowledged when it was answered, however that went; attempts are counted in SQL.
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_acks_on_failure=True,
        task_acks_on_timeout=True,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        broker_transport_options={
            "visibility_timeout": visibility_timeout,
            "unacked_restore_interval": 10,
            "unacked_restore_throttle": 1,
            "socket_keepalive": True,
            "health_check_interval": 25,
            # A peer that vanished without a word: without these an acknowledgement waits for ever.
            "socket_timeout": 30,
            "socket_connect_timeout": 5,
        },
        # Celery's manual wants the timeout in all three places; 5.7 with no result backend reads only the first.
        result_backend_transport_options={"visibility_timeout": visibility_timeout},
        visibility_timeout=visibility_timeout,
        task_soft_time_limit=_seconds(longest_ring) + 30,
        task_time_limit=_seconds(longest_ring) + 60,
        worker_max_tasks_per_child=50,
        worker_max_memory_per_child=300_000,  # KiB
        # Not as the table has it: a run must outlive Redis (docs/adr/0004), and a second copy of a bell is harmless.
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_soft_shutdown_timeout=30.0,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_channel_error_retry=True,
        # Who can write to the broker must not command workers, nor learn from them.
        worker_consumer="service.adapters.celery_bell:BellConsumer",
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        task_send_sent_event=False,
        # A worker that is told no queue listens where nobody rings.
        task_default_queue="boundary.none",
        # Logs are service.logs'.
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
    )
    if app.conf.broker_url != broker_url or app.conf.result_backend:
        raise ValueError("unset CELERY_BROKER_URL and CELERY_RESULT_BACKEND: they would overrule BLASTDOOR_REDIS_URL")
    app.finalize()
    for name in list(app.tasks):
        app.tasks.unregister(name)
    return app


def _seconds(duration: timedelta) -> int:
    return int(duration.total_seconds())


class CeleryDoorbell:
    """Implements ports.Doorbell. Each thread keeps a producer of its own, so that none waits for another; a forked
    child makes new ones."""

    def __init__(self, broker_url: str, *, expires: timedelta = BELL_EXPIRES) -> None:
        self._app = celery_app(broker_url)
        self._app.amqp.router  # noqa: B018 - built here, and not while the first caller waits
        self._expires_s = _seconds(expires)
        self._mine = threading.local()

    def ring(self, boundary: str) -> None:
        """One or two milliseconds. Raises Unavailable within two seconds when Redis is away."""
        queue = queue_name(boundary)
        try:
            _twice(lambda: self._send(queue))
        except _AWAY as error:
            raise Unavailable(f"the queue does not answer: {type(error).__name__}: {error}") from error

    def _send(self, queue: str) -> None:
        self._app.send_task(
            RING_TASK,
            queue=queue,
            producer=self._producer(),
            declare=[],  # the queue is a Redis list: there is nothing to declare
            expires=self._expires_s,
            ignore_result=True,
            add_to_parent=False,
            retry=False,
        )

    def _producer(self) -> Producer:
        kept: tuple[int, Producer] | None = getattr(self._mine, "kept", None)
        if kept is None or kept[0] != os.getpid():
            options = {"socket_timeout": _TIMEOUT_S, "socket_connect_timeout": _TIMEOUT_S, "max_retries": 0}
            connection = self._app.connection_for_write(transport_options=options)
            kept = self._mine.kept = (os.getpid(), Producer(connection))  # type: ignore[no-untyped-call]
        return kept[1]


def _twice(send: Callable[[], None]) -> None:
    """A connection that Redis closed while it was idle fails at once, and a second one is tried. A bell too many costs
    nothing."""
    began = time.monotonic()
    try:
        send()
    except _AWAY:
        if time.monotonic() - began > _RETRY_WITHIN_S:
            raise
        send()
