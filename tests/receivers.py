"""Receivers of webhooks on loopback, good and bad: a real server, and a script of what it does with each request."""

import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.servers import LOOPBACK


@dataclass(frozen=True)
class Hit:
    """One request as it came; names of headers in lower case."""

    path: str
    headers: Mapping[str, str]
    body: bytes


Behaviour = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    server: "_Server"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", "0")))
        headers = {name.lower(): value for name, value in self.headers.items()}
        receiver = self.server.receiver
        with receiver.lock:
            receiver.hits.append(Hit(self.path, headers, body))
            number = len(receiver.hits) - 1
        receiver.script[min(number, len(receiver.script) - 1)](self)

    do_GET = do_POST  # noqa: N815 - the standard library's name

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: its requests are in `hits`."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    receiver: "Receiver"

    def handle_error(self, *_: Any) -> None:
        """A client that hung up is what some tests are about."""


@dataclass
class Receiver:
    """`script`: what is done with each request; the last one again and again."""

    port: int
    script: list[Behaviour]
    hits: list[Hit] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    stopping: threading.Event = field(default_factory=threading.Event)

    @property
    def pair(self) -> str:
        return f"{LOOPBACK}:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.pair}/hooks"


def answering(status: int, **headers: str) -> Behaviour:
    def answer(handler: Handler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("content-length", "0")
        handler.end_headers()

    return answer


def hanging(handler: Handler) -> None:
    handler.server.receiver.stopping.wait(60)


def dripping(handler: Handler) -> None:
    """A status line that never ends, a byte at a time."""
    handler.wfile.write(b"HTTP/1.1 200 O")
    while not handler.server.receiver.stopping.wait(0.02):
        handler.wfile.write(b"K")


@dataclass
class Flood:
    """A 200 with a gigabyte behind it; `sent` is how much of it was taken."""

    sent: int = 0

    def __call__(self, handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("content-length", str(2**30))
        handler.end_headers()
        chunk = bytes(2**16)
        while self.sent < 2**30:
            handler.wfile.write(chunk)
            self.sent += len(chunk)


@contextmanager
def receiving(*script: Behaviour, tls: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    server = _Server((LOOPBACK, 0), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    receiver = server.receiver = Receiver(server.server_address[1], list(script) or [answering(204)])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        receiver.stopping.set()
        server.shutdown()
        server.server_close()
        thread.join(10)


@contextmanager
def canary_on_a_webhook_port() -> Iterator[tuple[int, list[object]]]:
    """A listener on loopback at a port that webhooks may go to, 8443 or 443. -> the port, and who has connected."""
    hits: list[object] = []

    class Count(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            hits.append(self.client_address)

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = True
        daemon_threads = True

    for port in (8443, 443):
        try:
            server = Server((LOOPBACK, port), Count)
        except OSError:
            continue
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield port, hits
        finally:
            server.shutdown()
            server.server_close()
        return
    raise AssertionError("ports 8443 and 443 of loopback are both taken")


def eventually(true: Callable[[], bool], *, within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.01)
