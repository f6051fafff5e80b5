"""A TCP proxy on loopback whose connections hang when they are cut: nothing is closed, nothing arrives."""

import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tests.servers import LOOPBACK


class Proxy:
    """`with Proxy(port) as proxy`: who connects to `proxy.port` talks to `port`."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._listener = socket.create_server((LOOPBACK, 0))
        self.port = int(self._listener.getsockname()[1])
        self._flowing, self._stop = threading.Event(), threading.Event()
        self._flowing.set()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "Proxy":
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._flowing.set()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    @contextmanager
    def cut(self) -> Iterator[None]:
        """What was connected hangs, and is closed at the end; who connects meanwhile waits."""
        self._flowing.clear()
        try:
            yield
        finally:
            self._flowing.set()

    def _start(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args)  # type: ignore[arg-type]
        thread.start()
        self._threads.append(thread)

    def _accept(self) -> None:
        self._listener.settimeout(0.1)
        while not self._stop.is_set():
            with suppress(TimeoutError):
                near, _ = self._listener.accept()
                self._start(self._carry, near)

    def _carry(self, near: socket.socket) -> None:
        with near, suppress(OSError), socket.create_connection((LOOPBACK, self._to)) as far:
            while not self._stop.is_set():
                if not self._flowing.is_set():
                    self._flowing.wait()
                    return  # as after a cut that took long: the connection is of no use any more
                for one in select.select([near, far], [], [], 0.1)[0]:
                    if not self._flowing.is_set():
                        break
                    data = one.recv(65536)
                    if not data:
                        return
                    (far if one is near else near).sendall(data)
