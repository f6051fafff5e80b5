"""The processes of `blastdoor up`: started with an explicit environment, watched, restarted, stopped in order.

Each is the leader of a session of its own: Ctrl-C in the terminal reaches `up` alone, which then decides the order, and
a process that resists is killed with what it started. Should `up` itself be killed, the kernel sends each of them
SIGTERM (PR_SET_PDEATHSIG), so each ends as it would have; what resists even that is ended by the next `up`, which finds
it in up.json. PDEATHSIG follows the thread that forked, so processes are started by the main thread only.
"""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from service.cli.up.state import Remembered, StateDirectory, process_identity

PR_SET_PDEATHSIG = 1
CRASHES, WITHIN_S = 5, 60.0
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.5, 10.0
LOG_BYTES = 10 * 2**20
_LIBC = ctypes.CDLL(None, use_errno=True)


class CrashLoop(Exception):
    """A process died too often to go on; `child` says which."""

    def __init__(self, child: "Child") -> None:
        super().__init__(f"{child.name} {child.how_it_ended} and does not stay up; {child.log} says:\n{child.tail()}")
        self.child = child


@dataclass(frozen=True)
class Program:
    """What to start. `ladder`: signals and the seconds that each has to work; after the last one comes SIGKILL."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] = field(repr=False)
    stdin: bytes = field(default=b"", repr=False)
    ladder: Sequence[tuple[signal.Signals, float]] = ((signal.SIGTERM, 10.0),)


class Child:
    """One program, through all its lives."""

    def __init__(self, program: Program, state: StateDirectory) -> None:
        self.program = program
        self.name = program.name
        self.log = state.logs / f"{program.name}.log"
        self._state = state
        self._process: subprocess.Popen[bytes] | None = None
        self._deaths: list[float] = []
        self._restart_at: float | None = None

    @property
    def alive(self) -> bool:
        """Looks without reaping: a process id is ours to signal only until its exit status was taken."""
        if self._process is None or self._process.returncode is not None:
            return False
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    @property
    def status(self) -> int | None:
        """The exit code, minus the signal, or None while it runs. Ends what it left behind in its process group."""
        if self._process is None or self.alive:
            return None
        self.kill()
        return self._process.returncode

    @property
    def how_it_ended(self) -> str:
        status = self.status
        if status is not None and status < 0:
            return f"was killed by signal {-status}"
        return f"exited with {status}"

    def start(self) -> None:
        """Raises OSError when the program cannot be started."""
        if self.log.exists() and self.log.stat().st_size > LOG_BYTES:
            self.log.replace(self.log.with_suffix(".log.1"))
        parent = os.getpid()
        descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        with open(descriptor, "ab") as log:
            self._process = subprocess.Popen(
                list(self.program.argv),
                env=dict(self.program.env),
                cwd="/",
                stdin=subprocess.PIPE if self.program.stdin else subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: _die_with(parent),
            )
        self._state.remember_process(self.name, self._process.pid)
        if self._process.stdin is not None:
            with self._process.stdin as stdin:
                stdin.write(self.program.stdin)

    def revive(self, say: Callable[[str], None]) -> None:
        """Start it again when it has died, later each time. Raises CrashLoop."""
        now = time.monotonic()
        if self.alive:
            return
        if self._restart_at is None:
            self._deaths = [death for death in self._deaths if now - death < WITHIN_S] + [now]
            if len(self._deaths) >= CRASHES:
                raise CrashLoop(self)
            pause_s = min(FIRST_BACKOFF_S * 2 ** (len(self._deaths) - 1), LONGEST_BACKOFF_S)
            self._restart_at = now + pause_s
            say(f"{self.name} {self.how_it_ended}; it starts again in {pause_s:g} s. {self.log} says:\n{self.tail()}")
        elif now >= self._restart_at:
            self._restart_at = None
            self.start()

    def tail(self, lines: int = 12) -> str:
        """The end of its log, for a person."""
        try:
            text = self.log.read_bytes()[-16384:].decode("utf-8", "replace")
        except OSError:
            return ""
        return "\n".join("    " + line for line in text.splitlines()[-lines:])

    def signal(self, number: signal.Signals) -> None:
        if self._process is not None and self.alive:
            os.kill(self._process.pid, number)

    def stopped_within(self, seconds: float, *, hurry: Callable[[], bool] = lambda: False) -> bool:
        """Wait for its end. `hurry` is asked often; True gives up at once."""
        deadline = time.monotonic() + seconds
        while self.alive and time.monotonic() < deadline and not hurry():
            time.sleep(0.02)
        return not self.alive

    def kill(self) -> None:
        """SIGKILL to it and to what it started in its session's process group; and reap."""
        if self._process is not None and self._process.returncode is None:
            _kill_group(self._process.pid)
            self._process.wait()

    def stop(self, say: Callable[[str], None], *, hurry: Callable[[], bool] = lambda: False) -> None:
        """Down the ladder. What is left of its process group afterwards is killed too, so that nothing stays behind."""
        if self._process is None:
            return
        for number, seconds in self.program.ladder:
            if not self.alive:
                break
            self.signal(number)
            if not self.stopped_within(seconds, hurry=hurry) and not hurry():
                say(f"{self.name} did not end within {seconds:g} s of {number.name}")
        if self.alive:
            say(f"{self.name} is killed")
        self.kill()


def end_left_over(processes: Sequence[Remembered], say: Callable[[str], None]) -> None:
    """End what an earlier `up` left: it was killed, and these resisted the kernel's SIGTERM, or still follow it."""
    deadline = time.monotonic() + 10.0
    for process in processes:
        say(f"{process.name} (pid {process.pid}) of an earlier `blastdoor up` is still there; it is ended")
        os.kill(process.pid, signal.SIGTERM)
    for process in processes:
        while process_identity(process.pid) == process.identity and time.monotonic() < deadline:
            time.sleep(0.05)
        if process_identity(process.pid) == process.identity:
            _kill_group(process.pid)


def _kill_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return  # nobody is left in it


def _die_with(parent: int) -> None:
    """Runs in the child before exec. The parent may have died before the kernel was asked: then nobody would tell."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
