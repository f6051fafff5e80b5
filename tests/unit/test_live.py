"""What a run tells while it goes on: gathered, cut, numbered, and never in the run's way."""

import json
import threading
import time
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from service.adapters.memory import MemoryHints, MemoryStore
from service.core.boundary import Listener
from service.core.errors import BlastdoorError, LeaseLost, StorageFull, Unavailable
from service.core.news import MAX_DATA_BYTES, MAX_RUN_BYTES, News, one_line, pieces
from service.core.run import Outcome, Phase
from tests.contract.store_steps import add_run, add_tenant, bring_to
from tests.scenes import Theatre, eventually, steps
from workers.live import MAX_UNTOLD_BYTES, Live, LiveTimes

HEAD = 512 * 1024
NEVER = 10_000.0
TIMES = LiveTimes(first=0.05, then=0.25)


@pytest.fixture(autouse=True)
def logged() -> Iterator[list[MutableMapping[str, Any]]]:
    with structlog.testing.capture_logs() as entries:
        yield entries


class HandClock:
    """Moves only when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Store(MemoryStore):
    """Remembers each append; `fails` are raised first, one each time; `hangs` holds it up until it is set again."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[Sequence[News]] = []
        self.asked = 0
        self.fails: list[Exception] = []
        self.free = threading.Event()
        self.free.set()

    def append_news(self, run_id: str, fence: int, news: Sequence[News]) -> None:
        self.asked += 1
        self.free.wait(10)
        if self.fails:
            raise self.fails.pop(0)
        super().append_news(run_id, fence, news)
        self.batches.append(news)


@dataclass
class Scene:
    store: Store = field(default_factory=Store)
    hints: MemoryHints = field(default_factory=MemoryHints)
    clock: HandClock = field(default_factory=HandClock)
    times: LiveTimes = TIMES
    head: int = HEAD

    def __post_init__(self) -> None:
        add_tenant(self.store)
        add_run(self.store)
        held = bring_to(self.store, Phase.RUNNING)
        self.run_id, self.fence = held.run.id, held.fence
        self.live = Live(
            self.store, self.hints, run_id=self.run_id, fence=self.fence, head_bytes=self.head, times=self.times,
            clock=self.clock,
        )  # fmt: skip

    def pass_time(self, seconds: float) -> None:
        """Let the flusher see it."""
        self.clock.now += seconds
        with self.live._ear:
            self.live._ear.notify_all()

    def end_phase(self) -> list[dict[str, Any]]:
        """Without the flusher: all that was heard goes into the change. -> what was told of the phase."""
        with self.live.ending_phase() as news:
            self.store.mark_collecting(self.run_id, self.fence, news=news)
        return self.told()

    def told(self) -> list[dict[str, Any]]:
        found = self.store.read_news(self.run_id, None, after=(0, 0), limit=100_000).news
        assert [one.k for one in found if one.seq == 3] == list(range(1, len([o for o in found if o.seq == 3]) + 1))
        return [json.loads(one.data) for one in found]


def texts(told: Sequence[dict[str, Any]], stream: str = "stdout", step: int = 1) -> str:
    return "".join(one["text"] for one in told if one.get("stream") == stream and one["step"] == step)


@contextmanager
def flushing(scene: Scene) -> Iterator[Listener]:
    with scene.live, scene.live.step(1) as hear:
        yield hear


# --- decoding and cutting --------------------------------------------------------------------------------------------


@given(st.text(), st.lists(st.integers(1, 7), min_size=1))
def test_text_arrives_whole_however_its_bytes_are_cut(text: str, sizes: list[int]) -> None:
    scene, data, at = Scene(), text.encode("utf-8", "replace"), 0
    with scene.live.step(1) as hear:
        while at < len(data):
            size = sizes[at % len(sizes)]
            hear("stdout", data[at : at + size])
            scene.live._take()  # as if the flusher had come between any two
            at += size

    assert texts(scene.end_phase()) == data.decode()


@given(st.binary(max_size=300), st.integers(1, 5))
def test_bytes_that_are_no_text_are_replaced_as_all_at_once(data: bytes, size: int) -> None:
    scene = Scene()
    with scene.live.step(1) as hear:
        for at in range(0, len(data), size):
            hear("stderr", data[at : at + size])
            scene.live._take()

    assert texts(scene.end_phase(), "stderr") == data.decode("utf-8", "replace")


