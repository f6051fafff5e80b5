"""What is installed has all that it needs: manifests, and both inits, built from their source."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("service", "workers", "cluster_templates", "pyproject.toml", "hatch_build.py", "README.md", "LICENSE")
LOOK = """
import json, os
from pathlib import Path
import workers
from workers.pods.image import INIT_BINARY
from workers.kube.install import Choices, wanted
print(json.dumps({
    "where": str(Path(workers.__file__).parents[1]),
    "manifests": len(list(wanted(Choices(image_prefix="registry.example/")))),
    "inits": [os.access(Path(workers.__file__).parent / "boundaries" / kind / "init", os.X_OK) for kind in KINDS],
    "init of pods": os.access(INIT_BINARY, os.X_OK),
}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel made of a copy in which nothing was built, in a folder; its dependencies are those of the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source, target = ROOT / name, folder / "source" / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "init", "*.new"))
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, target)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    _run([*pip, "wheel", "--no-build-isolation", "--no-deps", f"--wheel-dir={folder}", str(folder / "source")])
    (wheel,) = folder.glob("*.whl")
    _run([*pip, "install", "--no-deps", "--no-index", f"--target={folder / 'here'}", str(wheel)])
    return folder / "here"


def _run(argv: list[str], *, installed: Path | None = None) -> str:
    env = os.environ | ({"PYTHONPATH": str(installed)} if installed else {})
    done = subprocess.run(
        argv, cwd=installed or ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_wheel_has_the_manifests_and_both_inits(installed: Path) -> None:
    kinds = [source.parent.name for source in (ROOT / "workers" / "boundaries").glob("*/init.c")]
    found = json.loads(_run([sys.executable, "-c", f"KINDS = {kinds}\n{LOOK}"], installed=installed))

    assert found["where"] == str(installed), "it looked at the checkout"
    assert kinds == ["gvisor"]
    assert found["inits"] == [True]
    assert found["init of pods"]
    assert found["manifests"] > 20


def test_the_command_of_a_wheel_has_what_is_for_clusters(installed: Path) -> None:
    said = _run(
        [sys.executable, str(installed / "bin" / "blastdoor"), "cluster", "install", "--help"], installed=installed
    )
    assert "Server-side and idempotent" in said
