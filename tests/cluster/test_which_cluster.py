"""Tests use the cluster they are given, else kind where it works, else the lab."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFTEST = """
from types import SimpleNamespace
import pytest
from tests.cluster.conftest import kubeconfig
@pytest.fixture(scope="session")
def lab():
    return SimpleNamespace(kubeconfig="the lab's")
"""
TEST = """
def test_it(kubeconfig):
    print("uses", kubeconfig)
"""


@pytest.fixture
def used(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> "pytest.Pytester":
    """A place for a test session of its own, where PATH has nothing and no cluster is given."""
    for variable in ("KUBECONFIG", "KUBECONFIG_FOR_TESTS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(TEST)
    return pytester


def outcome(session: pytest.Pytester) -> str:
    """-> which kubeconfig the test got."""
    said = session.runpytest_subprocess("-s", "-p", "no:cacheprovider")
    said.assert_outcomes(passed=1)
    return next(line.partition("uses ")[2] for line in said.outlines if "uses " in line)


def put_program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\necho {name} $* >> {folder}/calls\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("given", "wins"),
    [
        ({"KUBECONFIG": "/one"}, "/one"),
        ({"KUBECONFIG": "/one", "KUBECONFIG_FOR_TESTS": "/two"}, "/two"),
        ({"KUBECONFIG": ""}, "the lab's"),
    ],
)
def test_the_cluster_that_is_given_comes_first(
    used: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], wins: str
) -> None:
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    assert outcome(used) == wins


@pytest.mark.parametrize(
    ("docker", "kind", "is_used"),
    [("exit 0", "exit 0", True), ("exit 1", "exit 0", False), ("exit 0", "exit 1", False)],
)
def test_kind_is_used_where_it_works_and_its_cluster_removed(
    used: pytest.Pytester, tmp_path: Path, docker: str, kind: str, is_used: bool
) -> None:
    put_program(tmp_path, "docker", docker)
    put_program(tmp_path, "kind", kind)
    assert (outcome(used) != "the lab's") is is_used
    deeds = [line.split()[:3] for line in (tmp_path / "calls").read_text().splitlines()]
    assert (["kind", "delete", "cluster"] in deeds) is is_used
