"""The parent of a sandbox: it outlives the worker by a moment, and takes the sandbox with it.

Run as a script, `python -I -S supervisor.py`, with the standard library alone and an environment that is given to it:
it knows no database, no Redis and no secret. One such process waits for each worker; for every run it forks a child
that holds that run's sandbox. So a run costs a fork of a warm interpreter, not the start of a cold one, and still has
a supervising process of its own.

A supervisor kills everything in the run's cgroups when the worker's end of its socket closes (the worker is gone),
when the deadline is over (the worker hangs), when it is asked to, or when the sandbox ends by itself. It reaps what it
killed, sees the cgroups empty, and only then says "gone".

Messages, JSON, one a packet. To it: the specification (`Launch` below), later `{"end": true}`. From it:
`{"started": pid}`, `{"ready": true}`, and last `{"gone": {"why", "status", "lived", "stderr", "left"}}`
(`lived`: when runsc was started and seen to be gone with all it held, monotonic seconds).
"""

import ctypes
import errno
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TypedDict

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
MAX_MESSAGE = 128 * 1024
_STDERR_KEPT = 4096
_END_S = 10.0
"""How long the ladder may take before what is left is reported; then the reaper owns it."""
_INSIST_S = 0.05


class Launch(TypedDict):
    """What to run. `groups` are cgroup directories that the program joins before it is executed."""

    argv: list[str]
    env: dict[str, str]
    cwd: str
    groups: list[str]
    deadline_s: float


def members(groups: Iterable[str]) -> set[int]:
    """Pids in any of the cgroups; a group that does not exist has none. 0 stands for a process of a pid namespace that
    we cannot see into: never a target (kill(0) would be our own process group)."""
    pids: set[int] = set()
    for group in groups:
        try:
            with open(f"{group}/cgroup.procs") as listing:
                pids.update(int(line) for line in listing)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):  # removed, before or while it was read
                raise
    return pids


def end_group(groups: list[str], *, deadline: float, reap: Callable[[], None]) -> set[int]:
    """SIGKILL everything in the cgroups until they are empty. -> what is left at `deadline` (monotonic), else nothing.

    Killing by cgroup reaches children that were born meanwhile. The sandbox's own processes are all parented by the
    sentry, so one pass is usually enough; something that still forks is first denied forking. When all is over the
    limit on tasks is as it was: it is evidence of what the run was held to.
    """
    insist_at = time.monotonic() + _INSIST_S
    denied: dict[str, str] = {}
    for group in groups:
        _write(f"{group}/cgroup.kill", "1")  # cgroup v2
    while True:
        left = members(groups)
        if not left:
            for path, before in denied.items():
                _write(path, before)
            return left
        for pid in sorted(left - {0}):  # runsc and the sentry before what they made: nobody is left to say "killed"
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        reap()
        now = time.monotonic()
        if now > deadline:
            return members(groups)
        if now > insist_at and not denied:
            denied = _deny_forks(groups)
        time.sleep(0.0005)


def _deny_forks(groups: list[str]) -> dict[str, str]:
    """-> what each limit on tasks was before, by its file."""
    before: dict[str, str] = {}
    for group in groups:
        path = f"{group}/pids.max"
        try:
            with open(path) as file:
                before[path] = file.read().strip()
        except OSError:
            continue  # another controller's group, or already removed
        _write(path, "0")
    return before


def _write(path: str, text: str) -> None:
    try:
        with open(path, "w") as file:
            file.write(text)
    except OSError:
        return  # not of this cgroup version, or already removed: the kill loop decides by what is left


