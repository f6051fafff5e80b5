"""A command's connection, as far as it takes no cluster."""

import socket
import time
from typing import Any, cast

import websocket
from websocket import ABNF

from workers.kube.exec_ import pump

AS_THE_KUBELET_SENDS = 32 * 1024
MIB = 2**20


class Flooded:
    """There is always one more frame of the command's output."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def recv_frame(self) -> ABNF:
        return ABNF.create_frame(b"\1" + b"A" * AS_THE_KUBELET_SENDS, ABNF.OPCODE_BINARY)


def test_a_flood_is_left_soon_after_what_it_may_print() -> None:
    near, far = socket.socketpair()
    heard: list[int] = []
    with near, far:
        ended = pump(
            cast("websocket.WebSocket", cast("Any", Flooded(near))), stdin=(),
            on_output=lambda _, data: heard.append(len(data)), deadline=time.monotonic() + 30,
            stop=lambda: sum(heard) > MIB,
        )  # fmt: skip
    assert ended.why == "stopped"
    assert MIB < sum(heard) <= MIB + MIB // 2
