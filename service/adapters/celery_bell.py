"""The only message that a worker takes from a queue: a bell, and nothing inside it.

Loaded in workers alone, by name (the setting `worker_consumer`). Celery lets a message choose its task, arguments,
callbacks, time limits and start time, and one with missing parts takes the consumer down and is then delivered again,
to the next worker. Here whatever is not exactly a bell is dropped before any of Celery looks inside.
"""

import re
from collections.abc import Callable
from typing import Any

import structlog
from celery.utils.log import get_logger
from celery.worker.consumer import Consumer

from service.adapters.celery_queue import RING_TASK

_BODY = '[[], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]'
_ID = re.compile(r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$", re.ASCII)
_INSTANT = re.compile(r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(\.\d{1,6})?(\+00:00)?$", re.ASCII)
_ABSENT = ("compression", "eta", "group", "shadow", "retries", "stamps", "stamped_headers", "replaced_task_nesting")
_LOG = structlog.get_logger()


class BellConsumer(Consumer):  # type: ignore[misc]  # Celery has no types
    def create_task_handler(self, **options: Any) -> Callable[[Any], None]:
        handle = super().create_task_handler(**options)

        def take(message: Any) -> None:
            if is_bell(message):
                handle(message)
                return
            _LOG.warning("message_dropped", why="it is not a bell", content_type=str(message.content_type)[:100])
            message.reject_log_error(get_logger(__name__), self.connection_errors)

        return take


def is_bell(message: Any) -> bool:
    """`message` is kombu's. Its parts are whatever JSON somebody put on the queue."""
    headers, body = message.headers, message.body
    return (
        isinstance(headers, dict)
        and isinstance(message.properties, dict)
        and isinstance(message.delivery_info, dict)
        and (message.content_type, message.content_encoding) == ("application/json", "utf-8")
        and body in (_BODY, _BODY.encode())
        and headers.get("task") == RING_TASK
        and _is_like(headers.get("id"), _ID)
        and _is_like(headers.get("expires"), _INSTANT)
        and headers.get("timelimit") == [None, None]
        and headers.get("ignore_result") is True
        and not any(headers.get(name) for name in _ABSENT)
    )


def _is_like(value: object, pattern: re.Pattern[str]) -> bool:
    return isinstance(value, str) and pattern.match(value) is not None
