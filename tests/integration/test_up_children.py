"""The processes that `blastdoor up` looks after: restarted when they die, given up when they keep dying."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.cli.up import children
from service.cli.up.children import Child, CrashLoop, Program, end_left_over
from service.cli.up.state import StateDirectory, open_state, process_identity

STUBBORN = (
    "import os, signal, time\n"
    "for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP): signal.signal(number, signal.SIG_IGN)\n"
    "os.fork()\n"
    "print(os.getpid(), flush=True)\n"
    "time.sleep(600)\n"
)


@pytest.fixture
def state(tmp_path: Path) -> Iterator[StateDirectory]:
    opened = open_state(tmp_path / "state")
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "FIRST_BACKOFF_S", 0.01)


def test_what_keeps_dying_is_given_up_with_the_end_of_its_log(state: StateDirectory) -> None:
    said: list[str] = []
    child = _child(state, "print('no such table: run', flush=True); raise SystemExit(7)")
    child.start()
    with pytest.raises(CrashLoop, match=r"(?s)exited with 7 and does not stay up.*no such table: run"):
        _revive_for_ever(child, said)
    assert len(said) == children.CRASHES - 1
    assert "no such table: run" in said[0]


def test_what_dies_once_is_started_again(state: StateDirectory) -> None:
    said: list[str] = []
    child = _child(state, "import time; time.sleep(600)")
    child.start()
    first = _pid(child)
    os.kill(first, signal.SIGKILL)
    _until(lambda: not child.alive)
    while not child.alive:
        child.revive(said.append)
        time.sleep(0.01)
    assert _pid(child) != first
    assert said[0].startswith("child was killed by signal 9; it starts again in 0.01 s")
    child.stop(said.append)


def test_what_ignores_every_signal_is_killed_with_what_it_started(state: StateDirectory) -> None:
    said: list[str] = []
    child = _child(state, STUBBORN, ladder=((signal.SIGTERM, 0.3),))
    child.start()
    _until(lambda: len(child.log.read_text().split()) == 2)
    pids = [int(word) for word in child.log.read_text().split()]
    child.stop(said.append)
    assert said == ["child did not end within 0.3 s of SIGTERM", "child is killed"]
    _until(lambda: not any(process_identity(pid) for pid in pids))


def test_who_is_in_a_hurry_does_not_wait_for_the_polite_signal(state: StateDirectory) -> None:
    child = _child(state, STUBBORN, ladder=((signal.SIGTERM, 60.0),))
    child.start()
    _until(lambda: len(child.log.read_text().split()) == 2)
    before = time.monotonic()
    child.stop(lambda words: None, hurry=lambda: True)
    assert time.monotonic() - before < 5
    assert not child.alive


def test_a_start_that_follows_a_killed_one_ends_what_that_left(state: StateDirectory) -> None:
    child = _child(state, "import time; time.sleep(600)")
    child.start()
    said: list[str] = []
    (left,) = state.left_over()
    end_left_over([left], said.append)
    assert not child.alive
    assert state.left_over() == []
    assert said == [f"child (pid {left.pid}) of an earlier `blastdoor up` is still there; it is ended"]
    assert child.status == -signal.SIGTERM


def test_a_configuration_by_standard_input_is_read_to_its_end(state: StateDirectory) -> None:
    program = Program("child", (sys.executable, "-c", "import sys; print(sys.stdin.read())"), {}, stdin=b"port 1\n" * 9)
    child = Child(program, state)
    child.start()
    _until(lambda: not child.alive)
    assert child.log.read_bytes() == b"port 1\n" * 9 + b"\n"
    assert child.status == 0


def _child(
    state: StateDirectory, code: str, ladder: tuple[tuple[signal.Signals, float], ...] = ((signal.SIGTERM, 10.0),)
) -> Child:
    return Child(Program("child", (sys.executable, "-c", code), {}, ladder=ladder), state)


def _revive_for_ever(child: Child, said: list[str]) -> None:
    while True:
        child.revive(said.append)
        time.sleep(0.01)


def _pid(child: Child) -> int:
    assert child._process is not None
    return child._process.pid


def _until(holds) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
