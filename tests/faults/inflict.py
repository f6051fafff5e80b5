"""What is done to the processes of a place, when, and for how long, by a seed alone; and who keeps them running
otherwise."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from tests.faults.place import Place, Program

KILL, STOP, FLUSH = "kill", "stop", "flush"
WEIGHTS = {
    ("child", KILL): 5, ("child", STOP): 4, ("worker", KILL): 4, ("worker", STOP): 2, ("reaper", KILL): 2,
    ("reaper", STOP): 1, ("api", KILL): 2, ("api", STOP): 1, ("relay", KILL): 3, ("relay", STOP): 2,
    ("webhooks", KILL): 2, ("webhooks", STOP): 1, ("redis", KILL): 2, ("redis", STOP): 1, ("redis", FLUSH): 2,
}  # fmt: skip
OF_A_SITE = ("worker", "reaper")


@dataclass(frozen=True)
class Fault:
    """`at` and `lasts` in seconds; `site` is where, of a worker, its child or a reaper."""

    at: float
    what: str
    action: str
    site: str
    lasts: float

    def __str__(self) -> str:
        return f"{self.at:7.2f} s  {self.action} {self.what}@{self.site} for {self.lasts:.2f} s"


def plan(seed: int, sites: list[str], *, lasts_s: float, calm_s: float, longest_s: float) -> list[Fault]:
    """The faults of the first `lasts_s` seconds. `calm_s`: the longest between two; `longest_s`: of a stop."""
    chance = random.Random(seed)
    at, faults = 1.0, []
    while at < lasts_s:
        (what, action) = chance.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        most_s = longest_s / 2 if what in ("api", "redis") else longest_s
        lasts = 0.0 if action == FLUSH else chance.uniform(0.1, most_s if action == STOP else most_s / 3)
        faults.append(Fault(at, what, action, chance.choice(sites), lasts))
        at += chance.uniform(0.2, calm_s)
    return faults


class Supervisor:
    """Keeps one program of each role running, as `up` or systemd would, except while a fault says otherwise."""

    def __init__(self, starts: Mapping[tuple[str, str], Callable[[], Program]]) -> None:
        self._starts = starts
        self.alive = {key: start() for key, start in starts.items()}
        self._down_until: dict[tuple[str, str], float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep)

    def __enter__(self) -> "Supervisor":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def kill(self, key: tuple[str, str], *, for_s: float) -> None:
        """The process alone, as the kernel's OOM killer would; what it leaves has to see to itself."""
        self._down_until[key] = time.monotonic() + for_s
        self.alive[key].send(signal.SIGKILL)

    def _keep(self) -> None:
        while not self._stop.wait(0.1):
            for key, program in list(self.alive.items()):
                if not program.running and time.monotonic() >= self._down_until.get(key, 0.0):
                    self.alive[key] = self._starts[key]()


class Faults:
    """Does one fault, and undoes what does not end by itself."""

    def __init__(self, place: Place, supervisor: Supervisor, chance: random.Random) -> None:
        self._place, self._supervisor, self._chance = place, supervisor, chance
        self._later: list[threading.Timer] = []

    def do(self, fault: Fault) -> None:
        if fault.what == "redis":
            self._redis(fault)
            return
        role = "worker" if fault.what == "child" else fault.what
        key = (role, fault.site if role in OF_A_SITE else "here")
        program = self._supervisor.alive[key]
        if fault.what == "child":
            children = program.pool()
            if children:
                self._child(self._chance.choice(children), fault)
        elif fault.action == KILL:
            self._supervisor.kill(key, for_s=fault.lasts)
        else:
            program.send(signal.SIGSTOP)
            self._after(fault.lasts, lambda: program.send(signal.SIGCONT))

    def undo(self) -> None:
        for timer in self._later:
            timer.join()

    def _child(self, pid: int, fault: Fault) -> None:
        try:
            child = os.pidfd_open(pid)  # when it is told to go on, its number may be another's
        except ProcessLookupError:
            return
        _send(child, signal.SIGKILL if fault.action == KILL else signal.SIGSTOP)
        self._after(fault.lasts, lambda: _send_last(child, signal.SIGCONT))

    def _redis(self, fault: Fault) -> None:
        server = self._place.redis
        if fault.action == FLUSH:
            server.flush()
        elif fault.action == KILL:
            server.send(signal.SIGKILL)
            self._after(fault.lasts, server.start)
        else:
            server.send(signal.SIGSTOP)
            self._after(fault.lasts, lambda: server.send(signal.SIGCONT))

    def _after(self, seconds: float, act: Callable[[], object]) -> None:
        timer = threading.Timer(seconds, act)
        timer.start()
        self._later.append(timer)


def _send(pidfd: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


def _send_last(pidfd: int, number: signal.Signals) -> None:
    _send(pidfd, number)
    os.close(pidfd)
