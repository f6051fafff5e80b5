"""Cases of the corpus whose positive control is a driver with one part of it weakened: the weakened part is made here,
and exists in no registry. The same cases as a tenant plays them are in test_corpus_over_http.py."""

import json
import os
import secrets
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.core.boundary import Ended, Execution, StepSpec
from tests.sandboxes import (
    ENVIRONMENT,
    MIB,
    Never,
    gvisor_boundary,
    make_ref,
    make_spec,
    make_step,
    require_gvisor,
    shell,
)
from tests.sweep import sweep, swept
from workers.boundaries.gvisor import steps
from workers.boundaries.gvisor.driver import GvisorBoundary

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runtimes")


@pytest.fixture
def boundary(tmp_path: Path, store: Path) -> Iterator[GvisorBoundary]:
    require_gvisor()
    with gvisor_boundary(tmp_path / "run", store=store) as made:
        yield made


def played(boundary: GvisorBoundary, step: StepSpec) -> Execution:
    ref = make_ref(installation=boundary.host.installation)
    with boundary.open(make_spec(), ref, cancelled=Never()) as sandbox:
        execution = sandbox.execute(step)
    boundary.destroy(ref)
    return execution


# --- D16 --------------------------------------------------------------------------------------------------------------

BOUND = 24 * MIB
"""What a reader may grow by: two streams' heads and tails of 512 KiB, a chunk each, and the interpreter's own slack."""


def grown_bytes(directory: Path, store: Path, *weak: str) -> int:
    """By how much the highest resident memory of a driver's process grew while 32 MiB were printed at it."""
    require_gvisor()
    argv = [sys.executable, "-m", "tests.escape.flooded_reader", str(directory), str(store), str(MIB // 2), *weak]
    with subprocess.Popen(argv, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        measured = []
        for word, field in ((b"open\n", "VmRSS"), (b"played\n", "VmHWM")):
            while (line := reader.stdout.readline()) != word:
                assert line, f"the reader ended before it was {word!r}"
            measured.append(_memory(reader.pid, field))
            reader.stdin.write(b"\n")
            reader.stdin.flush()
        reader.stdout.read()  # to its end, so that what it logs has a reader
    assert reader.returncode == 0
    return measured[1] - measured[0]


def _memory(pid: int, field: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def test_d16_a_flood_does_not_grow_the_process_that_reads_it(tmp_path: Path, store: Path) -> None:
    assert grown_bytes(tmp_path / "run", store) < BOUND


def test_d16_control_a_reader_that_keeps_everything_grows_over_the_bound(tmp_path: Path, store: Path) -> None:
    assert grown_bytes(tmp_path / "run", store, "keep-everything") > BOUND


# --- D17 --------------------------------------------------------------------------------------------------------------


def test_d17_a_daemon_is_gone_after_the_teardown_and_without_it_would_be_there(boundary: GvisorBoundary) -> None:
    """The control comes first here: the same sandbox, with its one defence, the teardown, not yet applied."""
    ref = make_ref(installation=boundary.host.installation)
    daemon = shell("setsid sh -c 'trap \"\" TERM HUP INT; sleep 3600' >/dev/null 2>&1 & exit 0")
    with boundary.open(make_spec(), ref, cancelled=Never()) as sandbox:
        assert sandbox.execute(daemon).exit_code == 0
        time.sleep(0.5)
        assert {"process", "cgroup", "mount"} <= {found.kind for found in sweep(ref.name)}
    boundary.destroy(ref)
    assert swept(ref.name, within_s=5) == []


# --- D19 --------------------------------------------------------------------------------------------------------------

HELD = "(trap '' TERM HUP PIPE; for i in $(seq 80); do echo late; sleep 0.05; done) & echo main; exit 3"


def test_d19_a_child_that_holds_stdout_does_not_delay_the_step(boundary: GvisorBoundary) -> None:
    step = played(boundary, shell(HELD))
    assert (step.ended, step.exit_code) == (Ended.EXITED, 3)
    assert b"main\n" in step.stdout.data
    assert step.duration_s < 2


def test_d19_control_a_reader_that_waits_for_the_end_of_the_pipe_is_delayed(
    boundary: GvisorBoundary, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_exit = steps._Play._on_exit

    def patient(play: steps._Play, fd: int) -> Ended | None:
        ended = on_exit(play, fd)
        pipes = set(play._outputs) if ended is Ended.EXITED else set()
        while pipes:
            for pipe in select.select(list(pipes), [], [])[0]:
                if pipe in play._selector.get_map():
                    play._read(pipe)
                else:
                    pipes.discard(pipe)
        return ended

    monkeypatch.setattr(steps._Play, "_on_exit", patient)
    step = played(boundary, shell(HELD))
    assert (step.ended, step.exit_code) == (Ended.EXITED, 3)
    assert step.duration_s > 2
    assert step.stdout.data.count(b"late\n") == 80


# --- D29 --------------------------------------------------------------------------------------------------------------

LOOK = ["python3", "-S", "-c", "import json, os; print(json.dumps(dict(os.environ)))"]


def test_d29_the_worker_hands_on_nothing_of_its_own_environment(
    boundary: GvisorBoundary, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = secrets.token_hex(16)
    monkeypatch.setenv("CANARY_OF_BLASTDOOR", token)
    seen = json.loads(played(boundary, make_step(*LOOK)).stdout.data)
    assert seen == ENVIRONMENT


def test_d29_control_a_worker_that_did_would_be_caught(
    boundary: GvisorBoundary, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = secrets.token_hex(16)
    monkeypatch.setenv("CANARY_OF_BLASTDOOR", token)
    careless = make_step(*LOOK).model_copy(update={"env": dict(os.environ) | ENVIRONMENT})
    seen = json.loads(played(boundary, careless).stdout.data)
    assert seen != ENVIRONMENT
    assert seen["CANARY_OF_BLASTDOOR"] == token
