"""A command in a container, over one websocket: its streams, and its end as the engine reports it.

The exit status comes on a channel of its own, which the kubelet writes; nothing that the command prints can set it. A
message is a channel's number in one byte, then data. One thread, one loop, nothing in it blocks: a command that prints
while it does not read cannot make us wait for each other.

Stdin stays open when all of it was sent: its end tells the command that we have gone. What a command leaves unread of
it, some 100 KiB and more, makes Kubernetes hold its status back: a command reads all that it is sent.
"""

import json
import select
import ssl
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import websocket
from websocket import ABNF

from service.core.boundary import Listener

PROTOCOLS = ("v5.channel.k8s.io", "v4.channel.k8s.io")
_STDIN, _STDOUT, _STDERR, _STATUS = 0, 1, 2, 3
_NAMES: dict[int, Literal["stdout", "stderr"]] = {_STDOUT: "stdout", _STDERR: "stderr"}
_CHUNK = 32 * 1024
_ASK_EVERY_S = 0.05
_FRAMES_A_TURN = 16
"""Between two times that `stop` is asked: half a mebibyte of output, as the kubelet sends it."""
_NOT_NOW = (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError)


@dataclass(frozen=True)
class ExecEnded:
    """`exited`: with `exit_code`. `failed`: the engine could not run it, `message` says why. `deadline`, `stopped`: we
    left; the command may still run. `lost`: the connection ended and nobody said how the command did."""

    why: Literal["exited", "failed", "deadline", "stopped", "lost"]
    exit_code: int | None = None
    message: str = ""


def pump(
    connection: websocket.WebSocket,
    *,
    stdin: Iterable[bytes],
    on_output: Listener,
    deadline: float,
    stop: Callable[[], bool],
) -> ExecEnded:
    """Plays one command to its end on a connection that was just made; the caller closes it.

    `deadline` is of `time.monotonic()`. `stop` is asked every 50 ms at the latest.
    """
    channel = _Channel(connection, stdin, on_output)
    while True:
        if stop():
            return ExecEnded("stopped")
        left = deadline - time.monotonic()
        if left <= 0:
            return ExecEnded("deadline")
        try:
            writing = channel.send()
            waiting = channel.receive()
        except (websocket.WebSocketException, OSError) as error:
            return channel.ended(str(error))
        if channel.over:
            return channel.ended("the connection ended without a status")
        if waiting:
            _wait(cast("Any", connection.sock), writing=writing, seconds=min(left, _ASK_EVERY_S))


def _wait(sock: Any, *, writing: bool, seconds: float) -> None:
    poll = select.poll()
    poll.register(sock, select.POLLIN | (select.POLLOUT if writing else 0))
    poll.poll(seconds * 1000)


class _Channel:
    """Both directions of one connection."""

    def __init__(self, connection: websocket.WebSocket, stdin: Iterable[bytes], on_output: Listener) -> None:
        self._connection = connection
        self._sock = cast("Any", connection.sock)  # there is one, once it is connected
        self._sock.setblocking(False)
        self._stdin = _messages(stdin)
        self._unsent = bytearray()
        self._on_output = on_output
        self._current = _STATUS
        self._status = bytearray()
        self.over = False

    def send(self) -> bool:
        """As much as the connection takes now -> whether there is more."""
        while True:
            while len(self._unsent) < _CHUNK and (message := next(self._stdin, None)) is not None:
                self._unsent += _frame(message, ABNF.OPCODE_BINARY)
            if not self._unsent:
                return False
            try:
                # A TLS write that is tried again must begin with what it began with: this only ever grows at its end.
                sent = self._sock.send(bytes(self._unsent[: 2 * _CHUNK]))
            except _NOT_NOW:
                return True
            del self._unsent[:sent]

    def receive(self) -> bool:
        """Some of what has come -> whether that was all."""
        for _ in range(_FRAMES_A_TURN):
            try:
                frame = self._connection.recv_frame()  # type: ignore[no-untyped-call]
            except _NOT_NOW:
                return True
            if frame is None or frame.opcode == ABNF.OPCODE_CLOSE:
                self.over = True
                return False
            if frame.opcode == ABNF.OPCODE_PING:
                self._unsent += _frame(_bytes(frame.data), ABNF.OPCODE_PONG)
            elif frame.opcode != ABNF.OPCODE_PONG:
                self._take(_bytes(frame.data), begins=frame.opcode != ABNF.OPCODE_CONT)
        return False

    def _take(self, data: bytes, *, begins: bool) -> None:
        if begins and data:
            self._current, data = data[0], data[1:]
        if not data:
            return
        if self._current in _NAMES:
            self._on_output(_NAMES[self._current], data)
        elif self._current == _STATUS:
            self._status += data

    def ended(self, otherwise: str) -> ExecEnded:
        """What the engine said last; `otherwise` when it said nothing."""
        return read_status(bytes(self._status)) if self._status else ExecEnded("lost", message=otherwise)


def read_status(raw: bytes) -> ExecEnded:
    """What the channel of the engine says: a `Status` object of the Kubernetes API, in JSON."""
    try:
        status = json.loads(raw)
    except ValueError:  # cut short
        return ExecEnded("lost", message="the connection ended in the middle of the status")
    if status.get("status") == "Success":
        return ExecEnded("exited", 0)
    for cause in (status.get("details") or {}).get("causes") or []:
        if cause.get("reason") == "ExitCode":
            return ExecEnded("exited", int(cause["message"]))
    return ExecEnded("failed", message=str(status.get("message", "")))


def _messages(stdin: Iterable[bytes]) -> Iterator[bytes]:
    for data in stdin:
        for start in range(0, len(data), _CHUNK):
            yield bytes([_STDIN]) + data[start : start + _CHUNK]


def _frame(payload: bytes, opcode: int) -> bytes:
    return _bytes(ABNF.create_frame(payload, opcode).format())


def _bytes(data: bytes | str) -> bytes:
    return data.encode() if isinstance(data, str) else data