class Supervisor:
    """Holds one sandbox from its start to its proven end."""

    def __init__(self, worker: socket.socket, launch: Launch) -> None:
        self._worker = worker
        self._launch = launch
        self._deadline = time.monotonic() + launch["deadline_s"]
        self._stderr = b""
        self._status: int | None = None
        self._pid = 0

    def run(self) -> None:
        wake_read, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        ready_read, ready_write = os.pipe2(os.O_CLOEXEC)
        error_read, error_write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(error_read, False)
        started_at = time.monotonic()
        self._pid = _fork_into(self._launch, stdout=ready_write, stderr=error_write)
        os.close(ready_write)
        os.close(error_write)
        self._say({"started": self._pid})
        why = self._watch(wake_read, ready_read, error_read)
        left = end_group(self._launch["groups"], deadline=time.monotonic() + _END_S, reap=self._reap)
        self._reap_rest()
        lived = [started_at, time.monotonic()]
        self._read_stderr(error_read)
        gone = {"why": why, "status": self._status, "lived": lived, "left": sorted(left)}
        self._say({"gone": gone | {"stderr": self._stderr.decode("utf-8", "replace")}})

    def _watch(self, wake: int, ready: int, error: int) -> str:
        """-> why the sandbox must end, or has ended."""
        poll = select.poll()
        for fd in (self._worker.fileno(), wake, ready, error):
            poll.register(fd, select.POLLIN)
        while True:
            left_s = self._deadline - time.monotonic()
            if left_s <= 0:
                return "deadline"
            for fd, _ in poll.poll(min(left_s, 3600.0) * 1000 + 1):
                if fd == wake:
                    os.read(wake, 4096)
                    self._reap()
                    if self._status is not None:
                        return "exited"
                elif fd == ready:
                    poll.unregister(ready)
                    if os.read(ready, 1):
                        self._say({"ready": True})
                    os.close(ready)
                elif fd == error:
                    if not self._read_stderr(error):
                        poll.unregister(error)
                else:
                    return "asked" if _receive(self._worker) else "worker gone"

    def _read_stderr(self, fd: int) -> bool:
        """Keep the beginning, drop the rest, never let the writer wait. -> False at end of file."""
        while True:
            try:
                chunk = os.read(fd, 65536)
            except BlockingIOError:
                return True
            if not chunk:
                return False
            self._stderr += chunk[: _STDERR_KEPT - len(self._stderr)]

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._pid:
                self._status = status

    def _reap_rest(self) -> None:
        """Orphans of the sandbox are ours (subreaper). Never wait for long: the cgroup was the proof."""
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == self._pid:
                self._status = status
            elif pid == 0:
                time.sleep(0.0005)

    def _say(self, message: dict[str, Any]) -> None:
        try:
            self._worker.send(json.dumps(message).encode(), socket.MSG_NOSIGNAL)
        except OSError:
            return  # the worker is gone; its end of file ends the sandbox


def _fork_into(launch: Launch, *, stdout: int, stderr: int) -> int:
    """Fork, join the cgroups, tie the child's life to ours, execute. The program starts inside its limits."""
    parent = os.getpid()
    argv, env, cwd = launch["argv"], launch["env"], launch["cwd"]
    pid = os.fork()  # noqa: TID251 - this script is the parent of a sandbox; it cannot import workers.proc
    if pid:
        return pid
    try:
        for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        for group in launch["groups"]:
            with open(f"{group}/cgroup.procs", "w") as procs:
                procs.write("0")
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(127)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        os.umask(0o077)
        os.chdir(cwd)
        os.execve(argv[0], argv, env)  # noqa: S606, TID251 - as above
    except BaseException as error:  # noqa: BLE001 - a forked child must not return into its parent's code
        os.write(2, f"{error}\n".encode())
    os._exit(127)


def _prctl(option: int, value: int) -> None:
    if _LIBC.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


_LIBC = ctypes.CDLL(None, use_errno=True)


def _receive(sock: socket.socket) -> bytes:
    try:
        return sock.recv(MAX_MESSAGE)
    except ConnectionError:
        return b""


def _supervise(worker: socket.socket) -> None:
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    message = _receive(worker)
    if message:
        Supervisor(worker, json.loads(message)).run()


def main() -> NoReturn:
    """Wait on stdin, a socket, for the sockets of runs to come; end of file means that the worker is gone."""
    requests = socket.socket(fileno=0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a service manager's; the worker's end of file is the order to end
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps our forks; each of them reaps its own children
    while True:
        message, fds, _, _ = socket.recv_fds(requests, 16, 1)
        if not message:
            os._exit(0)
        for fd in fds:
            if os.fork() == 0:  # noqa: TID251 - as above
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                null = os.open(os.devnull, os.O_RDONLY)
                os.dup2(null, requests.detach())  # not closed: descriptor 0 must not become one of the run's pipes
                os.close(null)
                os.set_inheritable(fd, False)  # a received descriptor is inheritable, and this one is not for runsc
                _supervise(socket.socket(fileno=fd))
                os._exit(0)
            os.close(fd)


if __name__ == "__main__":
    sys.dont_write_bytecode = True
    main()
