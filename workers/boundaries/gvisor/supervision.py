"""The worker's side of the supervising process (supervisor.py): one waits warm for each worker process."""

import contextlib
import json
import os
import select
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.core.errors import ProvisionFailed
from workers.boundaries.gvisor.supervisor import MAX_MESSAGE, Launch
from workers.proc import PATH_ONLY, Child, ProcessFailed, spawn

_START_S = 10.0


@dataclass(frozen=True)
class Gone:
    """Everything in the run's cgroups has ended, but `left`. `status` is the raw wait status of runsc, None when it
    was never seen; `why` is exited, asked, deadline or worker gone; `lived` is when runsc was started and seen to be
    gone with all it held, in seconds of the host's monotonic clock."""

    why: str
    status: int | None
    stderr: str
    left: tuple[int, ...] = ()
    lived: tuple[float, float] | None = None


class Supervised:
    """A sandbox that is held by a supervising process. `fileno` is readable when there is news of it."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self.ready = False
        self.gone: Gone | None = None

    def fileno(self) -> int:
        return self._channel.fileno()

    def launch(self, launch: Launch) -> None:
        """Start what it is to supervise. Raises ProvisionFailed."""
        try:
            self._channel.send(json.dumps(launch).encode())
        except OSError as error:
            raise ProvisionFailed(f"no supervising process: {error}") from error

    def close(self) -> None:
        """The supervisor sees the end of file, and ends what is left."""
        self._channel.close()

    def listen(self, *, timeout_s: float) -> bool:
        """Take news for at most `timeout_s`. -> whether any came; see `ready` and `gone`."""
        if self.gone is not None or not select.select([self._channel], [], [], max(timeout_s, 0.0))[0]:
            return False
        try:
            message = self._channel.recv(MAX_MESSAGE)
        except ConnectionResetError:
            # It ended without having read our "end". The kernel reports that once, before what it still had to say.
            message = self._channel.recv(MAX_MESSAGE)
        if not message:
            # Killed by somebody: runsc died with it (PDEATHSIG); that nothing is left is for the caller to prove.
            self.gone = Gone(why="supervisor gone", status=None, stderr="")
            return True
        self._note(json.loads(message))
        return True

    def end(self, *, timeout_s: float) -> Gone:
        """End every process of the sandbox, and wait until they are gone."""
        deadline = time.monotonic() + timeout_s
        if self.gone is None:
            with contextlib.suppress(OSError):  # it has just ended by itself
                self._channel.send(b'{"end": true}')
        while self.gone is None:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return Gone(why="supervisor silent", status=None, stderr="")
            self.listen(timeout_s=left_s)
        return self.gone

    def _note(self, message: dict[str, Any]) -> None:
        self.ready = self.ready or bool(message.get("ready"))
        if "gone" in message:
            said = message["gone"]
            self.gone = Gone(
                why=said["why"],
                status=said["status"],
                stderr=said["stderr"],
                left=tuple(said["left"]),
                lived=tuple(said["lived"]),
            )


class Supervisors:
    """Starts supervising processes for this worker process. Safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner = 0
        self._requests: socket.socket | None = None
        self._child: Child | None = None

    def prepare(self) -> Supervised:
        """A supervisor for one run, asked for before there is anything to supervise: its fork and our preparations go
        on side by side. Raises ProvisionFailed."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self._hand_over(theirs)
            except (OSError, ProcessFailed) as error:
                ours.close()
                raise ProvisionFailed(f"no supervising process: {error}") from error
        return Supervised(ours)

    def warm(self) -> None:
        """Have the supervising process started, without waiting for it. Raises ProvisionFailed."""
        try:
            with self._lock:
                self._running()
        except ProcessFailed as error:
            raise ProvisionFailed(f"no supervising process: {error}") from error

    def close(self) -> None:
        """End the waiting process; sandboxes that it has forked supervisors for live on until their own end."""
        with self._lock:
            if self._requests is not None and self._owner == os.getpid():
                self._requests.close()
                if self._child is not None and self._child.wait(timeout_s=_START_S) is None:
                    self._child.kill()
            self._requests = self._child = None

    def _hand_over(self, theirs: socket.socket) -> None:
        with self._lock:
            try:
                socket.send_fds(self._running(), [b"run"], [theirs.fileno()])
            except OSError:
                self._forget()  # it died since the last run: one new one, once
                socket.send_fds(self._running(), [b"run"], [theirs.fileno()])

    def _running(self) -> socket.socket:
        """A worker that was forked from one that had a supervisor starts its own: a shared end of file ends nothing."""
        if self._requests is None or self._owner != os.getpid():
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            script = Path(__file__).with_name("supervisor.py")
            with theirs:
                self._child = spawn([sys.executable, "-I", "-S", str(script)], env=PATH_ONLY, stdin=theirs.fileno())
            self._requests, self._owner = ours, os.getpid()
        return self._requests

    def _forget(self) -> None:
        if self._requests is not None:
            self._requests.close()
        if self._child is not None and self._owner == os.getpid():
            self._child.kill()
        self._requests = self._child = None
