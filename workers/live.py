"""What a run tells while it goes on: progress, and output as it comes. A thread of its own carries it to the store.

Telling never costs the run anything: who drains the guest only adds to a bounded buffer; what does not fit, or is more
than is told live, is dropped and said to be `omitted`. What is still untold when a phase ends goes into the
transaction that ends it, so that the order holds and a short run pays for no write of its own.
"""

import codecs
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Literal

import structlog

from service.core.boundary import Listener
from service.core.errors import LeaseLost, StorageFull, Unavailable
from service.core.news import (
    MAX_RUN_BYTES,
    News,
    NewsKind,
    Stage,
    State,
    StreamName,
    pieces,
    render_output,
    render_progress,
)
from service.core.ports.publishing import Hints
from service.core.ports.runs import RunLine

MAX_UNTOLD_BYTES = 2**20
"""Of output that waits to be told: the database may be away."""
_MAX_TEXT = 1000
_NOTHING_DUE = float("inf")

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class LiveTimes:
    """`first`: for how long output is gathered when nothing was told for a while; `then`: how often it is told from
    there on, and the longest that progress waits. Seconds."""

    first: float = 0.05
    then: float = 0.25


@dataclass
class _Voice:
    """One stream of one step. `left_bytes` of it may still be told; `cut`: no more is heard; `said_cut`: and that is
    told."""

    step: int
    stream: StreamName
    left_bytes: int
    cut: bool = False
    said_cut: bool = False
    seq: int = 0
    decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")(errors="replace")
    )


@dataclass
class _Heard:
    """Bytes of a voice. `last`: the step is over; `cut`: what followed these was dropped."""

    voice: _Voice
    data: bytearray = field(default_factory=bytearray)
    last: bool = False
    cut: bool = False


