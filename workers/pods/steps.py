"""Plays one step in a pod. Its end is what the node's kubelet says of our program, which watches the step's process and
takes its status over; the report on our program's own stream tells a signal from an exit status above 128, and both
must agree. Where they do not, nothing passed.

What the API server is late with is not held against the guest: when a step's time is over, the API server is asked
first, and what it still brings is judged by the pod's own clock.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from service.core.boundary import Cancellation, Ended, Execution, Limit, Listener, StepSpec
from service.core.controls import Limits
from service.core.errors import BoundaryLost
from workers.capture import HeadAndTail
from workers.kube import ClusterError, ExecEnded
from workers.pods.pod import (
    ENDED_FROM_WITHIN,
    KILLED,
    Pod,
    ended_by,
    ended_from_within,
    is_over,
    shown,
)
from workers.pods.protocol import Frames, Garbled, Report, step_request

_OUTPUT_FACTOR = 64
"""A run that prints so many times its limit is ended."""
_TOLD_WITHIN_S = 15.0
"""The kubelet looks at its containers once a second, and tells the API server when it comes to it."""
_QUICK_S = 1.0
_LATE_S, _VERY_LATE_S = 0.2, 3.0
"""What an API server may still bring of a step whose time is over: one that answers as ever, and one that was away."""
_PATIENCE_S = 120.0
"""Beyond a step's time, for all that an API server is late with, the beginning included."""
_CHUNK = 256 * 1024
_E2BIG = 7


@dataclass
class Guest:
    """What the steps of one run share."""

    pod: Pod
    limits: Limits
    cancelled: Cancellation
    wall_ends_at: float
    alive: bool = True
    printed_bytes: int = 0
    cpu_s: float = 0.0
    peak_bytes: int = 0
    oom_kills: int = 0

    def end(self) -> None:
        """Whatever of it runs. What resists goes with its pod."""
        self.alive = False
        try:
            self.pod.kill_guest()
        except BoundaryLost:
            self.delete_pod()

    def delete_pod(self) -> None:
        """Raises BoundaryLost."""
        try:
            self.pod.cluster.delete("Pod", self.pod.name, self.pod.namespace, uid=self.pod.uid, grace_s=1)
        except ClusterError as error:
            raise BoundaryLost(f"the pod cannot be ended: {error}") from error


def play(guest: Guest, step: StepSpec, *, listener: Listener | None = None) -> Execution:
    """Run the step to its end, and see to it that it has ended. Raises BoundaryLost when that cannot be had."""
    return _Play(guest, step, listener).run()


