"""The sweep is what says `nothing left behind`: here each kind of leak is planted, and found, and gone when it is."""

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.sweep import CGROUPS, pids_in_cgroups, sweep, swept
from workers.boundaries.gvisor.cgroups import CgroupTree
from workers.boundaries.gvisor.mounts import mount_tmpfs, unmount

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
_SLEEP = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"]


@contextmanager
def _sleeper(argv: list[str], *, env: dict[str, str], cwd: Path = Path("/")) -> Iterator[None]:
    process = subprocess.Popen(argv, env=env, cwd=cwd)
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def a_process_by_its_environment(mark: str, directory: Path) -> Iterator[None]:
    with _sleeper(_SLEEP, env={"OWNER": mark}):
        yield


@contextmanager
def a_process_by_its_command_line(mark: str, directory: Path) -> Iterator[None]:
    with _sleeper([*_SLEEP, mark], env={}):
        yield


@contextmanager
def a_process_by_its_working_directory(mark: str, directory: Path) -> Iterator[None]:
    (directory / mark).mkdir()
    with _sleeper(_SLEEP, env={}, cwd=directory / mark):
        yield
    (directory / mark).rmdir()


@contextmanager
def a_mount(mark: str, directory: Path) -> Iterator[None]:
    point = directory / f"{mark} with space"
    point.mkdir()
    mount_tmpfs(point, size_bytes=4096, inodes=8)
    try:
        yield
    finally:
        unmount(point)


@contextmanager
def an_empty_cgroup(mark: str, directory: Path) -> Iterator[None]:
    group = CgroupTree.detect().roots["pids"] / f"blastdoor-{mark}.planted"
    group.mkdir()
    try:
        yield
    finally:
        group.rmdir()


@contextmanager
def shared_memory(mark: str, directory: Path) -> Iterator[None]:
    path = Path("/dev/shm") / f"planted-{mark}"
    path.write_text("leak")
    try:
        yield
    finally:
        path.unlink()


@pytest.fixture
def mark() -> str:
    return f"sweep{uuid.uuid4().hex[:16]}"


@pytest.mark.parametrize(
    ("plant", "kind"),
    [
        (a_process_by_its_environment, "process"),
        (a_process_by_its_command_line, "process"),
        (a_process_by_its_working_directory, "process"),
        (a_mount, "mount"),
        (an_empty_cgroup, "cgroup"),
        (shared_memory, "named"),
    ],
)
def test_a_planted_leak_is_found_and_is_not_found_when_it_is_gone(
    plant: Callable[[str, Path], AbstractContextManager[None]], kind: str, mark: str, tmp_path: Path
) -> None:
    assert sweep(mark) == []
    with plant(mark, tmp_path):
        assert [found.kind for found in sweep(mark)] == [kind]
    assert swept(mark, within_s=5) == []


def test_a_process_that_hides_everything_is_found_by_its_cgroup(mark: str) -> None:
    group = CgroupTree.detect().roots["pids"] / f"blastdoor-{mark}.planted"
    with ExitStack() as stack:
        group.mkdir()
        stack.callback(group.rmdir)
        process = stack.enter_context(subprocess.Popen(_SLEEP, env={}, cwd="/"))
        stack.callback(process.wait)
        stack.callback(process.kill)
        (group / "cgroup.procs").write_text(str(process.pid))
        assert {found.kind for found in sweep(mark)} == {"cgroup", "process"}
        assert pids_in_cgroups(mark) == {process.pid}
    assert sweep(mark) == []
    assert CGROUPS in group.parents


def test_a_directory_is_found_even_as_a_dangling_link(mark: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/nowhere")
    directories = [tmp_path / "link", tmp_path / "absent"]
    assert [str(found) for found in sweep(mark, directories=directories)] == [f"directory {tmp_path}/link"]


def test_a_leak_that_stays_is_reported_when_the_time_is_over(mark: str, tmp_path: Path) -> None:
    with shared_memory(mark, tmp_path):
        assert [found.kind for found in swept(mark, within_s=0.3)] == ["named"]


@pytest.mark.parametrize("marks", [(), ("short",)])
def test_a_sweep_for_nothing_in_particular_is_refused(marks: tuple[str, ...]) -> None:
    with pytest.raises(AssertionError):
        sweep(*marks)
