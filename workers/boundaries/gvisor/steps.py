"""Plays one step: a single loop over its pipes, the sentry's answers, the memory watch and the supervisor.

Nothing here trusts the guest. The exit comes from the sentry's wait status, time from the host's monotonic clock, CPU
from the cgroup, limits from what the host sees. A reader that always drains means a writer that never holds us up.
"""

import fcntl
import os
import selectors
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from service.core.boundary import Cancellation, Ended, Execution, Limit, Listener, StepSpec
from workers.boundaries.gvisor.cgroups import Group
from workers.boundaries.gvisor.control import (
    GUEST_UID,
    Connection,
    ControlLost,
    ControlRefused,
    GuestProcess,
    guest_processes,
    wait_status,
)
from workers.boundaries.gvisor.render import FILES_OVERHEAD
from workers.boundaries.gvisor.supervision import Supervised
from workers.capture import HeadAndTail
from workers.runtimes.store import INIT_AT

_COUNT_S = 0.2
"""How often the sentry is asked for its threads when nothing suggests that there are many."""
_TICK_S = 0.025
"""How often limits that the kernel does not announce are looked at; a fork bomb lives longer."""
_CHUNK = 65536
_START_MIN_S, _START_MAX_S = 2.0, 10.0
"""A sentry that takes longer than this to start a program is not alive."""
_KILL_S = 1.0
_KILL_NEWS_S = 0.05
_DEATH_S = 5.0
_KILL_UID = (str(INIT_AT), "kill")
_STREAMS: tuple[Literal["stdout", "stderr"], ...] = ("stdout", "stderr")
OUTPUT_FACTOR = 64
"""A run that prints more than so many times its `output` in all is ended."""
_DEAD_CONTAINER = ("not started", "has stopped", "does not exist")


@dataclass
class Guest:
    """What the steps of one sandbox share. `alive` ends with the sandbox, never begins again."""

    supervised: Supervised
    group: Group
    runsc_root_fd: int
    fs_fd: int
    memory_event: int | None
    pids_limit: int
    memory_limit: int
    output_limit: int
    cancelled: Cancellation
    wall_ends_at: float
    alive: bool = True
    printed_bytes: int = 0
    uid: int | None = None
    on_started: Callable[[], None] = field(default=lambda: None)
    """Called once a step's process runs: what is looked at then costs the guest nothing."""

    def end(self) -> None:
        self.alive = False
        self.supervised.end(timeout_s=_DEATH_S)

    def cpu_s(self) -> float:
        """CPU seconds of the whole sandbox until now; 0 when its group is gone."""
        try:
            return self.group.cpu_s()
        except FileNotFoundError:
            return 0.0

    def limits_hit(self) -> frozenset[Limit]:
        """What the host's counters say now. Absent files: the group is gone, and nothing can be said."""
        hit = self.limits_near()
        with suppress(OSError):
            if self.group.out_of_memory():
                hit.add(Limit.MEMORY)
            if self.group.hit_host_task_limit():
                hit.add(Limit.PIDS)
        return frozenset(hit)

    def limits_near(self) -> set[Limit]:
        """The part that passes and must be seen while it lasts; cheap, since it is asked at every tick."""
        hit = set()
        with suppress(OSError):
            if self.group.memory_is_full(self.memory_limit):
                hit.add(Limit.MEMORY)
        space = os.fstatvfs(self.fs_fd)
        if space.f_bfree == 0:
            hit.add(Limit.DISK)
        if space.f_ffree == 0 and space.f_files > FILES_OVERHEAD:
            hit.add(Limit.FILES)
        return hit

    def observe_uid(self) -> None:
        """The steps were too short to be seen in the sentry's list: start what lives on, just as a step is started,
        and look at that. It ends with the sandbox."""
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            with suppress(ControlLost, ControlRefused), Connection(self.runsc_root_fd) as control:
                pid = control.execute([str(INIT_AT)], env={}, cwd="/", fds=(null, null, null))
                self.uid = next((process.uid for process in control.processes() if process.pid == pid), None)
        finally:
            os.close(null)

    def why_dead(self, *, seen: frozenset[Limit]) -> tuple[Ended, frozenset[Limit], str]:
        """The sandbox has died under us. The host's own counters explain it, or nothing does. A sentry that is short of
        memory may end before the kernel says a word, and what it held is freed at once: so what the step has `seen`,
        what stands now and the peak all count."""
        hit = self.limits_hit()
        self.end()
        ended_it = (hit | self.limits_hit()) & {Limit.MEMORY, Limit.PIDS} | seen & {Limit.MEMORY}
        with suppress(OSError):
            if self.group.peak_memory_bytes() >= self.memory_limit:
                ended_it |= {Limit.MEMORY}
        if ended_it:
            return Ended.LIMIT, frozenset(ended_it), ""
        gone = self.supervised.gone
        said = f": {gone.why}, status {gone.status}" if gone else ""
        return Ended.LOST, frozenset(), f"the sandbox ended{said}"