class _Play:
    def __init__(self, guest: Guest, step: StepSpec, listener: Listener | None) -> None:
        self._guest, self._step = guest, step
        limit = guest.limits.output
        self._stdout = HeadAndTail(limit, tell=partial(listener, "stdout") if listener else None)
        self._stderr = HeadAndTail(limit, tell=partial(listener, "stderr") if listener else None)
        self._frames = Frames({"o": partial(self._hear, self._stdout), "e": partial(self._hear, self._stderr)})
        self._garbled: Garbled | None = None
        self._over: Ended | None = None
        self._limits: set[Limit] = set()
        self._message = ""
        self._exit_code: int | None = None
        self._signal: int | None = None
        self._began_at = 0.0
        self._ends_at = self._may_take_s = float("inf")
        self._told_until: float | None = None
        """Once its time is over: until when its end may still be told."""

    def run(self) -> Execution:
        request = step_request(self._step, self._guest.limits)
        if request is None:
            self._message = os.strerror(_E2BIG)
            return self._execution(Ended.NOT_STARTED, 0.0)
        self._begin()
        try:
            ended = self._guest.pod.command(
                "step", stdin=_chunks(request, self._step.stdin), on_output=self._take, stop=self._is_over,
                deadline=self._ends_at + _PATIENCE_S, begins=self._begin,
            )  # fmt: skip
        except ClusterError as error:
            ended = ExecEnded("lost", message=str(error))
        duration_s = time.monotonic() - self._began_at
        why = self._why(ended)
        report = self._frames.report
        if why is Ended.EXITED and report is not None and duration_s - report.took_s > _QUICK_S:
            duration_s = report.took_s  # the rest is the API server's
        if why in (Ended.STEP_TIMEOUT, Ended.WALL_TIMEOUT):
            self._clear()
        elif why not in (Ended.EXITED, Ended.NOT_STARTED, Ended.BROKEN):
            self._guest.end()
        return self._execution(why, duration_s)

    def _begin(self) -> None:
        """Its time counts from here: again from when the API server takes it, should that have been away."""
        self._began_at = time.monotonic()
        self._may_take_s = min(self._step.timeout_s, self._guest.wall_ends_at - self._began_at)
        self._ends_at = self._began_at + self._may_take_s

    def _take(self, stream: str, data: bytes) -> None:
        """Our program says nothing on stderr; the container runtime may, when it cannot start it."""
        if stream == "stderr":
            self._message = (self._message + data.decode("utf-8", "replace"))[:500]
            return
        try:
            self._frames.feed(data)
        except Garbled as error:
            self._garbled = error

    def _hear(self, stream: HeadAndTail, data: bytes) -> None:
        stream.add(data)
        self._guest.printed_bytes += len(data)

    def _is_over(self) -> bool:
        """Asked all the time: whether something of ours ends the step."""
        now = time.monotonic()
        if self._garbled is not None:
            self._over = Ended.LOST
        elif self._has_printed_too_much() or self._has_too_many_files():
            self._over = Ended.LIMIT
        elif self._guest.cancelled.is_set():
            self._over = Ended.CANCELLED
        elif now >= self._ends_at:
            self._over = self._late(now)
        return self._over is not None

    def _late(self, now: float) -> Ended | None:
        """The time is over: for a guest that goes on, and not only for one whose end we were not told."""
        if self._told_until is None:
            try:
                there = self._guest.pod.read() is not None
            except ClusterError as error:
                self._message = f"the step's time was over, and the API server was away: {error}"
                return Ended.LOST
            answered = time.monotonic()
            # One that is gone has ended its connection, or is about to.
            quick = there and answered - now < _QUICK_S
            self._told_until = answered + (_LATE_S if quick else _VERY_LATE_S)
        return self._timeout() if now >= self._told_until else None

    def _timeout(self) -> Ended:
        return Ended.WALL_TIMEOUT if self._ends_at >= self._guest.wall_ends_at else Ended.STEP_TIMEOUT

    def _why(self, ended: ExecEnded) -> Ended:
        if self._over is not None or ended.why == "deadline":
            self._message = str(self._garbled or self._message)
            return self._over or self._timeout()
        report = self._frames.report
        if ended.why == "exited" and report is not None and ended.exit_code == report.status:
            return self._reported(report)
        return self._unreported(ended)

    def _reported(self, report: Report) -> Ended:
        guest = self._guest
        guest.cpu_s += report.cpu_s
        guest.peak_bytes = max(guest.peak_bytes, report.peak_bytes or 0)
        if report.disk_full:
            self._limits.add(Limit.DISK)
        if report.tasks >= guest.limits.pids:
            self._limits.add(Limit.PIDS)
        if (report.oom_kills or 0) > guest.oom_kills:
            self._limits.add(Limit.MEMORY)
            return Ended.LIMIT
        if self._told_until is not None and report.took_s >= self._may_take_s:
            return self._timeout()
        if self._has_printed_too_much() or self._has_too_many_files():
            return Ended.LIMIT
        if report.not_started is not None:
            self._message = f"{self._step.argv[0]}: {os.strerror(report.not_started)}"
            return Ended.NOT_STARTED
        self._message = ""
        self._exit_code, self._signal = report.exited, report.signalled
        return Ended.EXITED

    def _has_printed_too_much(self) -> bool:
        """Also when it has ended by itself before that was looked at."""
        if self._guest.printed_bytes > _OUTPUT_FACTOR * self._guest.limits.output:
            self._limits.add(Limit.OUTPUT)
        return Limit.OUTPUT in self._limits

    def _has_too_many_files(self) -> bool:
        """No volume of a pod can refuse a file for their number: they are counted ten times a second, and above the
        limit the run is ended, also when it is seen only as the step ends."""
        if self._frames.files > self._guest.limits.files:
            self._limits.add(Limit.FILES)
        return Limit.FILES in self._limits

    def _unreported(self, ended: ExecEnded) -> Ended:
        """Our program ended without a word, or was contradicted. Who ended it: the node, for want of memory or because
        somebody deleted the pod; else the guest, which may send signals to what has its uid."""
        try:
            pod = self._guest.pod.await_end(within_s=_TOLD_WITHIN_S)
        except (BoundaryLost, ClusterError):  # it goes on, or nobody can say
            if ended.why == "exited" and ended.exit_code == KILLED:
                self._message = "the guest killed the process that watched the step"
                self._clear()
                return Ended.BROKEN
            pod = self._last_seen()
        if pod is not None and ended_by(pod) == "OOMKilled":
            self._limits.add(Limit.MEMORY)
            return Ended.LIMIT
        if pod is not None and ended_from_within(pod):
            self._guest.alive, self._message = False, ENDED_FROM_WITHIN
            return Ended.BROKEN
        over = f"the pod ended: {ended_by(pod) or 'for no reason given'}" if pod and is_over(pod) else ""
        self._message = over or f"the step was lost: {self._message or shown(ended)}"
        return Ended.LOST

    def _last_seen(self) -> dict[str, object] | None:
        try:
            return self._guest.pod.read()
        except ClusterError:
            return None

    def _clear(self) -> bool:
        """End what the step left; the pod stays usable when that came true."""
        try:
            self._guest.pod.kill_guest()
        except BoundaryLost:
            self._guest.end()
        return self._guest.alive

    def _execution(self, ended: Ended, duration_s: float) -> Execution:
        report = self._frames.report
        return Execution(
            ended=ended,
            exit_code=self._exit_code,
            signal=self._signal,
            message="".join(char if char.isprintable() else "\ufffd" for char in self._message),
            duration_s=duration_s,
            cpu_s=report.cpu_s if report is not None else 0.0,
            stdout=self._stdout.capture(),
            stderr=self._stderr.capture(),
            limits=frozenset(self._limits),
            sandbox_alive=self._guest.alive,
        )


def _chunks(request: bytes, stdin: bytes) -> Iterator[bytes]:
    yield request
    for start in range(0, len(stdin), _CHUNK):
        yield stdin[start : start + _CHUNK]
