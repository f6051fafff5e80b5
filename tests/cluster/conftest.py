"""The cluster that tests use: the one they are given, else kind, else the lab."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.lab import parts
from tests.cluster.lab.outside import Lab, NoLab, running_lab
from tests.cluster.namespaces import GIVEN, site
from tests.cluster.whole_way import ground
from tests.summary import ran

__all__ = ["ground", "site"]
BUILD_WITHIN_S = 3600
START_WITHIN_S = 300


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test of a session pays for the cluster, and on a new machine for building it (`make test` did)."""
    build = parts.missing()
    for item in items:
        if Path(__file__).parent in item.path.parents and (build or not item.get_closest_marker("timeout")):
            item.add_marker(pytest.mark.timeout(BUILD_WITHIN_S if build else START_WITHIN_S), append=False)


@pytest.fixture(scope="session")
def built() -> parts.Parts:
    """What the lab is made of. Where it cannot be had, a skip, which in CI is a failure."""
    try:
        return parts.build(_say)
    except parts.NoParts as why:
        pytest.skip(f"no lab: {why}")


@pytest.fixture(scope="session")
def lab(built: parts.Parts) -> Iterator[Lab]:
    """One lab for the session, ended with it. In a folder with a short name: the paths of its sockets have to fit."""
    try:
        with tempfile.TemporaryDirectory(prefix="bd-lab-") as folder, running_lab(Path(folder) / "state", _say) as lab:
            ran("cluster", f"lab, Kubernetes {parts.KUBERNETES}")
            yield lab
    except NoLab as why:
        pytest.skip(f"no lab: {why}")


@pytest.fixture(scope="session")
def kubeconfig(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Of a cluster made for tests, whose user may do everything."""
    for variable in GIVEN:
        if given := os.environ.get(variable):
            ran("cluster", f"the one that {variable} names")
            yield Path(given)
            return
    name, path = f"blastdoor-tests-{os.getpid()}", tmp_path_factory.mktemp("kind") / "kubeconfig"
    if _kind("create", name, path, "--wait=2m"):
        ran("cluster", "kind")
        yield path
        assert _kind("delete", name, path), f"kind left {name} behind"
    else:
        yield request.getfixturevalue("lab").kubeconfig


def _kind(do: str, name: str, kubeconfig: Path, *more: str) -> bool:
    """Whether kind did it: it takes a Docker engine, and a node image that is here or can be fetched."""
    if not (shutil.which("docker") and shutil.which("kind")):
        return False
    return _succeeds("docker", "info") and _succeeds(
        "kind", do, "cluster", f"--name={name}", f"--kubeconfig={kubeconfig}", *more
    )


def _succeeds(*argv: str) -> bool:
    return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
