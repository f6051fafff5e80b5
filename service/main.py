"""The API's composition root: settings in, a running server out. Importing it does nothing.

`python -m service.main` brings the schema to this version's and serves; `python -m service.main migrate` does the first
only, and gives the processes' own PostgreSQL roles their rights. Several processes may start at once. `operator-key`
prints a new operator's key and revokes the one that it made before.
"""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import FrameType
from typing import NoReturn

import structlog
import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from service import logs, metrics
from service.adapters import failpoints
from service.adapters.blobs import FileBlobs
from service.adapters.celery_queue import CeleryDoorbell
from service.adapters.http_hooks import resolve
from service.adapters.redis_bus import RedisBus, RedisHints
from service.adapters.sealing import box_of
from service.adapters.sql.migrate import upgrade
from service.adapters.sql.roles import give_rights
from service.adapters.sql_store import SqlStore
from service.api.app import build
from service.api.context import Bounds, Deps
from service.api.metrics import ApiMetrics
from service.core.canary import ailing
from service.core.errors import BlastdoorError, Unavailable
from service.core.tenancy import KeyKind
from service.core.webhooks.urls import read_pairs
from service.intake.policy import read_policy
from service.settings import Settings, unknown_names
from service.usecases.keys import mint

GRACE_S = 4
"""Of a polite end: what is still being answered by then is cut off."""
_KEEP_ALIVE_S = 20
_BACKLOG = 1024
_MINTED_BY = "cli"
_SWITCH_S = 0.0005
"""How long a thread may keep the interpreter from the event loop; Python's own 5 ms would slow every answer."""

log = structlog.get_logger()


def create_app(settings: Settings, *, registry: CollectorRegistry | None = None) -> FastAPI:
    """The application on this machine's adapters. The schema must be there (`upgrade`); Redis may be away."""
    return build(deps_of(settings, registry=registry))


def deps_of(settings: Settings, *, registry: CollectorRegistry | None = None) -> Deps:
    store = SqlStore(settings.sql_url)
    worker_fresh = timedelta(seconds=settings.worker_fresh_s)

    def worker() -> None:
        if not store.live_workers(fresh=worker_fresh):
            raise Unavailable("no worker has been heard of lately")

    def canary() -> None:
        every, within = timedelta(seconds=settings.canary_s), timedelta(seconds=settings.canary_within_s)
        if why := ailing(store.canary_view(fresh=worker_fresh), every=every, within=within):
            raise Unavailable(why)

    return Deps(
        runs=store,
        tenants=store,
        workers=store,
        blobs=FileBlobs(settings.state_dir),
        hints=RedisHints(settings.broker_url),
        doorbell=CeleryDoorbell(settings.broker_url),
        webhooks=store,
        custody=store,
        leftovers=store,
        retention=store,
        resolver=resolve,
        secret_box=box_of(settings.secrets_key.get_secret_value()),
        webhook_allow=read_pairs(settings.webhook_allow),
        policy=read_policy(settings.policy_file),
        checks={
            "database": store.now,
            "redis": RedisBus(settings.broker_url).ping,
            "worker": worker,
            "canary": canary,
        },
        bounds=Bounds(
            upload_max_bytes=settings.upload_max_bytes,
            upload_deadline_s=settings.upload_deadline_s,
            uploads_at_once=settings.uploads_at_once,
            worker_fresh=worker_fresh,
            site_silent=timedelta(seconds=settings.site_silent_s),
        ),
        version=metrics.installed_version(),
        metrics=ApiMetrics(registry),
    )


def serve(settings: Settings) -> None:
    """Until SIGTERM or SIGINT. Requests that wait for a run are answered with the run as it stands then."""
    registry = metrics.new_registry("api")
    app = create_app(settings, registry=registry)
    metrics.serve_if_asked(registry, settings.metrics_address)
    config = server_config(app, host=settings.host, port=settings.port)
    sys.setswitchinterval(_SWITCH_S)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)  # uvicorn raises the signal again when it has ended politely
    _Server(config, on_exit=app.state.context.notifier.close).run()


def server_config(app: FastAPI, *, host: str, port: int) -> uvicorn.Config:
    """How it is served wherever it is served. No access log of uvicorn's: it would write queries."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        loop="uvloop" if sys.platform == "linux" else "asyncio",
        http="httptools",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
    )


class _Server(uvicorn.Server):
    """Tells the application at once that the end has come; uvicorn itself would first wait for those who wait."""

    def __init__(self, config: uvicorn.Config, *, on_exit: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_exit = on_exit

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._on_exit()
        super().handle_exit(sig, frame)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m service.main", description="The HTTP API of Blastdoor.")
    parser.add_argument("command", nargs="?", choices=("serve", "migrate", "operator-key"), default="serve")
    asked = parser.parse_args(argv)
    settings = Settings()
    logs.configure(settings.log_level, program="api")
    if asked.command == "operator-key":
        return _operator_key(settings)
    logs.own_the_streams()
    logs.say_unknown(unknown_names())
    failpoints.arm(settings.failpoints, environment=settings.environment)
    try:
        upgrade(settings.sql_url)
        if asked.command == "serve":
            serve(settings)
        elif settings.database_roles:
            give_rights(settings.sql_url, settings.database_roles)
    except (BlastdoorError, OSError) as error:
        log.error("cannot_serve", error=str(error))
        return 1
    return 0


def _operator_key(settings: Settings) -> int:
    store = SqlStore(settings.sql_url)
    try:
        store.revoke_minted_by(_MINTED_BY)
        sys.stdout.write(mint(store, kind=KeyKind.OPERATOR, minted_by=_MINTED_BY).key + "\n")
    except BlastdoorError as error:
        log.error("no_key", error=str(error))
        return 1
    finally:
        store.close()
    return 0


def _end(*_: object) -> NoReturn:
    raise SystemExit(0)


if __name__ == "__main__":
    sys.exit(main())