@given(st.text(max_size=3000), st.integers(64, 600))
def test_pieces_are_all_of_the_text_and_none_is_too_long(text: str, most: int) -> None:
    cut = list(pieces(text, max_bytes=most))

    assert "".join(cut) == text
    assert all(cut)
    assert max((len(one_line(piece)) for piece in cut), default=0) <= most


def test_what_is_told_is_one_line_of_ascii_of_a_bounded_size() -> None:
    scene = Scene()
    with scene.live.step(1) as hear:
        hear("stdout", b"\0" * 100_000 + "\u2028\x85\U0001d11e\n".encode() * 5000)
    with scene.live.ending_phase() as news:
        assert len(news) > 30
        for one in news:
            assert one.data.isascii()
            assert len(one.data.splitlines()) == 1
            assert len(one.data) <= MAX_DATA_BYTES


def test_each_stream_counts_its_own_from_zero_in_each_step() -> None:
    scene = Scene()
    for n in (1, 2):
        with scene.live.step(n) as hear:
            for stream, text in (("stdout", b"a"), ("stderr", b"b"), ("stdout", b"c"), ("stdout", b"d")):
                hear(stream, text)  # type: ignore[arg-type]

    assert [(one["step"], one["stream"], one["seq"], one["text"]) for one in scene.end_phase()] == [
        (n, stream, seq, text)
        for n in (1, 2)
        for stream, seq, text in (("stdout", 0, "a"), ("stderr", 0, "b"), ("stdout", 1, "cd"))
    ]


def test_a_stream_is_told_up_to_its_head_and_then_said_to_be_omitted_once() -> None:
    scene = Scene(head=1000)
    with scene.live.step(1) as hear:
        hear("stdout", b"A" * 600)
        hear("stdout", b"A" * 600)
        hear("stdout", b"A" * 600)
        hear("stderr", b"B" * 1000)
    with scene.live.step(2) as hear:
        hear("stdout", b"C")

    told = scene.end_phase()
    assert texts(told) == "A" * 1000
    assert texts(told, "stderr") == "B" * 1000
    assert texts(told, step=2) == "C"
    assert [(one["step"], one["stream"], one["text"]) for one in told if one.get("omitted")] == [(1, "stdout", "")]
    assert [one["seq"] for one in told if one["stream"] == "stdout" and one["step"] == 1] == [0, 1]


def test_a_character_that_the_cut_falls_into_is_left_out() -> None:
    scene = Scene(head=1000)
    with scene.live.step(1) as hear:
        hear("stdout", b"A" * 999 + "é".encode())

    told = scene.end_phase()
    assert texts(told) == "A" * 999
    assert told[-1]["omitted"] is True


def test_a_run_tells_no_more_than_its_share_in_all() -> None:
    scene = Scene()
    for n in range(1, 31):
        with scene.live.step(n) as hear:
            for _ in range(4):
                hear("stdout", b"\0" * 65536)
        with scene.live._mouth:
            scene.live._take()
            scene.live._tell()

    told = scene.end_phase()
    stored = sum(len(one.data) for one in scene.store.read_news(scene.run_id, None, after=(0, 0), limit=10**6).news)
    assert MAX_RUN_BYTES - 2 * MAX_DATA_BYTES < stored < MAX_RUN_BYTES + 30 * 200
    cut = [one["step"] for one in told if one.get("omitted")]
    assert cut == list(range(cut[0], 31)), "every stream that was cut says so, once"


def test_a_tenant_without_room_is_told_nothing_live_but_that() -> None:
    scene = Scene()
    for n, room in ((1, 200), (2, 0), (3, -5)):
        scene.live.keep_within(room)
        with scene.live.step(n) as hear:
            hear("stdout", b"A" * (100 if n == 1 else 1))
        with scene.live._mouth:
            scene.live._take()

    told = scene.end_phase()
    assert [(one["step"], one["text"], one.get("omitted", False)) for one in told] == [
        (1, "A" * 100, False), (2, "", True), (3, "", True),
    ]  # fmt: skip


def test_what_waits_to_be_told_is_bounded_and_the_rest_is_said_to_be_omitted() -> None:
    scene = Scene(head=10 * MAX_UNTOLD_BYTES)
    with scene.live.step(1) as hear:
        for _ in range(40):
            hear("stdout", b"A" * 65536)

    told = scene.end_phase()
    assert len(texts(told)) == MAX_UNTOLD_BYTES
    assert told[-1]["omitted"] is True


