"""Compiles the sandboxes' inits when the package is built or installed.

The first process of a gVisor sandbox, and that of a pod, is a small static program of ours. It is built from its source
on the machine that will use it, so that no binary lives in the repository and what runs is what was reviewed.
"""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

INITS = (Path("workers/boundaries/gvisor"), Path("workers/pods"))
CFLAGS = ("-Os", "-static", "-nostdlib", "-ffreestanding", "-fno-stack-protector")


class SandboxInitHook(BuildHookInterface[Any]):
    """Puts `init` beside `init.c`, in wheels and in editable installs alike."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        for folder in INITS:
            source, binary = root / folder / "init.c", root / folder / "init"
            if not source.exists():
                continue
            compile_init(source=source, binary=binary)
            build_data["artifacts"].append(f"/{folder / 'init'}")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def clean(self, versions: list[str]) -> None:
        for folder in INITS:
            (Path(self.root) / folder / "init").unlink(missing_ok=True)


def compile_init(*, source: Path, binary: Path) -> None:
    """Compile to a new file and rename it: a sandbox that starts meanwhile sees the old program or the new one."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise SystemExit(f"blastdoor: no C compiler (`cc`) to build {source}: install gcc and libc6-dev, or clang")
    unfinished = binary.with_suffix(".new")
    built = subprocess.run(
        [compiler, *CFLAGS, "-o", str(unfinished), str(source)], capture_output=True, text=True, check=False
    )
    if built.returncode != 0:
        unfinished.unlink(missing_ok=True)
        raise SystemExit(f"blastdoor: {source} does not compile:\n{built.stderr}")
    unfinished.replace(binary)
