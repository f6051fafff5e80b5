"""Importing a module of ours does no work: no environment is read, no connection made, no process started, no file
written. So any module can be tested alone, and what a process does begins where somebody says so."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("service", "workers")

GUARD = """
import json, os, pkgutil, sys

FORBIDDEN = {
    "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto",
    "subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn",
    "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.chmod", "os.chown", "os.symlink", "os.link", "os.truncate",
    "os.kill", "sqlite3.connect", "signal.pthread_kill", "shutil.rmtree", "tempfile.mkdtemp", "tempfile.mkstemp",
}
did = []
IPV6 = ("::1", 0)  # urllib3 asks so, when it is imported, whether this machine has IPv6

def guard(event, args):
    if event == "socket.bind" and args[1] == IPV6:
        return
    if event in FORBIDDEN:
        did.append([importing, event, repr(args)[:200]])
    elif event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        did.append([importing, event, repr(args)[:200]])

importing = "nothing"
sys.dont_write_bytecode = True
sys.path.insert(0, ROOT)
sys.addaudithook(guard)
imported, threads = [], []
for package in PACKAGES:
    for found in pkgutil.walk_packages([os.path.join(ROOT, package)], package + "."):
        if found.name.rpartition(".")[2] == "env":
            continue  # Alembic runs it, it is not imported
        importing = found.name
        __import__(found.name)
        imported.append(found.name)
import threading
print(json.dumps({"imported": imported, "did": did, "threads": [t.name for t in threading.enumerate()]}))
"""


def _import_all(root: Path, *packages: str) -> dict[str, list[object]]:
    """In a process of its own, with an empty environment."""
    program = f"ROOT, PACKAGES = {str(root)!r}, {packages!r}\n{GUARD}"
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], env={}, cwd="/", capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "an import has something to say"
    return dict(json.loads(done.stdout))


def test_every_module_can_be_imported_without_an_environment_and_does_nothing() -> None:
    found = _import_all(ROOT, *OURS)

    assert found["did"] == []
    assert found["threads"] == ["MainThread"]
    assert set(found["imported"]) >= _modules()


def _modules() -> set[str]:
    """Those that have a file. `env` is Alembic's script, which it runs and nobody imports."""
    files = [path.relative_to(ROOT).with_suffix("") for package in OURS for path in (ROOT / package).rglob("*.py")]
    names = {".".join(path.parts) for path in files if path.name not in ("__init__", "env") and "-" not in path.name}
    assert len(names) > 50
    return names


def test_the_guard_sees_what_an_import_does(tmp_path: Path) -> None:
    """The positive control: a module that works, one that connects, one that writes, one that starts a process."""
    package = tmp_path / "planted"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "connects.py").write_text(
        "import socket\ntry:\n    socket.create_connection(('127.0.0.1', 9), 0.1)\nexcept OSError:\n    pass\n"
    )
    (package / "writes.py").write_text(f"open({str(tmp_path / 'written')!r}, 'w').close()\n")
    (package / "starts.py").write_text("import subprocess\nsubprocess.run(['/bin/true'])\n")
    (package / "threads.py").write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True, name='planted').start()\n"
    )
    (package / "innocent.py").write_text("import json\n")

    found = _import_all(tmp_path, "planted")

    culprits = {str(row[0]) for row in found["did"] if isinstance(row, list)}
    assert culprits == {"planted.connects", "planted.writes", "planted.starts"}
    assert "planted" in found["threads"]


def test_a_module_that_needs_an_environment_is_found(tmp_path: Path) -> None:
    package = tmp_path / "planted"
    package.mkdir()
    (package / "__init__.py").write_text("import os\nos.environ['BLASTDOOR_DATABASE_URL']\n")
    (package / "inside.py").touch()

    with pytest.raises(AssertionError, match="BLASTDOOR_DATABASE_URL"):
        _import_all(tmp_path, "planted")
