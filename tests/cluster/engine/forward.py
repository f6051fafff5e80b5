"""The engine's door: whatever port is published inside its network namespace is open on this machine's loopback too.

kind picks a port that is free as its own process sees it, out here, and has dockerd listen on it in there. So each
port on which something listens in there is listened on out here, and each connection is passed on. A socket belongs
to the namespace in which it was made, whoever uses it later: this process steps into the other one to make them.
"""

import asyncio
import ctypes
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cluster.lab.gate import copy

LOOK_EVERY_S = 0.25  # each look is a walk through the table of all connections of this machine
LOOPBACK = "127.0.0.1"
LISTENING = "0A"
_LOOPBACK_OR_ANY = ("0100007F", "00000000")
CLONE_NEWNET = 0x40000000


class Spaces:
    """The two network namespaces, this process being in the outer one."""

    def __init__(self, outer: int) -> None:
        self.inner = os.open("/proc/self/ns/net", os.O_RDONLY)
        self.outer = outer
        self.table = Path("/proc/self/net/tcp").open()  # noqa: SIM115  # stays that of the inner one, read again and again
        self.table.read()
        _enter(outer)

    @contextmanager
    def inside(self) -> Iterator[None]:
        _enter(self.inner)
        try:
            yield
        finally:
            _enter(self.outer)

    def listening(self) -> set[int]:
        """The ports on which something in there can be reached by way of its loopback."""
        self.table.seek(0)
        rows = (line.split() for line in self.table.readlines()[1:])
        local = (row[1].split(":") for row in rows if row[3] == LISTENING)
        return {int(port, 16) for address, port in local if address in _LOOPBACK_OR_ANY}


def _enter(namespace: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


class Door:
    def __init__(self, spaces: Spaces) -> None:
        self.spaces = spaces
        self.open: dict[int, asyncio.Server] = {}
        self.refused: set[int] = set()

    async def watch(self) -> None:
        while True:
            wanted = self.spaces.listening()
            for port in self.open.keys() - wanted:
                self.open.pop(port).close()
                print(f"closed {port}", flush=True)
            for port in wanted - self.open.keys():
                await self._listen(port)
            self.refused &= wanted
            await asyncio.sleep(LOOK_EVERY_S)

    async def _listen(self, port: int) -> None:
        try:
            self.open[port] = await asyncio.start_server(
                lambda reader, writer: self.pass_on(port, reader, writer), LOOPBACK, port
            )
        except OSError as why:  # somebody else's out here: tried again, for as long as it is wanted
            if port not in self.refused:
                print(f"cannot open {port}: {why}", flush=True)
            self.refused.add(port)
        else:
            print(f"open {port}", flush=True)

    async def pass_on(self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with self.spaces.inside():
            inner = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        inner.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(inner, (LOOPBACK, port))
        except OSError:
            inner.close()
            writer.transport.abort()
            return
        inner_reader, inner_writer = await asyncio.open_connection(sock=inner)
        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))
        inner_writer.close()
        writer.close()


if __name__ == "__main__":
    asyncio.run(Door(Spaces(int(sys.argv[1]))).watch())
