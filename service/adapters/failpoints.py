"""Failpoints that do something: the process ends, stops, or fails where a test wants it to."""

import mmap
import os
import signal
import struct
import threading
from typing import Literal

import structlog

from service.core.failpoints import Action, Armed, Failpoint, FailpointReached, install, parse

EXIT_STATUS = 70
_log = structlog.get_logger()


def arm(spec: str, *, environment: Literal["production", "development", "test"]) -> None:
    """As `Settings.failpoints` says; nothing for an empty one. Raises ValueError where the environment is not test."""
    armed = parse(spec)
    if not armed:
        return
    if environment != "test":
        raise ValueError("failpoints exist only where environment=test")
    install(_Failpoints(armed).reached)


class _Failpoints:
    """The n-th time counts over this process and all that it forks: a worker's children are one program."""

    def __init__(self, armed: tuple[Armed, ...]) -> None:
        self._armed = {one.point: (place, one) for place, one in enumerate(armed)}
        self._counts = mmap.mmap(-1, max(len(armed), 1) * 8)
        self._counting = threading.Lock()

    def reached(self, point: Failpoint) -> None:
        found = self._armed.get(point)
        if found is None:
            return
        place, armed = found
        if armed.nth and self._count(place) != armed.nth:
            return
        _log.warning("failpoint_reached", failpoint=str(point), action=str(armed.action), pid=os.getpid())
        act(armed)

    def _count(self, place: int) -> int:
        with self._counting:
            count = int(struct.unpack_from("q", self._counts, place * 8)[0]) + 1
            struct.pack_into("q", self._counts, place * 8, count)
            return count


def act(armed: Armed) -> None:
    if armed.action is Action.EXIT:
        os._exit(EXIT_STATUS)
    if armed.action is Action.STOP:
        os.kill(os.getpid(), signal.SIGSTOP)
        return
    raise FailpointReached(str(armed.point))
