"""The only place that starts a process: an argument list, an explicit environment, a time limit, capped output.

Never a shell, never the worker's own environment (it holds secrets), no descriptor but those that are named.
"""

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from service.core.errors import BlastdoorError

PATH_ONLY: Mapping[str, str] = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
"""The environment of a tool that needs none."""
_CHUNK = 65536
_LOOK_S = 0.1


class ProcessFailed(BlastdoorError):
    """The program could not be started, or did not end in time; `detail` names it."""

    code = "process_failed"


@dataclass(frozen=True, kw_only=True)
class Finished:
    """`status` is the exit code, or minus the signal. Each stream keeps its first bytes; `truncated` if there were
    more."""

    status: int
    stdout: bytes
    stderr: bytes
    truncated: bool

    @property
    def text(self) -> str:
        return self.stdout.decode("utf-8", "replace")


@dataclass(frozen=True, kw_only=True)
class Followed:
    """`status` as in Finished, None where we ended it. `said`: the last of its stderr, where programs that fail say
    why."""

    status: int | None
    said: str


class Child:
    """A process that runs beside us. Whoever starts it ends it."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL, and reap."""
        self._process.kill()
        self._process.wait()

    def wait(self, *, timeout_s: float) -> int | None:
        """-> exit code or minus the signal; None when it still runs after `timeout_s`."""
        try:
            return self._process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return None


def run(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] = PATH_ONLY,
    timeout_s: float,
    max_output: int = 65536,
    cwd: Path | None = None,
) -> Finished:
    """Run a program to its end, and keep at most `max_output` bytes of each stream. Raises ProcessFailed when it cannot
    be started or takes longer than `timeout_s`, then killed."""
    deadline = time.monotonic() + timeout_s
    process = _popen(argv, env=env, cwd=cwd, stdin=subprocess.DEVNULL, output=subprocess.PIPE)
    with process:
        kept, complete = _read_both(process, deadline=deadline, max_output=max_output)
        try:
            status = process.wait(timeout=max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            complete = False
        if not complete:
            process.kill()
            process.wait()
            raise ProcessFailed(f"{argv[0]} did not end within {timeout_s:g} s")
    (stdout, out_total), (stderr, error_total) = kept
    truncated = out_total > len(stdout) or error_total > len(stderr)
    return Finished(status=status, stdout=bytes(stdout), stderr=bytes(stderr), truncated=truncated)


def follow(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    timeout_s: float,
    tell: Callable[[str], None],
    unwanted: Callable[[], bool],
    max_output: int = 16384,
) -> Followed:
    """Run a program that takes its time to its end, and tell each line of its stderr as it comes. As soon as it is
    `unwanted`, or after `timeout_s`, it is killed with all that it started (its process group). Raises ProcessFailed
    when it cannot be started."""
    deadline = time.monotonic() + timeout_s
    process = _popen(argv, env=env, cwd=Path("/"), stdin=subprocess.DEVNULL, output=None, errors=subprocess.PIPE)
    assert process.stderr is not None
    said, rest, is_open = b"", b"", True
    with process, selectors.DefaultSelector() as selector:
        selector.register(process.stderr, selectors.EVENT_READ)
        try:
            while is_open or process.poll() is None:
                if unwanted() or time.monotonic() > deadline:
                    break
                if not is_open:
                    time.sleep(_LOOK_S)
                elif selector.select(_LOOK_S):
                    chunk = os.read(process.stderr.fileno(), _CHUNK)
                    is_open = chunk != b""
                    said = (said + chunk)[-max_output:]
                    *lines, rest = (rest + chunk).split(b"\n")
                    rest = rest[-max_output:]
                    for line in lines:
                        tell(line.decode("utf-8", "replace"))
                elif process.poll() is not None:
                    break  # what it left behind may hold the pipe for ever
        finally:
            status = process.poll()
            if status is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    return Followed(status=status, said=said.decode("utf-8", "replace"))


def spawn(argv: Sequence[str], *, env: Mapping[str, str], stdin: int) -> Child:
    """Start a program of ours that lives beside this process, in a session of its own: a terminal's Ctrl-C is ours to
    handle, not its. `stdin` is a descriptor; errors go where ours go. Raises ProcessFailed."""
    return Child(_popen(argv, env=env, cwd=Path("/"), stdin=stdin, output=None))


def _popen(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path | None,
    stdin: int,
    output: int | None,
    errors: int | None = None,
) -> "subprocess.Popen[bytes]":
    """`output` is of both streams; with None stdout is thrown away, and errors go where ours go. `errors` is stderr's
    own."""
    try:
        return subprocess.Popen(
            list(argv),
            env=dict(env),
            cwd=cwd,
            stdin=stdin,
            stdout=subprocess.DEVNULL if output is None else output,
            stderr=output if errors is None else errors,
            close_fds=True,
            start_new_session=True,
        )
    except OSError as error:
        raise ProcessFailed(f"{argv[0]} could not be started: {error.strerror}") from error


def _read_both(
    process: "subprocess.Popen[bytes]", *, deadline: float, max_output: int
) -> tuple[list[tuple[bytearray, int]], bool]:
    """-> (kept bytes and total of each stream, whether both ended by the deadline)."""
    assert process.stdout is not None
    assert process.stderr is not None
    streams = [process.stdout, process.stderr]
    kept, totals = [bytearray(), bytearray()], [0, 0]
    with selectors.DefaultSelector() as selector:
        for index, stream in enumerate(streams):
            selector.register(stream, selectors.EVENT_READ, index)
        while selector.get_map():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return list(zip(kept, totals, strict=True)), False
            for key, _ in selector.select(left_s):
                index = key.data
                chunk = os.read(streams[index].fileno(), _CHUNK)
                if not chunk:
                    selector.unregister(key.fileobj)
                    continue
                totals[index] += len(chunk)
                kept[index] += chunk[: max_output - len(kept[index])]
    return list(zip(kept, totals, strict=True)), True
