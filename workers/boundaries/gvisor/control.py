"""Speaks to the sentry: gVisor's own control protocol ("urpc"), JSON over the unix socket below the run's `--root`.

A request is `{"method", "arg"}` with descriptors beside it, the answer `{"success", "err", "result"}`; one call at a
time on a connection (sources: pkg/urpc/urpc.go, pkg/sentry/control/proc.go, runsc/boot/controller.go of release
20240729). Why not `runsc exec`: docs/adr/0001-gvisor-control-protocol.md.

The sentry is the part of the wall that hostile code attacks, so its answers are judged like hostile bytes: bounded in
size and time, of the expected shape, and descriptors in them are never taken (`recv` without room for them).
"""

import array
import json
import os
import select
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

GUEST_UID = 65532
CONTAINER = "sandbox"
_MAX_REPLY = 1024 * 1024
_CALL_S = 10.0
_NO_CAPABILITIES = dict.fromkeys(
    ("PermittedCaps", "InheritableCaps", "EffectiveCaps", "BoundingCaps", "AmbientCaps"), 0
)


class ControlLost(Exception):
    """The sentry does not answer, or not as this protocol says: the sandbox cannot be used any more."""


class ControlRefused(Exception):
    """The sentry answered, and its answer is an error; its words are the message."""


@dataclass(frozen=True)
class GuestProcess:
    """A process in the sandbox, as the sentry counts it."""

    pid: int
    uid: int
    threads: int


class Connection:
    """One control connection. `fileno` is readable when an answer, or the sentry's end, has arrived."""

    def __init__(self, runsc_root_fd: int) -> None:
        """Raises ControlLost. The socket is found through the directory's descriptor: a path of any length would not
        fit in a socket address (107 bytes)."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._received = bytearray()
        self._socket.settimeout(_CALL_S)
        try:
            self._socket.connect(f"/proc/self/fd/{runsc_root_fd}/runsc-{CONTAINER}.sock")
        except OSError as error:
            self._socket.close()
            raise ControlLost(f"no connection to the sentry: {error.strerror}") from error

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def call(self, method: str, arg: Any, *, fds: Sequence[int] = (), timeout_s: float = _CALL_S) -> Any:
        """Ask and wait. Raises ControlRefused, ControlLost."""
        deadline = time.monotonic() + timeout_s
        self.ask(method, arg, fds=fds)
        while True:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not select.select([self], [], [], left_s)[0]:
                raise ControlLost(f"the sentry did not answer {method} within {timeout_s:g} s")
            answered, result = self.receive()
            if answered:
                return result

    def ask(self, method: str, arg: Any, *, fds: Sequence[int] = ()) -> None:
        """Send a call whose answer `receive` will find. Raises ControlLost."""
        request = json.dumps({"method": f"containerManager.{method}", "arg": arg}).encode()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            sent = self._socket.sendmsg([request], rights)
            if sent < len(request):
                self._socket.sendall(request[sent:])
        except OSError as error:
            raise ControlLost(f"the sentry does not take a call: {error}") from error

    def receive(self) -> tuple[bool, Any]:
        """What has arrived, without waiting: (True, the result), or (False, None) while the answer is not complete.
        Raises ControlRefused, ControlLost."""
        try:
            chunk = self._socket.recv(65536, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False, None
        except OSError as error:
            raise ControlLost(f"the sentry's connection broke: {error}") from error
        self._received += chunk
        if not chunk or len(self._received) > _MAX_REPLY:
            raise ControlLost("the sentry ended the connection" if not chunk else "the sentry's answer is too long")
        if not chunk.endswith(b"}"):
            return False, None
        try:
            answer = json.loads(self._received)
        except ValueError:
            return False, None  # a brace inside the answer happened to end the packet
        self._received.clear()
        if not isinstance(answer, dict) or not isinstance(answer.get("success"), bool):
            raise ControlLost("the sentry's answer has another shape than its protocol's")
        if not answer["success"]:
            raise ControlRefused(str(answer.get("err"))[:1024])
        return True, answer.get("result")

    def execute(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: str,
        fds: tuple[int, int, int],
        timeout_s: float = _CALL_S,
    ) -> int:
        """Start a program as the guest's uid with these three descriptors. -> its pid in the sandbox.

        The bounding set must be given: absent capabilities mean "none now, all may be gained" to the sentry. Limits
        are those of config.json. Newer releases also read NoNewPrivileges here; this one ignores it.
        """
        arguments = {
            "argv": list(argv),
            "envv": [f"{name}={value}" for name, value in env.items()],
            "wd": cwd,
            "KUID": GUEST_UID,
            "KGID": GUEST_UID,
            "ExtraKGIDs": [],
            "NoNewPrivileges": True,
            "Capabilities": _NO_CAPABILITIES,
            "StdioIsPty": False,
            "GuestFDs": [0, 1, 2],
            "ContainerID": CONTAINER,
        }
        return _pid(self.call("ExecuteAsync", arguments, fds=fds, timeout_s=timeout_s))

    def ask_wait(self, pid: int) -> None:
        """The answer, when the process has ended, is its raw wait status: see `wait_status`."""
        self.ask("WaitPID", {"PID": pid, "CID": CONTAINER})

    def processes(self, *, timeout_s: float = _CALL_S) -> list[GuestProcess]:
        return guest_processes(self.call("Processes", CONTAINER, timeout_s=timeout_s))

    def ask_processes(self) -> None:
        self.ask("Processes", CONTAINER)


def wait_status(result: Any) -> tuple[int | None, int | None]:
    """-> (exit code, signal), exactly one of them; so `exit 139` and SIGSEGV differ. Raises ControlLost."""
    if not isinstance(result, int) or isinstance(result, bool) or not 0 <= result <= 0xFFFF:
        raise ControlLost("the sentry's wait status is none")
    if os.WIFEXITED(result):
        return os.WEXITSTATUS(result), None
    if os.WIFSIGNALED(result) and 1 <= os.WTERMSIG(result) <= 64:
        return None, os.WTERMSIG(result)
    raise ControlLost("the sentry's wait status is none")


def guest_processes(result: Any) -> list[GuestProcess]:
    """Raises ControlLost."""
    try:
        return [
            GuestProcess(pid=_pid(row["pid"]), uid=int(row["uid"]), threads=len(row["threads"] or ()))
            for row in result or ()
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ControlLost("the sentry's list of processes has another shape than its protocol's") from error


def _pid(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise ControlLost("the sentry's process id is none")
    return value
