"""`make bench`: run the sections, print the figures, write bench.json.

    make bench                          every section
    make bench ARGS="upload limits"     these; the figures of the others stay as bench.json has them

bench.json says for each section at which commit, when, and how long it was measured.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.bench import (
    clusters,
    events,
    extract,
    fairness,
    hooks,
    limits,
    namespaces,
    pods,
    reaping,
    scale,
    speed,
    upload,
)
from tests.bench.live import progress

Document = dict[str, Any]
OUTPUT = Path("bench.json")
SECTIONS: Mapping[str, Callable[[Path], Document]] = {
    "speed": speed.measure,
    "upload": upload.measure,
    "extract": extract.measure,
    "limits": limits.measure,
    "events": events.measure,
    "webhooks": hooks.measure,
    "scale": scale.measure,
    "fairness": fairness.measure,
    "reaping": reaping.measure,
    "pods": pods.measure,
    "namespaces": namespaces.measure,
    "clusters": clusters.measure,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description="Measures; asserts nothing.")
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; all when absent")
    asked = parser.parse_args().sections or list(SECTIONS)
    if unknown := set(asked) - SECTIONS.keys():
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    runsc = Path(os.environ.get("BLASTDOOR_RUNSC") or shutil.which("runsc") or "/usr/bin/runsc")
    document: Document = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else {}
    for name in asked:
        started = time.monotonic()
        figures = _rounded(SECTIONS[name](runsc))
        progress("")
        _show(figures)
        measured = document.pop("measured", {}) | {name: _now(took_s=time.monotonic() - started)}
        for tail in ("versions", "machine"):
            document.pop(tail, None)
        document |= figures | {"measured": measured, "versions": _versions(runsc), "machine": _machine()}
        OUTPUT.write_text(json.dumps(document, indent=2) + "\n")  # after each section: a later one may fail
    print(f"written to {OUTPUT}")


def _show(figures: Document, indent: str = "") -> None:
    for name, value in figures.items():
        if isinstance(value, dict):
            print(f"{indent}{name}")
            _show(value, indent + "  ")
        else:
            print(f"{indent}{name:<{32 - len(indent)}}{value:>12}")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def _commit() -> str:
    words = ("git", "describe", "--always", "--dirty")
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()


def _now(*, took_s: float) -> Document:
    return {"commit": _commit(), "at": datetime.now(UTC).isoformat(timespec="seconds"), "took_s": round(took_s)}


def _versions(runsc: Path) -> dict[str, str]:
    def of(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()[0]

    return {
        "blastdoor_commit": _commit(),
        "runsc": of(str(runsc), "--version"),
        "redis": of("redis-server", "--version"),
        "python": platform.python_version(),
        "kernel": platform.release(),
    }


def _machine() -> dict[str, int]:
    return {"cores": os.cpu_count() or 1, "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")}


if __name__ == "__main__":
    main()
