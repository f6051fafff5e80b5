"""The API as it is served: uvicorn in a thread, a real database and Redis; only the worker is a row in the database."""

import io
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
import uvicorn
from cryptography.fernet import Fernet
from fastapi import FastAPI

from service import logs
from service.adapters.redis_bus import RedisHints
from service.adapters.sql.migrate import upgrade
from service.adapters.sql_store import SqlStore
from service.core.boundary import Capabilities
from service.core.canary import CANARY_TENANT
from service.core.ports.runs import Claim
from service.core.ports.tenants import WorkerRecord
from service.core.tenancy import KeyKind, Quota, Tenant
from service.main import create_app, server_config
from service.settings import Settings
from service.usecases.keys import mint
from tests.contract.store_steps import add_tenant, finished_run
from tests.factories import make_capabilities, make_result
from tests.servers import LOOPBACK, RedisServer

SCENARIO = "name: hello\nsteps: [{name: only, run: 'true'}]\n"
SECRETS_KEY = Fernet.generate_key().decode()
DATABASES = ["sqlite_database", "postgres_database"]


@dataclass
class Served:
    """A running API, its store, and clients by name."""

    url: str
    app: FastAPI
    store: SqlStore
    hints: RedisHints
    log: io.StringIO
    keys: dict[str, str] = field(default_factory=dict)
    _clients: dict[str, httpx.Client] = field(default_factory=dict)

    def client(self, who: str) -> httpx.Client:
        """`acme` and `globex` are tenants; `shop` a service; `operator`; `nobody` has no key."""
        if who not in self._clients:
            headers = {"Authorization": f"Bearer {self.keys[who]}"} if who != "nobody" else {}
            self._clients[who] = httpx.Client(base_url=self.url, headers=headers, timeout=30, trust_env=False)
        return self._clients[who]

    def close(self) -> None:
        for client in self._clients.values():
            client.close()

    def add_tenant(self, name: str, **more: Any) -> Tenant:
        tenant = self.store.create_tenant(Tenant(name=name, **more))
        self.keys[name] = mint(self.store, kind=KeyKind.TENANT, tenant=name).key
        return tenant

    def submit(self, who: str = "acme", *, scenario: str = SCENARIO, **more: Any) -> dict[str, Any]:
        answer = self.client(who).post("/v1/runs", files={"scenario": (None, scenario)}, **more)
        assert answer.status_code == 202, answer.text
        document: dict[str, Any] = answer.json()
        return document

    def claim(self) -> Claim:
        claim = self.store.claim(
            worker_id="wrk_1", site="here", boundaries=["gvisor"], runtimes=["default"], lease=timedelta(seconds=30)
        )
        assert claim is not None
        return claim

    def play(self, *, hint: bool = True) -> str:
        """As a worker would: claim the next run and finish it. -> its id."""
        claim = self.claim()
        self.store.mark_running(claim.run.id, claim.fence)
        self.store.mark_collecting(claim.run.id, claim.fence)
        self.store.finish(claim.run.id, claim.fence, make_result())
        self.store.record_destroyed(claim.run.id, claim.fence)
        if hint:
            self.hints.hint("run", claim.run.id)
        return claim.run.id

    def pass_canary(self) -> None:
        """A run of the platform's own went through the whole pipeline just now."""
        add_tenant(self.store, name=CANARY_TENANT)
        finished_run(self.store, tenant=CANARY_TENANT)

    def show_worker(self, *capabilities: Capabilities) -> None:
        rows = capabilities or (make_capabilities(),)
        self.store.record_worker(WorkerRecord(id="wrk_1", host="here", site="here", capabilities=rows))


@pytest.fixture
def settings(tmp_path: Path, redis_server: RedisServer, request: pytest.FixtureRequest) -> Settings:
    database = request.getfixturevalue(getattr(request, "param", "sqlite_database"))
    return make_settings(tmp_path, database, redis_server.url)


def make_settings(tmp_path: Path, database: str, redis_url: str, **more: Any) -> Settings:
    return Settings(
        environment="test",
        state_dir=tmp_path / "state",
        database_url=database,
        redis_url=redis_url,
        **{"secrets_key": SECRETS_KEY, **more},
    )


@pytest.fixture
def served(settings: Settings) -> Iterator[Served]:
    """With two tenants that know nothing of each other, a service with a tenant `corner`, an operator, and a worker."""
    yield from serve(settings)


@contextmanager
def _logging() -> Iterator[io.StringIO]:
    handlers, level = logging.root.handlers, logging.root.level
    stream = io.StringIO()
    logs.configure("info", program="api", stream=stream)
    try:
        yield stream
    finally:
        structlog.reset_defaults()
        logging.root.handlers, logging.root.level = handlers, level


def serve(settings: Settings) -> Iterator[Served]:
    with _logging() as log:
        yield from _serve(settings, log)


def _serve(settings: Settings, log: io.StringIO) -> Iterator[Served]:
    upgrade(settings.sql_url)
    app = create_app(settings)
    store = SqlStore(settings.sql_url)
    with socket.socket() as listening:
        listening.bind((LOOPBACK, 0))
        port = listening.getsockname()[1]
        server = uvicorn.Server(server_config(app, host=LOOPBACK, port=port))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            _until(lambda: server.started)
            served = Served(f"http://{LOOPBACK}:{port}", app, store, RedisHints(settings.broker_url), log)
            _populate(served)
            yield served
            served.close()
        finally:
            server.should_exit = True
            app.state.context.notifier.close()
            thread.join(10)
            store.close()
            app.state.context.deps.runs.close()
    assert not thread.is_alive()


def _populate(served: Served) -> None:
    store = served.store
    served.add_tenant("acme")
    served.add_tenant("globex")
    service = store.create_service("shop")
    served.add_tenant("corner", service_id=service.id, quota=Quota(queued=1000))
    served.keys["shop"] = mint(store, kind=KeyKind.SERVICE, service_id=service.id).key
    served.keys["operator"] = mint(store, kind=KeyKind.OPERATOR).key
    served.show_worker()


def _until(happens: Any, *, within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not happens():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
