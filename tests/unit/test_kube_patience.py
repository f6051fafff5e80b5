"""An API server that is away is waited for once, and not by each question anew."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from workers.kube import Cluster, Unreachable

PATIENCE_S = 1.0


class _Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, format: str, *args: object) -> None:
        """Nobody reads it."""


@pytest.fixture
def port() -> int:
    """On which nothing listens yet."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture
def cluster(tmp_path: Path, port: int) -> Iterator[Cluster]:
    path = tmp_path / "kubeconfig"
    path.touch(mode=0o600)
    server = {"name": "one", "cluster": {"server": f"http://127.0.0.1:{port}"}}
    context = {"name": "one", "context": {"cluster": "one", "user": "one"}}
    said = {"clusters": [server], "contexts": [context], "users": [{"name": "one", "user": {"token": "x"}}]}
    path.write_text(json.dumps({"apiVersion": "v1", "kind": "Config", "current-context": "one"} | said))
    made = Cluster.from_kubeconfig(path, patience_s=PATIENCE_S)
    yield made
    made.close()


@contextmanager
def serving(port: int) -> Iterator[None]:
    with HTTPServer(("127.0.0.1", port), _Answers) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def waited(ask: Callable[[], object]) -> float:
    """Seconds until it gave up."""
    began = time.monotonic()
    with pytest.raises(Unreachable):
        ask()
    return time.monotonic() - began


def command(cluster: Cluster) -> None:
    cluster.exec_("one", "pod", "main", ["true"], on_output=lambda *_: None, deadline=time.monotonic() + 60)


def test_what_is_asked_after_the_first_that_waited_is_not_waited_for_again(cluster: Cluster) -> None:
    assert waited(lambda: cluster.get("Pod", "pod", "one")) > PATIENCE_S / 2
    assert waited(lambda: cluster.list("Node")) < PATIENCE_S / 2
    assert waited(lambda: command(cluster)) < PATIENCE_S / 2


def test_once_it_answered_it_is_waited_for_again(cluster: Cluster, port: int) -> None:
    assert waited(lambda: command(cluster)) > PATIENCE_S / 2
    with serving(port):
        assert cluster.get("Pod", "pod", "one") == {}
    assert waited(lambda: cluster.get("Pod", "pod", "one")) > PATIENCE_S / 2


def test_that_it_was_away_long_ago_is_forgotten(cluster: Cluster) -> None:
    waited(lambda: cluster.get("Pod", "pod", "one"))
    time.sleep(PATIENCE_S * 1.1)
    assert waited(lambda: cluster.get("Pod", "pod", "one")) > PATIENCE_S / 2