def play(guest: Guest, step: StepSpec, *, listener: Listener | None = None) -> Execution:
    """Run the step to its end, and see to it that it has ended."""
    with ExitStack() as stack:
        return _Play(guest, step, stack, listener).run()


class _Play:
    """One step being played."""

    def __init__(self, guest: Guest, step: StepSpec, stack: ExitStack, listener: Listener | None) -> None:
        self._guest, self._step, self._stack, self._listener = guest, step, stack, listener
        self._selector = stack.enter_context(selectors.DefaultSelector())
        self._outputs: dict[int, HeadAndTail] = {}
        self._stdin_left = memoryview(step.stdin)
        self._stdin: int | None = None
        self._limits: set[Limit] = set()
        self._exit_code: int | None = None
        self._signal: int | None = None
        self._message = ""
        self._asked = True

    def run(self) -> Execution:
        started_at, cpu_before = time.monotonic(), self._guest.cpu_s()
        try:
            self._start()
            ended = self._loop(started_at + self._step.timeout_s)
        except ControlRefused as refusal:
            ended = self._not_started(str(refusal))
        except (ControlLost, FileNotFoundError):  # the second: another process has destroyed the boundary
            ended = self._died()
        duration_s = time.monotonic() - started_at
        if ended is Ended.EXITED:
            self._count_leftovers()
        elif self._guest.alive:
            self._end_leftovers(ended)
        self._drain()
        self._limits |= self._guest.limits_hit()
        cpu_s = max(self._guest.cpu_s() - cpu_before, 0.0)
        stdout, stderr = (stream.capture() for stream in self._outputs.values())
        return Execution(
            ended=ended,
            exit_code=self._exit_code,
            signal=self._signal,
            message=self._message,
            duration_s=duration_s,
            cpu_s=cpu_s,
            stdout=stdout,
            stderr=stderr,
            limits=frozenset(self._limits),
            sandbox_alive=self._guest.alive,
        )

    def _start(self) -> None:
        """Raises ControlRefused: the step's program cannot be started; ControlLost."""
        guest_ends: list[int] = []
        try:
            guest_ends.append(self._open_stdin())
            for name in _STREAMS:
                read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
                guest_ends.append(write_fd)
                os.set_blocking(read_fd, False)
                self._stack.callback(os.close, read_fd)
                tell = partial(self._listener, name) if self._listener is not None else None
                self._outputs[read_fd] = HeadAndTail(self._guest.output_limit, tell=tell)
                self._selector.register(read_fd, selectors.EVENT_READ, self._read)
            self._waiting = self._stack.enter_context(Connection(self._guest.runsc_root_fd))
            fds = (guest_ends[0], guest_ends[1], guest_ends[2])
            timeout_s = min(max(self._step.timeout_s, _START_MIN_S), _START_MAX_S)
            pid = self._waiting.execute(self._step.argv, env=self._step.env, cwd="/work", fds=fds, timeout_s=timeout_s)
        finally:
            for fd in guest_ends:
                os.close(fd)
        self._waiting.ask_wait(pid)
        self._pid = pid

    def _open_stdin(self) -> int:
        if not self._step.stdin:
            return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        read_fd, self._stdin = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._stdin, False)
        self._selector.register(self._stdin, selectors.EVENT_WRITE, self._write)
        self._stack.callback(self._close_stdin)
        return read_fd

    def _loop(self, step_ends_at: float) -> Ended:
        """-> why the step is over. Raises ControlLost."""
        guest = self._guest
        self._asking = self._stack.enter_context(Connection(guest.runsc_root_fd))
        self._asking.ask_processes()
        self._ask_at = time.monotonic() + _COUNT_S
        self._selector.register(self._waiting, selectors.EVENT_READ, self._on_exit)
        self._selector.register(self._asking, selectors.EVENT_READ, self._on_processes)
        self._selector.register(guest.supervised, selectors.EVENT_READ, self._on_supervisor)
        if guest.memory_event is not None:
            self._selector.register(guest.memory_event, selectors.EVENT_READ, self._on_memory)
        guest.on_started()
        looked_at = 0.0
        while True:
            for key, _ in self._selector.select(_TICK_S):
                ended: Ended | None = key.data(key.fd)
                if ended is not None:
                    return ended
            now = time.monotonic()
            ended = self._over(now, step_ends_at)
            if ended is None and now >= looked_at + _TICK_S:
                looked_at = now
                ended = self._look()
            if ended is not None:
                return ended

    def _over(self, now: float, step_ends_at: float) -> Ended | None:
        """Whether something of ours ends the step."""
        guest = self._guest
        if guest.printed_bytes > OUTPUT_FACTOR * guest.output_limit:
            self._limits.add(Limit.OUTPUT)
            return Ended.LIMIT
        if guest.cancelled.is_set():
            return Ended.CANCELLED
        if now >= guest.wall_ends_at:
            return Ended.WALL_TIMEOUT
        return Ended.STEP_TIMEOUT if now >= step_ends_at else None

    def _on_exit(self, _: int) -> Ended | None:
        answered, result = self._waiting.receive()
        if not answered:
            return None
        self._exit_code, self._signal = wait_status(result)
        if self._signal == signal.SIGKILL:
            # A guest may have killed itself, or the whole sandbox is being killed from outside and its sentry could
            # still say so. Only the supervisor knows.
            self._await_news(_KILL_NEWS_S)
        return Ended.EXITED

    def _on_processes(self, _: int) -> None:
        answered, result = self._asking.receive()
        if answered:
            self._asked = False
            self._count(guest_processes(result))

    def _await_news(self, seconds: float) -> None:
        """Raises ControlLost when the sandbox turns out to be gone."""
        deadline = time.monotonic() + seconds
        while (left_s := deadline - time.monotonic()) > 0:
            self._guest.supervised.listen(timeout_s=left_s)
            if self._guest.supervised.gone is not None:
                self._exit_code = self._signal = None
                raise ControlLost("the supervisor says it is gone")

    def _on_supervisor(self, _: int) -> None:
        self._guest.supervised.listen(timeout_s=0)
        if self._guest.supervised.gone is not None:
            raise ControlLost("the supervisor says it is gone")

    def _on_memory(self, event: int) -> Ended | None:
        with suppress(BlockingIOError):
            os.eventfd_read(event)
        if not self._guest.group.out_of_memory():
            return None
        self._limits.add(Limit.MEMORY)
        return Ended.LIMIT

    def _look(self) -> Ended | None:
        """Limits that the kernel does not announce. The sentry counts processes and threads, exactly; but asking costs
        the guest about a millisecond of CPU time, so it is asked at every tick only while the host's own count says
        that there could be so many processes (threads of one process need not show there), and else now and then."""
        group = self._guest.group
        self._limits |= self._guest.limits_near()
        now = time.monotonic()
        if not self._asked and (now >= self._ask_at or group.host_tasks() >= self._guest.pids_limit):
            self._asking.ask_processes()
            self._asked, self._ask_at = True, now + _COUNT_S
        # Where no event comes (cgroup v2) the kernel has begun to kill: end it as a whole, now.
        if self._guest.memory_event is None and group.out_of_memory():
            self._limits.add(Limit.MEMORY)
            return Ended.LIMIT
        return None

    def _count(self, processes: list[GuestProcess]) -> None:
        for process in processes:
            if process.pid == self._pid:
                self._guest.uid = process.uid
        self._judge_threads(sum(process.threads for process in processes if process.uid == GUEST_UID))

    def _judge_threads(self, there: int) -> None:
        if there >= self._guest.pids_limit:
            self._limits.add(Limit.PIDS)

    def _count_leftovers(self) -> None:
        """A step that was refused a process, and ended over it, may have been faster than any look at it: what it left
        behind was there beside it. Where that cannot be asked any more, the next step finds out why."""
        with suppress(ControlLost, ControlRefused, FileNotFoundError):
            if Limit.PIDS in self._limits or self._guest.group.host_tasks() < self._guest.pids_limit:
                return
            with Connection(self._guest.runsc_root_fd) as control:
                found = control.processes()
            left = sum(process.threads for process in found if process.uid == GUEST_UID and process.pid != self._pid)
            self._judge_threads(left + 1)

    def _read(self, fd: int) -> None:
        with suppress(BlockingIOError):
            chunk = os.read(fd, _CHUNK)
            if not chunk:
                self._selector.unregister(fd)
                return
            self._outputs[fd].add(chunk)
            self._guest.printed_bytes += len(chunk)

    def _write(self, fd: int) -> None:
        try:
            self._stdin_left = self._stdin_left[os.write(fd, self._stdin_left[:_CHUNK]) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._stdin_left = self._stdin_left[:0]
        if not self._stdin_left:
            self._close_stdin()

    def _close_stdin(self) -> None:
        if self._stdin is not None:
            with suppress(KeyError):
                self._selector.unregister(self._stdin)
            os.close(self._stdin)
            self._stdin = None

    def _drain(self) -> None:
        """What the step wrote before it ended is in the pipes: never more than a pipe holds. Then they are closed: a
        child that was left behind can neither hold this step open nor reach the next one's pipes."""
        for fd, stream in self._outputs.items():
            left = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
            while left > 0:
                try:
                    chunk = os.read(fd, min(left, _CHUNK))
                except BlockingIOError:
                    break
                if not chunk:
                    break
                left -= len(chunk)
                stream.add(chunk)
                self._guest.printed_bytes += len(chunk)

    def _not_started(self, refusal: str) -> Ended:
        if any(words in refusal for words in _DEAD_CONTAINER):
            return self._died()
        self._message = "".join(char if char.isprintable() else "\ufffd" for char in refusal)
        return Ended.NOT_STARTED

    def _died(self) -> Ended:
        ended, limits, self._message = self._guest.why_dead(seen=frozenset(self._limits))
        self._limits |= limits
        return ended

    def _end_leftovers(self, ended: Ended) -> None:
        """After a time-out the step's uid is cleared and the sandbox stays usable; after everything else it goes."""
        if ended is Ended.NOT_STARTED:
            return
        if ended in (Ended.STEP_TIMEOUT, Ended.WALL_TIMEOUT) and self._clear_uid():
            return
        self._guest.end()

    def _clear_uid(self) -> bool:
        """SIGKILL to every process of the steps' uid, until the sentry shows none. -> whether that came true in time.
        By our own init: the guest's root may have no `kill`, and nothing in it is to be relied on."""
        deadline = time.monotonic() + _KILL_S
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            with Connection(self._guest.runsc_root_fd) as control:
                while time.monotonic() < deadline:
                    with suppress(ControlRefused):
                        control.execute([*_KILL_UID], env={}, cwd="/", fds=(null, null, null), timeout_s=_KILL_S)
                    for _ in range(20):
                        if all(process.uid != GUEST_UID for process in control.processes(timeout_s=_KILL_S)):
                            return True
                        time.sleep(0.002)
        except (ControlLost, ControlRefused):
            return False
        finally:
            os.close(null)
        return False
