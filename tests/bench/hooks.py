"""How long an event takes from its commit to a webhook's receiver, and what another tenant's dead endpoint costs.

The receiver is on this host, answers 204 at once, and notes when it has a whole request in hand; the commit is watched
as in `events`. Two tenants have runs all the time. In every second block the other tenant has an endpoint that takes
every connection and never answers; it must have been called, or its block says nothing. Blocks alternate, so that a
slow minute of the machine hits both; each one's endpoint is new, so that no breaker has heard of it.

`event_commit_to_webhook` is of the blocks without it, `dead_endpoint_delay_ratio` the 95th percentile with it to that.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.synchronize import Event
from pathlib import Path

from tests.bench.events import Observer, Times, commit_watch, observing
from tests.bench.figures import latencies_ms, of_latencies, percentile
from tests.bench.live import FORM, UPLOAD, Client, Document, Service, progress, running, submit

PAIRS = int(os.environ.get("BENCH_HOOK_PAIRS", "3"))
ROUNDS = int(os.environ.get("BENCH_HOOK_ROUNDS", "8"))
_SETTLE_S = 1.5
_LOOPBACK = "127.0.0.1"
_JSON = {"Content-Type": "application/json"}


def measure(runsc: Path) -> Document:
    with _receiver() as (port, receive), _DeadEndpoint() as dead:
        allowed = f"{_LOOPBACK}:{port},{_LOOPBACK}:{dead.port}"
        with running(webhook_allow=allowed) as service, observing(receive) as arrived:
            alone, beside = _blocks(service, port, dead)
    without, with_ = (latencies_ms(committed, arrived) for committed in (alone, beside))
    figures = of_latencies("event_commit_to_webhook", without)
    return figures | {
        "dead_endpoint_delay_ratio": percentile(with_, 95) / percentile(without, 95),
        "dead_endpoint": of_latencies("good", with_) | {"calls_it_held": dead.calls},
    }


def _blocks(service: Service, port: int, dead: "_DeadEndpoint") -> tuple[Times, Times]:
    """-> when the good endpoint's events were committed: of the blocks without and with the dead one."""
    alone, beside = Times(), Times()
    other = service.new_tenant("other")
    _add_webhook(service, service.ready["tenant_key"], port)
    _block(service, other, "warming up")
    time.sleep(_SETTLE_S)
    for number in range(PAIRS):
        what = f"webhooks {number + 1}/{PAIRS}"
        alone |= _watched_block(service, other, what)
        calls = dead.calls
        webhook = _add_webhook(service, other, dead.port)
        beside |= _watched_block(service, other, f"{what} beside a dead endpoint")
        if dead.calls == calls:
            raise SystemExit("the dead endpoint was never called: the block says nothing of it")
        with service.client(other) as client:
            client.ask("DELETE", f"/v1/webhooks/{webhook}")
        dead.let_go()
    return alone, beside


def _watched_block(service: Service, other: str, what: str) -> Times:
    with observing(commit_watch(service.state / "blastdoor.db", tenant=service.ready["tenant"])) as committed:
        _block(service, other, what)
        time.sleep(_SETTLE_S)  # each run's boundary is destroyed, and its last event on its way
    return committed


def _block(service: Service, other: str, what: str) -> None:
    with service.client() as client, service.client(other) as others:
        left: list[Document] = []
        for number in range(ROUNDS):
            progress(f"{what}: {number + 1}/{ROUNDS}")
            left.append(others.ask("POST", "/v1/runs", UPLOAD, **FORM))
            submit(client)
        for run in left:
            others.finished(run)


def _add_webhook(service: Service, key: str, port: int) -> str:
    with Client(service.address, key) as client:
        body = json.dumps({"url": f"http://{_LOOPBACK}:{port}/hook", "types": ["*"]}).encode()
        webhook: str = client.ask("POST", "/v1/webhooks", body, **_JSON)["id"]
    return webhook


@contextmanager
def _receiver() -> Iterator[tuple[int, Observer]]:
    """-> its port, and what notes the first arrival of each event by its `webhook-id`."""
    seen: Times = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            seen.setdefault(self.headers["webhook-id"], time.monotonic())
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    def receive(stop: Event) -> Times:
        server.timeout = 0.1
        while not stop.is_set():
            server.handle_request()
        return seen

    with ThreadingHTTPServer((_LOOPBACK, 0), Handler) as server:
        yield server.server_port, receive


class _DeadEndpoint:
    """Takes connections, reads nothing, says nothing. `calls`: how many there were."""

    def __init__(self) -> None:
        self.calls = 0
        self._ear = socket.create_server((_LOOPBACK, 0))
        self._held: list[socket.socket] = []
        self._thread = threading.Thread(target=self._listen, name="dead-endpoint", daemon=True)

    @property
    def port(self) -> int:
        port: int = self._ear.getsockname()[1]
        return port

    def __enter__(self) -> "_DeadEndpoint":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ear.shutdown(socket.SHUT_RDWR)
        self._ear.close()
        self._thread.join()
        self.let_go()

    def let_go(self) -> None:
        while self._held:
            self._held.pop().close()

    def _listen(self) -> None:
        with suppress(OSError):  # it is closed
            while True:
                self._held.append(self._ear.accept()[0])
                self.calls += 1
