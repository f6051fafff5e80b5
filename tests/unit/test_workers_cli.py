"""`blastdoor doctor`: what this host can build and what it lacks, for a person and for a program."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import structlog
from typer.testing import CliRunner

from service.core.boundary import NO_CLUSTERS, BoundaryKind, Capabilities, Host
from service.core.placement import OFFERS
from service.settings import Settings
from tests.factories import make_capabilities
from tests.summary import ran
from tests.sweep import swept
from workers.app import Site
from workers.boundaries.gvisor import probe
from workers.cli import commands
from workers.registry import DRIVERS, load

ALL = {offer.boundary for offer in OFFERS}
WITH_A_WALL = os.geteuid() == 0 and shutil.which("runsc") is not None


class Measured:
    """A driver whose host is as the test says."""

    def __init__(self, *rows: Capabilities) -> None:
        self.rows = rows
        self.hosts: list[Host] = []

    def __call__(self, kind: object, host: Host) -> "Measured":
        self.hosts.append(host)
        return self

    def probe(self) -> Sequence[Capabilities]:
        return self.rows


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("BLASTDOOR_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")
    before = structlog.get_config()
    yield
    structlog.configure(**before)


def doctor(tmp_path: Path, *arguments: str, code: int = 0) -> str:
    places = ["doctor", "--state", str(tmp_path / "state"), "--runtime-dir", str(tmp_path / "run")]
    result = CliRunner().invoke(commands, [*places, *arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout


def rows(printed: str) -> dict[str, dict[str, Any]]:
    found = json.loads(printed)["boundaries"]
    assert len(found) == len({row["boundary"] for row in found})
    return {row["boundary"]: row for row in found}


def pretend(monkeypatch: pytest.MonkeyPatch, *measured: Capabilities) -> Measured:
    driver = Measured(*measured)
    monkeypatch.setattr("workers.cli.load", driver)
    monkeypatch.setattr("workers.cli.DRIVERS", {BoundaryKind.GVISOR: "this one"})
    return driver


def test_a_host_that_can_build_a_wall_is_told_so_in_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, make_capabilities(versions={"runsc": "release-20260101"}, advisories=("CVE-1: beware",)))

    printed = doctor(tmp_path)

    lines = [line.split() for line in printed.splitlines()]
    assert lines[0][:3] == ["gvisor", "yes", "kernel"]
    assert "kernel sandboxed, nodes shared, control plane isolated" in printed
    assert "runsc release-20260101" in printed
    assert "advisory: CVE-1: beware" in printed
    assert "\x1b" not in printed, "no colours where nobody looks"


def test_every_boundary_of_the_table_is_named_with_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, make_capabilities())

    found = rows(doctor(tmp_path, "--json"))

    assert set(found) == ALL
    assert found["gvisor"]["available"] is True
    assert found["microvm"]["available"] is False
    assert found["microvm"]["missing"] == ["this version has no driver for microvm"]
    assert all(row["missing"] for row in found.values() if not row["available"])


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_a_host_that_can_build_nothing_is_told_why_and_the_status_is_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    missing = ("root (namespaces, cgroups and mounts need it)", "[b]runsc[/b] (apt install runsc)")
    pretend(monkeypatch, make_capabilities(available=False, missing=missing))

    printed = doctor(tmp_path, *arguments, code=3)

    for words in missing:
        assert words in printed, "and brackets are no mark-up"


def test_a_missing_runtime_is_found_by_the_real_probe(tmp_path: Path) -> None:
    found = rows(doctor(tmp_path, "--json", "--runsc", "/nonexistent/runsc", code=3))

    assert any("/nonexistent/runsc" in why and "apt install runsc" in why for why in found["gvisor"]["missing"])
    assert "/nonexistent/runsc" in doctor(tmp_path, "--runsc", "/nonexistent/runsc", code=3)


def test_a_runtime_that_is_something_else_is_found_by_the_real_probe(tmp_path: Path) -> None:
    other = tmp_path / "runsc"
    other.write_text("#!/bin/sh\necho something else\n")
    other.chmod(0o755)

    (why, *_) = (
        why for why in rows(doctor(tmp_path, "--json", "--runsc", str(other), code=3))["gvisor"]["missing"]
        if str(other) in why
    )  # fmt: skip

    assert "does not say its version" in why


def test_the_places_are_taken_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = pretend(monkeypatch, make_capabilities())
    monkeypatch.setenv("BLASTDOOR_RUNSC", "/opt/runsc")

    doctor(tmp_path, "--json")

    (host,) = driver.hosts
    assert (host.runsc, host.state_dir, host.runtime_dir) == (Path("/opt/runsc"), tmp_path / "state", tmp_path / "run")
    assert host.installation == f"doctor{os.getpid()}", "a mark that no installation has"


def of_clusters(folder: Path) -> dict[str, str]:
    """Every variable that has to do with clusters, none as it is by itself."""
    image, node = f"registry.example/run@sha256:{'0' * 64}", f"sha256:{'1' * 64}"
    return {
        "CLUSTER_PROVISIONERS": '["capi", "kind"]', "CLUSTER_IMAGES": json.dumps({"default": image}),
        "CLUSTER_ARCHIVES": json.dumps([str(folder / "run.tar")]), "CLUSTERS_AT_ONCE": "7", "STANDBY_CLUSTERS": "3",
        "KIND": str(folder / "kind"), "DOCKER": str(folder / "docker"), "DOCKER_HOST": "unix:///elsewhere.sock",
        "KIND_NODE_IMAGE": node, "CAPI_KUBECONFIG": str(folder / "management"), "CAPI_NAMESPACE": "elsewhere",
        "CAPI_TOPOLOGY": str(folder / "topology"), "CAPI_READY_S": "11", "NAMESPACE_VARIANTS": '["gvisor"]',
        "ENVIRONMENT": "test",
    }  # fmt: skip


def test_of_clusters_it_is_told_all_that_a_worker_with_the_same_environment_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = pretend(monkeypatch, make_capabilities())
    for name, value in of_clusters(tmp_path).items():
        monkeypatch.setenv(f"BLASTDOOR_{name}", value)

    doctor(tmp_path, "--json")

    (host,) = driver.hosts
    worker = Site(Settings(), "inst0")
    assert host.clusters == worker.clusters
    assert host.namespace_variants == worker.namespace_variants == ("gvisor",)
    as_it_is = {name for name, value in host.clusters if value == getattr(NO_CLUSTERS, name)}
    assert as_it_is == set(), "each has a variable, and is set to something else here"


def test_the_rows_of_clusters_are_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.cli.DRIVERS", {BoundaryKind.CLUSTER: DRIVERS[BoundaryKind.CLUSTER]})
    monkeypatch.setenv("BLASTDOOR_STATE_DIR", str(tmp_path / "state"))
    kind = tmp_path / "kind"
    for name, value in of_clusters(tmp_path).items():
        monkeypatch.setenv(f"BLASTDOOR_{name}", value)
    said = []
    for made in ("#!/bin/sh\nexit 1\n", "#!/bin/sh\necho kind v0.33.0 go1.25 linux/amd64\n"):
        kind.write_text(made)
        kind.chmod(0o755)
        found = rows(doctor(tmp_path, "--json", code=3))
        for row in load(BoundaryKind.CLUSTER, Site(Settings(), "inst0")).probe():
            assert found[row.boundary] == json.loads(row.model_dump_json())
        said.append([why for why in found["cluster/kind"]["missing"] if str(kind) in why])
    assert [len(lines) for lines in said] == [1, 0], "it is that very program that was asked"


def test_what_a_worker_is_not_told_to_offer_is_not_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.cli.DRIVERS", {BoundaryKind.CLUSTER: DRIVERS[BoundaryKind.CLUSTER]})
    monkeypatch.setenv("BLASTDOOR_CAPI_KUBECONFIG", str(tmp_path / "management"))

    unasked = rows(doctor(tmp_path, "--json", code=3))["cluster/capi"]["missing"]
    assert unasked == ["this host does not offer it (BLASTDOOR_CLUSTER_PROVISIONERS says what a worker offers)"]
    arguments = ("--json", "--capi-kubeconfig", str(tmp_path / "other"))
    (asked, *_) = rows(doctor(tmp_path, *arguments, code=3))["cluster/capi"]["missing"]
    assert asked.endswith(f"there is no file {tmp_path / 'other'}")


@pytest.mark.parametrize(
    ("name", "value"), [("CLUSTERS_AT_ONCE", "0"), ("CLUSTER_IMAGES", "secret"), ("CLUSTERS_AT_ONSE", "2")]
)
def test_where_no_worker_could_start_it_says_which_variable_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    pretend(monkeypatch, make_capabilities())
    monkeypatch.setenv(f"BLASTDOOR_{name}", value)
    places = ["doctor", "--state", str(tmp_path), "--runtime-dir", str(tmp_path / "run")]

    ended = CliRunner().invoke(commands, places)

    assert ended.exit_code == 2
    assert name.lower() in ended.stderr.lower()
    assert "secret" not in ended.stderr


@pytest.mark.skipif(not WITH_A_WALL, reason="needs root and runsc")
def test_a_real_sandbox_is_started_and_nothing_of_it_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_passed", {})  # another test of this process may have asked within ten minutes
    ran("boundary", "gvisor")

    printed = doctor(tmp_path)
    found = rows(doctor(tmp_path, "--json"))["gvisor"]

    assert printed.split()[:2] == ["gvisor", "yes"]
    assert (found["available"], found["missing"]) == (True, [])
    assert found["versions"]["runsc"]
    assert set(found["runtimes"]) == {"default"}
    assert swept(f"doctor{os.getpid()}", within_s=5) == []
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.skipif(not WITH_A_WALL, reason="needs root and runsc")
def test_a_sandbox_that_does_not_work_is_not_offered(tmp_path: Path) -> None:
    """It says its version, and is no sandbox."""
    broken = tmp_path / "runsc"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "runsc version release-20260101.0"\nexit 1\n')
    broken.chmod(0o755)

    found = rows(doctor(tmp_path, "--json", "--runsc", str(broken), code=3))["gvisor"]

    assert found["available"] is False
    assert any("canary" in why for why in found["missing"])
    assert swept(f"doctor{os.getpid()}", within_s=5) == []
