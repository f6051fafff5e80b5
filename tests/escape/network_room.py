"""A network namespace of the test's own, and the real driver in it. Run as `python -m tests.escape.network_room`.

On the room's loopback are the addresses that a guest would look for: the metadata service of clouds, by IPv4 and IPv6,
a gateway, the node's own address and 127.0.0.1. Something listens on each and notes who calls; what pretends to be
metadata answers with a token. The room has no way out, so nothing here sends a packet to any real network.

stdin: a JSON object {"runtime_dir", "store", "token", "weaken": [...]}; stdout: one, of what was heard. `weaken` may
name `network` (`--network=host` instead of none) and `namespace` (the sandbox gets no network namespace of its own).
"""

import ctypes
import errno
import fcntl
import json
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from service.core.boundary import Ended
from tests.sandboxes import Never, gvisor_boundary, make_ref, make_spec, make_step
from workers.boundaries.gvisor import driver

METADATA = ("169.254.169.254", "fd00:ec2::254")
NODE, GATEWAY = "10.77.0.2", "10.77.0.1"
LOOPBACK = ("127.0.0.1", "::1")
TCP_PORTS = (80, 6379, 8700, 10250)
UDP_PORT = 53
ADDRESSES = (*METADATA, NODE, GATEWAY, *LOOPBACK)
TARGETS = frozenset({f"{address} tcp {port}" for address in ADDRESSES for port in TCP_PORTS}) | {
    f"{address} udp {UDP_PORT}" for address in ADDRESSES
}
"""Everything that listens. In the weakened room all of it is reached, else a listener of ours would prove nothing."""

_CLONE_NEWNET = 0x40000000
_SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK = 0x8914, 0x8916, 0x891C
_IFF_UP, _IFF_RUNNING = 0x1, 0x40

KNOCK = """
import socket, sys
def families(host): return socket.AF_INET6 if ":" in host else socket.AF_INET
for line in sys.argv[1:]:
    host, kind, port = line.split()
    try:
        with socket.socket(families(host), socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM) as s:
            s.settimeout(2)
            s.connect((host, int(port)))
            s.send(b"GET / HTTP/1.0\\r\\n\\r\\n")
            print(line, s.recv(200))
    except OSError as error:
        print(line, error)
"""


def enter_room() -> None:
    """This process leaves the host's network for an empty one, and gives its loopback the addresses."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP | _IFF_RUNNING))
        for n, address in enumerate((METADATA[0], NODE, GATEWAY)):
            for request, value in ((_SIOCSIFADDR, address), (_SIOCSIFNETMASK, "255.255.255.255")):
                fcntl.ioctl(control, request, _ifreq(f"lo:{n}", value))
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as control:
        wanted = struct.pack("16sIi", socket.inet_pton(socket.AF_INET6, METADATA[1]), 128, socket.if_nametoindex("lo"))
        fcntl.ioctl(control, _SIOCSIFADDR, wanted)


def _ifreq(name: str, address: str) -> bytes:
    return struct.pack("16sHH4s8x", name.encode(), socket.AF_INET, 0, socket.inet_aton(address))


def _bind(ear: socket.socket, address: tuple[str, int]) -> None:
    """A new IPv6 address is tentative until the kernel's work queue has come to it."""
    deadline = time.monotonic() + 10
    while True:
        try:
            ear.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


class Ears:
    """Listens on everything in TARGETS, and notes what was called."""

    def __init__(self, token: str) -> None:
        self.heard: set[str] = set()
        self._answer = f"HTTP/1.0 200 OK\r\n\r\n{token}".encode()

    def open(self, stack: ExitStack) -> None:
        for target in TARGETS:
            address, kind, port = target.split()
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            ear = stack.enter_context(socket.socket(family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM))
            _bind(ear, (address, int(port)))
            if kind == "tcp":
                ear.listen()
            threading.Thread(target=self._listen, args=(ear, target, kind), daemon=True).start()

    def _listen(self, ear: socket.socket, target: str, kind: str) -> None:
        while True:
            if kind == "udp":
                _, caller = ear.recvfrom(2048)
                self.heard.add(target)
                ear.sendto(self._answer, caller)
                continue
            connection, _ = ear.accept()
            with connection:
                self.heard.add(target)
                connection.settimeout(5)
                connection.recv(2048)
                connection.sendall(self._answer)


@contextmanager
def weakened(parts: list[str]) -> Iterator[None]:
    """The driver with exactly these defences taken out. It exists here, and in no registry."""
    argv, config = driver.render_argv, driver.render_config

    def weak_argv(*arguments: Any, **more: Any) -> list[str]:
        return ["--network=host" if word == "--network=none" else word for word in argv(*arguments, **more)]

    def weak_config(*arguments: Any, **more: Any) -> dict[str, Any]:
        rendered = config(*arguments, **more)
        namespaces = [row for row in rendered["linux"]["namespaces"] if row["type"] != "network"]
        assert len(namespaces) == len(rendered["linux"]["namespaces"]) - 1
        rendered["linux"]["namespaces"] = namespaces
        return rendered

    if "network" in parts:
        assert "--network=none" in argv(Path("runsc"), directfs=True)
        driver.render_argv = weak_argv
    if "namespace" in parts:
        driver.render_config = weak_config
    try:
        yield
    finally:
        driver.render_argv, driver.render_config = argv, config


def main() -> None:
    asked = json.load(sys.stdin)
    outside = os.readlink("/proc/self/ns/net")
    enter_room()
    assert os.readlink("/proc/self/ns/net") != outside
    ears = Ears(asked["token"])
    with ExitStack() as stack:
        ears.open(stack)
        stack.enter_context(weakened(asked["weaken"]))
        boundary = stack.enter_context(gvisor_boundary(Path(asked["runtime_dir"]), store=Path(asked["store"])))
        ref = make_ref(installation=boundary.host.installation)
        with boundary.open(make_spec(), ref, cancelled=Never()) as sandbox:
            played = sandbox.execute(make_step("python3", "-S", "-c", KNOCK, *sorted(TARGETS), timeout_s=60))
            network = sandbox.evidence().network
        boundary.destroy(ref)
        said = played.stdout.data.decode("utf-8", "replace")
        assert (played.ended, played.exit_code) == (Ended.EXITED, 0), played
        assert len(said.splitlines()) >= len(TARGETS), said
    answer = {"heard": sorted(ears.heard), "token_seen": asked["token"] in said, "network": network}
    sys.stdout.write(json.dumps(answer))
    sys.stdout.flush()
    os._exit(0)  # the ears' threads still listen on closed sockets


if __name__ == "__main__":
    main()
