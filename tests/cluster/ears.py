"""Listeners on a node of the lab, or beside an engine's containers, at the addresses that a guest would look for; they
note whoever gets through.

`python -m tests.cluster.ears` runs in the node's network namespace, where its addresses are made and nothing is sent to
any real network. A caller by TCP is answered with the token. Every line that it prints is one thing that was heard, but
for the first, which says that all listen.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.cluster.lab.components import ADDRESS
from tests.cluster.lab.outside import Lab

METADATA = ("169.254.169.254", "100.100.100.200", "169.254.170.2")
"""Of the clouds. The lab's pods have no IPv6, so that there is nothing to be shown of `fd00:ec2::254`."""
NEIGHBOUR = "10.77.0.2"
"""As another machine of the operator's would be, next to the node."""
ADDRESSES = (*METADATA, NEIGHBOUR, ADDRESS)
TCP_PORTS, UDP_PORT = (80, 6379, 8700), 53
"""Metadata and the web, Redis, our own API."""
TARGETS = (*((address, 80) for address in ADDRESSES), *((NEIGHBOUR, port) for port in TCP_PORTS[1:]), (ADDRESS, 8700))
NAME_SERVERS = tuple((address, UDP_PORT) for address in ADDRESSES)
LISTENING = "listening"


class Ears:
    """What was heard so far, each a line such as `tcp 10.77.0.2 80 from 10.244.0.17`."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self._lines: list[str] = []
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def begin(self) -> None:
        """When all of them listen."""
        assert self._process.stdout is not None
        assert self._process.stdout.readline().strip() == LISTENING
        self._thread.start()

    def close(self) -> None:
        assert self._process.stdout is not None
        self._thread.join()
        self._process.stdout.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(line.strip())

    def heard(self, *words: str) -> list[str]:
        """The lines with all of these words in them."""
        return [line for line in list(self._lines) if all(word in line for word in words)]


@contextmanager
def listening(lab: Lab, token: str, *, beside: str = "etcd", addresses: Sequence[str] = ADDRESSES) -> Iterator[Ears]:
    """`beside`: the component in whose network namespace; `addresses`: those that are not there are made."""
    node = lab.pid(beside)
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "nsenter", f"--target={node}", "--net", sys.executable, "-u", "-m",
         "tests.cluster.ears", token, *addresses],
        cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    ears = Ears(process)
    try:
        ears.begin()
        yield ears
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
        ears.close()


def _main(token: str, *addresses: str) -> None:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    answer = f"HTTP/1.0 200 OK\r\n\r\n{token}\n".encode()
    for address in addresses:
        if not _is_here(address):
            subprocess.run(["ip", "address", "replace", f"{address}/32", "dev", "lo"], check=True)

    def serve(ear: socket.socket, address: str, port: int) -> None:
        while True:
            connection, caller = ear.accept()
            with connection:
                print(f"tcp {address} {port} from {caller[0]}", flush=True)
                connection.sendall(answer)

    def hear(ear: socket.socket, address: str) -> None:
        while True:
            data, caller = ear.recvfrom(2048)
            print(f"udp {address} {UDP_PORT} from {caller[0]} {data[:200]!r}", flush=True)

    for address in addresses:
        for port in TCP_PORTS:
            ear = socket.create_server((address, port))
            threading.Thread(target=serve, args=(ear, address, port), daemon=True).start()
        ear = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        ear.bind((address, UDP_PORT))
        threading.Thread(target=hear, args=(ear, address), daemon=True).start()
    print(LISTENING, flush=True)
    signal.pause()


def _is_here(address: str) -> bool:
    try:
        socket.create_server((address, 0)).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    _main(*sys.argv[1:])