# --- when it is told -------------------------------------------------------------------------------------------------


def test_a_run_that_prints_nothing_and_is_short_writes_nothing_of_its_own() -> None:
    scene = Scene()
    with flushing(scene):
        scene.live.progress("step", "started", step=1, steps=1, name="only")
        scene.pass_time(0.24)
        time.sleep(0.02)
        assert len(scene.end_phase()) == 1

    assert scene.store.asked == 0


def test_progress_alone_waits_for_longer_and_is_told_then() -> None:
    scene = Scene()
    with flushing(scene):
        scene.live.progress("step", "started", step=1, steps=1, name="only", text="x" * 5000)
        scene.pass_time(0.26)
        eventually(lambda: len(scene.store.batches) == 1)

    (told,) = scene.told()
    assert told | {"at": None} == {
        "at": None, "stage": "step", "state": "started", "step": 1, "steps": 1, "name": "only", "text": "x" * 1000,
    }  # fmt: skip
    assert told["at"].endswith("Z")


def test_the_first_output_is_gathered_for_a_moment_and_what_follows_for_longer() -> None:
    scene = Scene()
    with flushing(scene) as hear:
        hear("stdout", b"a")
        hear("stdout", b"b")
        scene.pass_time(0.049)
        time.sleep(0.02)
        assert scene.store.asked == 0
        scene.pass_time(0.002)
        eventually(lambda: len(scene.store.batches) == 1)
        assert texts(scene.told()) == "ab"
        assert scene.hints.given[-1] == ("news", scene.run_id)

        hear("stdout", b"c")
        scene.pass_time(0.2)
        time.sleep(0.02)
        assert len(scene.store.batches) == 1
        scene.pass_time(0.06)
        eventually(lambda: len(scene.store.batches) == 2)

        scene.clock.now += 10
        hear("stdout", b"d")
        scene.pass_time(0.051)
        eventually(lambda: len(scene.store.batches) == 3)
        assert texts(scene.told()) == "abcd"


def test_what_is_untold_goes_with_the_change_of_phase_and_the_next_phase_counts_anew() -> None:
    scene = Scene()
    with flushing(scene) as hear:
        hear("stdout", b"a")
        scene.pass_time(0.06)
        eventually(lambda: len(scene.store.batches) == 1)
        hear("stdout", b"b")
        scene.end_phase()
        scene.live.progress("collect", "started")
        with scene.live.ending_phase() as news:
            assert [one.k for one in news] == [1]
    assert texts(scene.told()) == "ab"
    assert scene.store.asked == 1


# --- what may go wrong, and costs the run nothing --------------------------------------------------------------------


@pytest.mark.parametrize("error", [Unavailable("away"), StorageFull("full")], ids=["away", "full"])
def test_a_store_that_is_away_for_a_moment_is_told_all_of_it_later(
    error: Exception, logged: list[MutableMapping[str, Any]]
) -> None:
    scene = Scene()
    scene.store.fails = [error, error]
    with flushing(scene) as hear:
        hear("stdout", b"a")
        for _ in range(2):
            asked = scene.store.asked
            scene.pass_time(0.3)
            eventually(lambda asked=asked: scene.store.asked == asked + 1)  # type: ignore[misc]
            eventually(lambda: scene.live._due < NEVER)
        hear("stdout", b"b")
        scene.pass_time(0.3)
        eventually(lambda: len(scene.store.batches) == 1)

    assert texts(scene.told()) == "ab"
    assert [entry["log_level"] for entry in logged] == ["warning"], "said once"


def test_an_append_whose_answer_was_lost_is_not_told_twice() -> None:
    scene = Scene()
    with flushing(scene) as hear:
        hear("stdout", b"a")
        with scene.live._mouth:
            scene.live._take()
            scene.store.append_news(scene.run_id, scene.fence, tuple(scene.live._untold))  # and nobody learns of it
        hear("stdout", b"b")

        assert texts(scene.end_phase()) == "ab"


