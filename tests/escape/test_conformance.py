"""The corpus that `blastdoor doctor --attack` plays, case by case against the real gVisor wall; and then against walls
with one defence really missing, where the very same code must say FAILED: a verdict out of reach would prove nothing.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import structlog
from typer.testing import CliRunner

from service.core.boundary import BoundaryRef, Execution, StepSpec
from tests.sandboxes import gvisor_boundary, require_gvisor
from tests.sweep import swept
from workers.boundaries.gvisor import driver
from workers.boundaries.gvisor.driver import GvisorBoundary
from workers.boundaries.gvisor.sandbox import GvisorSandbox
from workers.cli import commands
from workers.conformance import host
from workers.conformance.cases import Case
from workers.conformance.corpus import CASES
from workers.conformance.run import Arena, Outcome
from workers.conformance.stage import Stage, set_stage
from workers.runtimes.store import RootFilesystem, RuntimeStore

pytestmark = pytest.mark.timeout(180)
BY_ID = {case.id: case for case in CASES}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runtimes")


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with set_stage() as planted:
        yield planted


@contextmanager
def arena_of(boundary: GvisorBoundary, stage: Stage) -> Iterator[Arena]:
    with Arena(boundary, stage, name="gvisor", installation=boundary.host.installation, site="here") as arena:
        yield arena


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory, store: Path, stage: Stage) -> Iterator[Arena]:
    """The wall as it is."""
    require_gvisor()
    directory = tmp_path_factory.mktemp("conformance") / "run"
    with gvisor_boundary(directory, store=store) as boundary, arena_of(boundary, stage) as made:
        yield made


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.id} {case.title}")
def test_the_wall_holds_and_the_control_shows_that_it_could_be_seen_to_break(case: Case, arena: Arena) -> None:
    require_gvisor()
    result = arena.judge(case)
    assert (result.outcome, result.why) == (Outcome.BLOCKED, "")


# --- walls with one defence missing: each exists in this file only ---


@pytest.fixture
def weak(tmp_path: Path, store: Path, stage: Stage) -> Iterator[tuple[GvisorBoundary, Arena]]:
    """A boundary of the test's own, to be weakened by it."""
    require_gvisor()
    with gvisor_boundary(tmp_path / "run", store=store) as boundary, arena_of(boundary, stage) as arena:
        yield boundary, arena


def failed(arena: Arena, case_id: str) -> str:
    """-> why."""
    result = arena.judge(BY_ID[case_id])
    assert result.outcome is Outcome.FAILED, result
    return result.why


class _WithBind(RuntimeStore):
    """The host's view, and one directory of the host more."""

    def __init__(self, directory: Path, extra: Path) -> None:
        super().__init__(directory)
        self._extra = extra

    def get(self, name: str) -> RootFilesystem:
        root = super().get(name)
        binds = (*root.binds, (self._extra, Path("/mnt")))
        return RootFilesystem(name=root.name, digest=root.digest, path=root.path, binds=binds, masks=root.masks)


def test_a_directory_of_the_host_in_the_guest_fails_the_search_for_files(
    weak: tuple[GvisorBoundary, Arena], store: Path, stage: Stage
) -> None:
    boundary, arena = weak
    object.__setattr__(boundary.host, "runtimes", _WithBind(store, stage.host_file.parent))
    assert failed(arena, "D25") == "came out: the token of a file of the host"


