"""The webhooks' process: `python -m service.relay.webhooks`. Any number may run; SIGTERM and SIGINT stop it within 2 s.

Without BLASTDOOR_SECRETS_KEY it has nothing to sign with, and ends at once with status 1.
"""

import asyncio
import logging
import os
import signal
import sys
import threading
from datetime import timedelta
from typing import NoReturn

import structlog

from service import logs, metrics
from service.adapters import failpoints
from service.adapters.http_hooks import HttpHooks
from service.adapters.redis_bus import RedisHints
from service.adapters.sealing import box_of
from service.adapters.sql_store import SqlStore
from service.core.errors import BlastdoorError
from service.core.webhooks.urls import read_pairs
from service.relay.metrics import WebhookMetrics
from service.relay.webhooks.dispatcher import Dispatcher
from service.relay.webhooks.loop import run
from service.settings import Settings, unknown_names

ENDS_WITHIN_S = 1.8
_LOG = structlog.get_logger()


async def serve(settings: Settings) -> None:
    """Raises BlastdoorError when it cannot begin."""
    box = box_of(settings.secrets_key.get_secret_value())
    if box is None:
        raise BlastdoorError("set BLASTDOOR_SECRETS_KEY: webhooks' secrets are kept encrypted with it")
    store = SqlStore(settings.sql_url)
    registry = metrics.new_registry("webhooks")
    counted = WebhookMetrics(registry)
    counted.watch(pending=lambda: store.delivery_counts()[0], dead=lambda: store.delivery_counts()[1])
    metrics.serve_if_asked(registry, settings.metrics_address)
    hooks = HttpHooks(
        excepted=read_pairs(settings.webhook_allow),
        ca_file=settings.webhook_ca_file,
        user_agent=f"Blastdoor-Webhooks/{metrics.installed_version()}",
    )
    woken, stopped = asyncio.Event(), asyncio.Event()

    def stop() -> None:
        stopped.set()
        woken.set()
        # A database that does not answer, or a thread that resolves a name, must not keep us: leases see to the rest.
        timer = threading.Timer(ENDS_WITHIN_S, lambda: _exit(0))
        timer.daemon = True
        timer.start()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    lease = timedelta(seconds=settings.webhook_lease_s)
    dispatcher = Dispatcher(store, hooks, box, lease=lease, metrics=counted, ended=woken.set)
    _LOG.info("webhooks_started")
    await run(dispatcher, RedisHints(settings.broker_url), woken=woken, stopping=stopped.is_set)
    _LOG.info("webhooks_stopped")
    hooks.close()
    store.close()


def main() -> NoReturn:
    settings = Settings()
    logs.configure(settings.log_level, program="webhooks")
    logs.own_the_streams()
    logs.say_unknown(unknown_names())
    failpoints.arm(settings.failpoints, environment=settings.environment)
    try:
        asyncio.run(serve(settings))
    except BlastdoorError as error:
        _LOG.error("cannot_serve", error=str(error))
        _exit(1)
    _exit(0)


def _exit(status: int) -> NoReturn:
    """Without waiting for threads that resolve names, as Python would."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
