"""Importing does nothing: every module of ours, in one process with an empty environment and no network."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
IMPORT_ALL = """
import importlib, pkgutil, socket, sys, threading

def refuse(*_, **__):
    raise AssertionError("an import opened a socket")

socket.socket.connect = socket.socket.connect_ex = socket.socket.bind = refuse
socket.getaddrinfo = refuse
for root in ("service", "workers"):
    package = importlib.import_module(root)
    for found in pkgutil.walk_packages(package.__path__, root + "."):
        # Alembic runs its files as scripts.
        if not found.name.endswith("__main__") and not found.name.startswith("service.migrations."):
            importlib.import_module(found.name)
            print(found.name)
assert threading.active_count() == 1, threading.enumerate()
"""


def test_every_module_can_be_imported_with_no_environment_and_no_network(tmp_path: Path) -> None:
    argv = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{IMPORT_ALL}"]

    imported = subprocess.run(argv, env={}, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)

    assert imported.returncode == 0, imported.stderr
    assert {"service.main", "service.api.app", "service.usecases.submit", "service.cli"} <= set(imported.stdout.split())
    assert list(tmp_path.iterdir()) == []