def test_a_store_that_hangs_never_holds_up_who_drains_the_guest() -> None:
    scene = Scene()
    scene.store.free.clear()
    with flushing(scene) as hear:
        hear("stdout", b"a")
        scene.pass_time(1)
        eventually(lambda: scene.store.asked == 1)
        began = time.monotonic()
        for _ in range(1000):
            hear("stdout", b"A" * 65536)
        scene.live.progress("step", "passed", step=1)
        took_s = time.monotonic() - began
        scene.store.free.set()

    assert took_s < 5, "the store held it up for ten"


def test_a_lost_lease_ends_the_telling_and_is_for_the_watch_to_judge() -> None:
    scene = Scene()
    scene.store.fails = [LeaseLost("gone")]
    with flushing(scene) as hear:
        hear("stdout", b"a")
        scene.pass_time(1)
        eventually(lambda: not scene.live._thread.is_alive())
        hear("stdout", b"b")
        with scene.live.ending_phase() as news:
            assert news == ()


def test_a_defect_in_the_telling_is_said_and_kept_out_of_the_runs_own_writes(
    logged: list[MutableMapping[str, Any]],
) -> None:
    scene = Scene()
    scene.store.fails = [BlastdoorError("the database refused a statement")]
    with flushing(scene) as hear:
        hear("stdout", b"a")
        scene.pass_time(1)
        eventually(lambda: not scene.live._thread.is_alive())
        assert scene.end_phase() == []

    assert [entry["log_level"] for entry in logged] == ["error"]


# --- a whole run -----------------------------------------------------------------------------------------------------


def told_of(theatre: Theatre, run_id: str) -> list[tuple[int, dict[str, Any]]]:
    found = theatre.store.read_news(run_id, None, after=(0, 0), limit=1000).news
    return [(one.seq, json.loads(one.data)) for one in found]


def in_short(said: dict[str, Any]) -> str:
    if "stream" in said:
        return f"{said['step']} {said['stream']} {said['text']}"
    return " ".join(str(said[name]) for name in ("stage", "step", "state") if said[name] is not None)


def test_a_run_tells_what_it_does_in_the_phase_in_which_it_does_it() -> None:
    theatre = Theatre()
    run = theatre.play(steps(["print", "hello"], ["exit", "3"], ["print", "never"]))

    told = told_of(theatre, run.id)
    assert [(seq, in_short(said)) for seq, said in told] == [
        (2, "boundary started"), (2, "boundary done"),
        (3, "step 1 started"), (3, "1 stdout hello"), (3, "step 1 passed"),
        (3, "step 2 started"), (3, "step 2 failed"), (3, "step 3 skipped"),
        (4, "collect started"), (4, "collect done"),
    ]  # fmt: skip
    assert {said["steps"] for _, said in told if said.get("stage") == "step"} == {3}
    assert told[0][1]["text"] == "gvisor"
    assert "expected 0, got 3" in told[6][1]["text"]


def test_output_is_told_while_the_step_still_runs() -> None:
    seen: list[str] = []

    def silence(_: float) -> None:
        (run,) = theatre.store.list_runs(None, phase=None, outcome=None, limit=1, before=None).items
        assert run.phase is Phase.RUNNING
        eventually(lambda: any(said.get("text") == "first" for _, said in told_of(theatre, run.id)))
        seen.extend(in_short(said) for _, said in told_of(theatre, run.id))

    theatre = Theatre()
    theatre.stage.behind._sleep = silence
    run = theatre.play(steps(["talk", "first", "1", "second"]))

    assert run.outcome is Outcome.PASSED
    assert seen[-1] == "1 stdout first"
    assert [in_short(said) for _, said in told_of(theatre, run.id)][4:6] == ["1 stdout second", "step 1 passed"]


def test_a_run_whose_news_cannot_be_stored_comes_to_what_it_would() -> None:
    class Full(MemoryStore):
        def append_news(self, run_id: str, fence: int, news: Sequence[News]) -> None:
            raise BlastdoorError("the database refused a statement")

    def silence(_: float) -> None:
        eventually(lambda: not any(t.name.startswith("live-") for t in threading.enumerate()))

    theatre = Theatre(store=Full())
    theatre.stage.behind._sleep = silence
    run = theatre.play(steps(["talk", "first", "1", "second"]))

    assert run.outcome is Outcome.PASSED
    assert run.steps[0].stdout.text == "firstsecond"


def test_no_thread_is_left_behind() -> None:
    Theatre().play(steps(["print", "hello"]))

    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("live-")]
