"""Processes of ours: explicit environment, a time limit, capped output, and nothing inherited."""

import os
import sys
import time

import pytest

from workers.proc import ProcessFailed, run


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
