"""The layers of the tree are contracts for the linter; here each is broken on purpose, lest one says nothing.

All the bad imports are planted in one copy of the tree and read from one report: a plant is a file of its own, and must
be named under the contract that it breaks. The untouched copy is the positive control.
"""

import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONTRACTS = {
    contract["id"]: contract["name"]
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
}


@dataclass(frozen=True)
class Plant:
    """One import where it must not be: `imported` by `importer`, against the contract with this id."""

    contract: str
    importer: str
    imported: str


PLANTS = [
    Plant("service-layers", "service.core.planted_1", "service.intake"),
    Plant("service-layers", "service.intake.planted_2", "service.usecases"),
    Plant("service-layers", "service.usecases.planted_3", "service.api"),
    Plant("service-layers", "service.api.planted_4", "service.relay"),
    Plant("service-layers", "service.client.planted_27", "service.usecases"),
    Plant("service-layers", "service.client.planted_28", "service.api"),
    Plant("composition-roots", "service.client.planted_29", "service.adapters"),
    Plant("service-layers", "service.relay.planted_5", "service.cli"),
    Plant("workers-layers", "workers.boundaries.planted_6", "workers.registry"),
    Plant("workers-layers", "workers.boundaries.gvisor.planted_7", "workers.run_scenario"),
    *(
        Plant("core-is-pure", f"service.core.planted_{module}", module)
        for module in ("fastapi", "celery", "redis", "kubernetes", "httpx", "sqlalchemy", "subprocess", "os")
    ),
    Plant("core-is-pure", "service.core.planted_8", "service.settings"),
    Plant("adapters-see-core", "service.adapters.planted_9", "service.intake"),
    Plant("composition-roots", "service.usecases.planted_10", "service.adapters"),
    Plant("composition-roots", "service.api.planted_11", "service.settings"),
    Plant("composition-roots", "service.relay.planted_12", "service.adapters"),
    Plant("composition-roots", "workers.boundaries.planted_13", "service.settings"),
    Plant("composition-roots", "service.usecases.planted_24", "service.logs"),
    Plant("service-never-sees-workers", "service.cli.planted_14", "workers.boundaries"),
    Plant("workers-see-core-and-intake", "workers.boundaries.planted_15", "service.usecases"),
    Plant("workers-see-core-and-intake", "workers.boundaries.planted_16", "service.adapters"),
    Plant("workers-know-no-web", "workers.boundaries.planted_17", "fastapi"),
    Plant("workers-know-no-web", "workers.boundaries.planted_18", "starlette"),
    Plant("boundary-kinds-are-independent", "workers.boundaries.planted_19", "workers.boundaries.gvisor"),
    Plant("workers-layers", "workers.boundaries.planted_25", "workers.conformance"),
    Plant("conformance-knows-no-kind", "workers.conformance.planted_26", "workers.boundaries.gvisor"),
    Plant("kubernetes-client", "workers.boundaries.gvisor.planted_20", "kubernetes"),
    Plant("kubernetes-client", "service.usecases.planted_21", "kubernetes"),
    Plant("processes", "workers.boundaries.gvisor.planted_22", "subprocess"),
    Plant("processes", "service.adapters.planted_23", "multiprocessing"),
]
UNPLACED = "service.planted_without_a_layer"


def test_the_tree_as_it_is_keeps_every_contract(tmp_path: Path) -> None:
    status, report = _lint(_copy_of_the_tree(tmp_path))

    assert status == 0, report
    assert f"Contracts: {len(CONTRACTS)} kept, 0 broken." in report


def test_every_contract_has_a_bad_import_planted_against_it() -> None:
    assert {plant.contract for plant in PLANTS} == set(CONTRACTS)


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: f"{plant.importer} imports {plant.imported}")
def test_a_planted_import_breaks_its_contract(plant: Plant, broken_contracts: dict[str, str]) -> None:
    broken = broken_contracts[CONTRACTS[plant.contract]]

    assert f"{plant.importer} -> {plant.imported} (l.1)" in broken


def test_a_module_without_a_layer_breaks_the_layers(broken_contracts: dict[str, str]) -> None:
    assert f"- {UNPLACED}\n" in broken_contracts[CONTRACTS["service-layers"]]


@pytest.fixture(scope="module")
def broken_contracts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the linter says of each contract, by the contract's name, once everything is planted."""
    tree = _copy_of_the_tree(tmp_path_factory.mktemp("planted"))
    for plant in PLANTS:
        _module(tree, plant.importer, source=f"import {plant.imported}\n")
        if plant.imported.partition(".")[0] in {"service", "workers"}:
            _module(tree, plant.imported, source="")
    _module(tree, UNPLACED, source="")

    status, report = _lint(tree)

    assert status == 1, report
    return _sections(report)


def _copy_of_the_tree(to: Path) -> Path:
    for package in ("service", "workers"):
        shutil.copytree(ROOT / package, to / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", to)
    return to


def _module(tree: Path, name: str, *, source: str) -> None:
    """Make the module unless it exists already, as a file or as a package."""
    path = tree.joinpath(*name.split("."))
    if not path.is_dir() and not path.with_suffix(".py").exists():
        path.with_suffix(".py").write_text(source)


def _lint(tree: Path) -> tuple[int, str]:
    linter = Path(sys.executable).with_name("lint-imports")
    environment = {"PATH": os.environ["PATH"], "NO_COLOR": "1", "COLUMNS": "400"}
    linted = subprocess.run(
        [linter, "--no-logo", "--no-cache"], cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    return linted.returncode, linted.stdout + linted.stderr


def _sections(report: str) -> dict[str, str]:
    """The report's part on broken contracts: a name, a line of dashes as long, and what broke it."""
    sections: dict[str, str] = {}
    lines = report.partition("Broken contracts")[2].splitlines()
    name = None
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line in CONTRACTS.values() and following == "-" * len(line):
            name = line
        if name is not None:
            sections[name] = sections.get(name, "") + line + "\n"
    return sections
