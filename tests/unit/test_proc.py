"""Processes of ours: explicit environment, a time limit, capped output, and nothing inherited."""

import os
import sys
import time
from pathlib import Path

import pytest

from workers.proc import ProcessFailed, follow, run


def python(program: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", program]


def test_it_inherits_neither_environment_nor_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_SECRET", "canary")
    read_fd, write_fd = os.pipe()
    os.set_inheritable(write_fd, True)
    seen = run(python("import os; print(sorted(os.environ), len(os.listdir('/proc/self/fd')))"), timeout_s=10)
    os.close(read_fd)
    os.close(write_fd)
    assert "WORKER_SECRET" not in seen.text
    assert seen.text.strip().endswith("4"), "0, 1, 2 and the listing itself"


def test_status_and_streams_are_separate() -> None:
    ended = run(python("import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"), timeout_s=10)
    assert (ended.status, ended.stdout, ended.stderr, ended.truncated) == (3, b"out\n", b"err\n", False)


def test_output_is_capped_and_the_rest_is_read_away() -> None:
    ended = run(python("print('A' * 1000000)"), timeout_s=10, max_output=1000)
    assert (ended.status, len(ended.stdout), ended.truncated) == (0, 1000, True)


def test_what_takes_too_long_is_killed() -> None:
    started = time.monotonic()
    with pytest.raises(ProcessFailed, match="did not end"):
        run(python("import time; time.sleep(60)"), timeout_s=0.2)
    assert time.monotonic() - started < 5


def test_what_is_not_there_is_said() -> None:
    with pytest.raises(ProcessFailed, match="could not be started"):
        run(["/nonexistent"], timeout_s=1)


def test_what_a_program_says_is_told_as_it_says_it_and_the_last_of_it_is_kept() -> None:
    told: list[str] = []
    program = "import sys; sys.stderr.write('one\\ntw'); sys.stderr.flush(); sys.stderr.write('o\\nlast'); sys.exit(3)"
    ended = follow(python(program), env={}, timeout_s=10, tell=told.append, unwanted=lambda: False, max_output=6)
    assert (ended.status, ended.said, told) == (3, "o\nlast", ["one", "two"])


def test_what_is_not_wanted_any_more_is_killed_with_all_that_it_started() -> None:
    told: list[str] = []
    children = "import os, sys, time; os.fork(); print(os.getpid(), file=sys.stderr, flush=True); time.sleep(60)"
    ended = follow(python(children), env={}, timeout_s=30, tell=told.append, unwanted=lambda: len(told) == 2)
    assert ended.status is None
    deadline = time.monotonic() + 10
    while any(is_running(int(pid)) for pid in told):
        assert time.monotonic() < deadline, "a child outlived it"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """One that ended and that nobody reads the end of is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def test_what_is_followed_has_its_time_even_when_it_says_nothing_or_closes_its_mouth() -> None:
    for program in ("import time; time.sleep(60)", "import os, time; os.close(2); time.sleep(60)"):
        started = time.monotonic()
        ended = follow(python(program), env={}, timeout_s=0.5, tell=print, unwanted=lambda: False)
        assert (ended.status, time.monotonic() - started < 10) == (None, True)


def test_what_a_program_leaves_behind_with_its_stderr_is_not_waited_for() -> None:
    program = "import os, time; os.fork() or (os.setsid(), time.sleep(3))"
    started = time.monotonic()
    ended = follow(python(program), env={}, timeout_s=30, tell=print, unwanted=lambda: False)
    assert ended.status == 0
    assert time.monotonic() - started < 2.5