class Live:
    """Of one run under one fence, from its claim to its end. `head_bytes`: how much of each stream is told.

    For three threads: the one that plays (`progress`, `step`, `ending_phase`), the one that drains the guest (it may
    be the same), and ours. `_ear` is held for a moment only; `_mouth` while the store is written.
    """

    def __init__(
        self,
        runs: RunLine,
        hints: Hints,
        *,
        run_id: str,
        fence: int,
        head_bytes: int,
        times: LiveTimes = LiveTimes(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runs, self._hints, self._run_id, self._fence = runs, hints, run_id, fence
        self._head_bytes, self._times, self._clock = head_bytes, times, clock
        self._ear, self._mouth = threading.Condition(), threading.Lock()
        self._heard: deque[_Heard | str] = deque()
        self._heard_bytes = 0
        self._due = self._wakes_at = _NOTHING_DUE
        self._told_at = -_NOTHING_DUE
        self._silent = self._closed = self._failing = False
        # under `_mouth`
        self._k = 0
        self._untold: list[News] = []
        self._untold_bytes = 0
        self._told_bytes = 0
        self._max_bytes = MAX_RUN_BYTES
        self._thread = threading.Thread(target=self._keep_telling, name=f"live-{run_id}", daemon=True)

    def __enter__(self) -> "Live":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._ear:
            self._closed = True
            self._ear.notify_all()
        self._thread.join(timeout=1.0)  # it may hang in a database that hangs, and has nothing more to do

    def keep_within(self, room_bytes: int) -> None:
        """What is told live is stored, and counts as the tenant's: there is room for no more."""
        self._max_bytes = max(0, min(MAX_RUN_BYTES, room_bytes))

    def progress(
        self, stage: Stage, state: State, *, step: int | None = None, steps: int | None = None, name: str | None = None,
        text: str | None = None,
    ) -> None:  # fmt: skip
        said = render_progress(
            at=datetime.now(UTC), stage=stage, state=state, step=step, steps=steps, name=name,
            text=text[:_MAX_TEXT] if text else None,
        )  # fmt: skip
        with self._ear:
            self._heard.append(said)
            self._become_due(self._clock() + self._times.then)

    @contextmanager
    def step(self, n: int) -> Iterator[Listener]:
        """What hears the step's output. When the block ends, there is no more of it."""
        voices: dict[Literal["stdout", "stderr"], _Voice] = {
            "stdout": _Voice(n, "stdout", self._head_bytes),
            "stderr": _Voice(n, "stderr", self._head_bytes),
        }
        try:
            yield lambda stream, chunk: self._hear(voices[stream], chunk)
        finally:
            with self._ear:
                self._heard.extend(_Heard(voice, last=True) for voice in voices.values())

    @contextmanager
    def ending_phase(self) -> Iterator[tuple[News, ...]]:
        """What is still to be told of the phase that the block ends, in the same transaction."""
        with self._mouth:
            self._take()
            yield tuple(self._untold)
            self._told()
            self._k = 0

    def _hear(self, voice: _Voice, chunk: bytes) -> None:
        if voice.cut or self._silent:
            return
        with self._ear:
            newest = self._heard[-1] if self._heard else None
            if not isinstance(newest, _Heard) or newest.voice is not voice:
                newest = _Heard(voice)
                self._heard.append(newest)
            room = max(min(voice.left_bytes, MAX_UNTOLD_BYTES - self._heard_bytes - self._untold_bytes), 0)
            newest.data += chunk[:room]
            newest.cut = voice.cut = len(chunk) > room
            voice.left_bytes -= min(len(chunk), room)
            self._heard_bytes += min(len(chunk), room)
            now = self._clock()
            self._become_due(max(now + self._times.first, self._told_at + self._times.then))

    def _become_due(self, at: float) -> None:
        """Our thread is woken only when it would sleep too long: most of what is heard can wait until it looks."""
        self._due = min(self._due, at)
        if self._due < self._wakes_at:
            self._wakes_at = self._due
            self._ear.notify_all()

    def _keep_telling(self) -> None:
        try:
            while self._wait():
                with self._mouth:
                    self._take()
                    self._tell()
        except LeaseLost:
            self._fall_silent()  # the watch sees it, too; the run's end is not ours to decide
        except Exception:
            log.exception("live output ends here; the run goes on", run_id=self._run_id)
            self._fall_silent()

    def _wait(self) -> bool:
        """Until something is due. -> False when the run is over."""
        with self._ear:
            while not self._closed:
                now = self._clock()
                if self._due <= now:
                    self._due = _NOTHING_DUE
                    return True
                self._wakes_at = min(self._due, now + self._times.then)
                self._ear.wait(self._wakes_at - now)
            return False

    def _tell(self) -> None:
        """Raises LeaseLost. A store that cannot be written now is asked again, for as long as the run goes on."""
        if not self._untold:
            return
        self._told_at = self._clock()
        try:
            self._runs.append_news(self._run_id, self._fence, tuple(self._untold))
        except (Unavailable, StorageFull) as error:
            if not self._failing:
                log.warning("cannot tell now; again in a moment", run_id=self._run_id, error=str(error))
            self._failing = True
            with self._ear:
                self._become_due(self._clock() + self._times.then)
            return
        self._failing = False
        self._told()
        self._hints.hint("news", self._run_id)

    def _told(self) -> None:
        self._untold.clear()
        with self._ear:
            self._untold_bytes = 0

    def _take(self) -> None:
        """What was heard becomes what is to be told."""
        with self._ear:
            heard, self._heard = self._heard, deque()
            self._untold_bytes += self._heard_bytes
            self._heard_bytes = 0
            self._due = _NOTHING_DUE
        if self._silent:
            return
        for one in heard:
            if isinstance(one, str):
                self._add(NewsKind.PROGRESS, one)
            else:
                self._say(one)

    def _say(self, heard: _Heard) -> None:
        voice = heard.voice
        if voice.said_cut:
            return
        cut = heard.cut
        for piece in pieces(voice.decoder.decode(heard.data, heard.last)):
            said = render_output(step=voice.step, stream=voice.stream, seq=voice.seq, text=piece)
            if self._told_bytes + len(said) > self._max_bytes:
                cut = voice.cut = True
                break
            self._add(NewsKind.OUTPUT, said)
            self._told_bytes += len(said)
            voice.seq += 1
        if cut:
            voice.said_cut = True
            said = render_output(step=voice.step, stream=voice.stream, seq=voice.seq, text="", omitted=True)
            self._add(NewsKind.OUTPUT, said)

    def _add(self, kind: NewsKind, data: str) -> None:
        self._k += 1
        self._untold.append(News(k=self._k, kind=kind, data=data))

    def _fall_silent(self) -> None:
        """For good. What could not be told must not come to the transactions that the run depends on."""
        self._silent = True
        with self._mouth:
            self._untold.clear()