def test_a_worker_that_hands_on_its_environment_fails_both_searches_for_it(
    weak: tuple[GvisorBoundary, Arena], monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = GvisorSandbox.execute

    def careless(sandbox: GvisorSandbox, step: StepSpec) -> Execution:
        return execute(sandbox, step.model_copy(update={"env": dict(os.environ) | dict(step.env)}))

    monkeypatch.setattr(GvisorSandbox, "execute", careless)
    assert failed(weak[1], "D21") == "came out: the token of the environment of the runner"
    assert "CANARY_OF_BLASTDOOR" in failed(weak[1], "D29")


def test_a_disk_larger_than_its_limit_fails_the_case_of_the_disk(
    weak: tuple[GvisorBoundary, Arena], monkeypatch: pytest.MonkeyPatch
) -> None:
    mount = driver.mount_tmpfs

    def generous(at: Path, *, size_bytes: int, inodes: int) -> None:
        mount(at, size_bytes=4 * size_bytes, inodes=inodes)

    monkeypatch.setattr(driver, "mount_tmpfs", generous)
    assert "with a limit of 8388608" in failed(weak[1], "D13") or "did not see" in failed(weak[1], "D13")


@pytest.mark.parametrize(("more", "why"), [(50, "149 files stood"), (1000, "300 files stood")])
def test_a_wall_that_refuses_files_too_late_fails_the_case_of_the_inodes(
    weak: tuple[GvisorBoundary, Arena], monkeypatch: pytest.MonkeyPatch, more: int, why: str
) -> None:
    """With fifty more the host does see the limit being hit: only a wall that ends the run may have that many."""
    mount = driver.mount_tmpfs

    def generous(at: Path, *, size_bytes: int, inodes: int) -> None:
        mount(at, size_bytes=size_bytes, inodes=inodes + more)

    monkeypatch.setattr(driver, "mount_tmpfs", generous)
    assert failed(weak[1], "D14").startswith(why)


def test_a_wall_whose_threads_nobody_counts_fails_the_case_of_the_fork_bomb(
    weak: tuple[GvisorBoundary, Arena], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not taken for a wall of another host, where nobody could."""
    monkeypatch.setattr(host, "watching_tasks", lambda mark: nullcontext(host.Peak()))
    assert failed(weak[1], "D11") == "nobody counts the host threads of the boundary"


def test_the_hosts_network_in_the_guest_fails_the_case_of_the_hosts_listeners(
    weak: tuple[GvisorBoundary, Arena], monkeypatch: pytest.MonkeyPatch
) -> None:
    render_argv, render_config = driver.render_argv, driver.render_config

    def on_the_hosts_network(*args: Any, **named: Any) -> list[str]:
        return ["--network=host" if word == "--network=none" else word for word in render_argv(*args, **named)]

    def in_the_hosts_namespace(*args: Any, **named: Any) -> dict[str, Any]:
        config = render_config(*args, **named)
        spaces = [space for space in config["linux"]["namespaces"] if space["type"] != "network"]
        return config | {"linux": config["linux"] | {"namespaces": spaces}}

    monkeypatch.setattr(driver, "render_argv", on_the_hosts_network)
    monkeypatch.setattr(driver, "render_config", in_the_hosts_namespace)
    assert "this host heard it: " in failed(weak[1], "D27")


def test_a_teardown_that_does_nothing_fails_the_case_of_the_daemon(
    weak: tuple[GvisorBoundary, Arena], monkeypatch: pytest.MonkeyPatch
) -> None:
    boundary, arena = weak

    def nothing(self: GvisorBoundary, ref: BoundaryRef) -> None: ...

    with monkeypatch.context() as undone:
        undone.setattr(GvisorBoundary, "destroy", nothing)
        assert "boundary bd-" in failed(arena, "D17")
    for ref in boundary.discover():
        boundary.destroy(ref)


# --- the command ---


@pytest.mark.parametrize("weakened", [False, True], ids=["a wall that holds", "a wall that does not"])
def test_the_command_says_of_each_case_and_boundary_how_it_went(
    weakened: bool, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_gvisor()
    monkeypatch.setattr("workers.cli.CASES", (BY_ID["D29"], BY_ID["D33"]))
    if weakened:
        execute = GvisorSandbox.execute

        def careless(sandbox: GvisorSandbox, step: StepSpec) -> Execution:
            return execute(sandbox, step.model_copy(update={"env": dict(step.env) | {"LEAK": "1"}}))

        monkeypatch.setattr(GvisorSandbox, "execute", careless)
    before = structlog.get_config()
    places = ["--state", str(tmp_path / "state"), "--runtime-dir", str(tmp_path / "run")]
    try:
        result = CliRunner().invoke(commands, ["doctor", "--attack", "--json", *places])
    finally:
        structlog.configure(**before)
    assert result.stdout, (result.stderr, result.exception)
    said = json.loads(result.stdout)
    d29 = "failed" if weakened else "blocked"
    assert result.exit_code == int(weakened), result.output
    assert [(row["id"], row["boundary"], row["outcome"]) for row in said["cases"]] == [
        ("D29", "gvisor", d29),
        ("D33", "gvisor", "blocked"),
    ]
    assert said["summary"] == {"cases": 2, "blocked": 2 - weakened, "vacuous": 0, "failed": int(weakened)}
    assert "D33   gvisor: blocked" in result.stderr
    assert swept(f"doctor{os.getpid()}", within_s=5) == []
    assert list((tmp_path / "run").iterdir()) == []
