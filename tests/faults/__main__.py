"""`make soak`: a seeded schedule of faults with the times as they are shipped, and what came of it, in soak.json.

python -m tests.faults [--runs N] [--seed N] [--scaled] [--no-gvisor] [--sqlite]
"""

import argparse
import json
import os
import platform
import secrets
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from tests.faults.place import REAL, ROOT, Forks
from tests.faults.schedule import Done, Setup, run
from tests.sandboxes import RUNSC
from tests.servers import run_postgres

KEPT = Path("soak-history.jsonl")
"""Also of a soak that failed: `python -m tests.faults.history FILE` judges it again."""
REAL_PACE = {"pace_s": 1.2, "calm_s": 12.0, "longest_s": 60.0, "quiet_within_s": 600.0}
"""A thousand runs take twenty minutes to submit; a stop may outlast a lease of 30 s twice."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--scaled", action="store_true", help="the times of make test instead of the real ones")
    parser.add_argument("--no-gvisor", action="store_true", help="only the fake boundary")
    parser.add_argument("--sqlite", action="store_true", help="instead of PostgreSQL")
    parser.add_argument("--json", type=Path, default=Path("soak.json"))
    told = parser.parse_args()
    seed = secrets.randbits(32) if told.seed is None else told.seed
    times = "scaled" if told.scaled else "real"
    print(f"seed {seed}: {told.runs} runs, {times} times", flush=True)
    began = time.monotonic()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bd-soak-")))
        database = None
        versions = _versions()
        if not told.sqlite:
            server = stack.enter_context(run_postgres())
            database = stack.enter_context(server.fresh_database())
            versions["postgresql"] = server.version
        more = {} if told.scaled else {"settings": dict(REAL)} | REAL_PACE
        setup = Setup(
            seed=seed, runs=told.runs, directory=directory, database=database, gvisor=not told.no_gvisor, **more
        )
        forks = Forks()
        stack.callback(forks.close)
        try:
            done = run(forks, setup, say=lambda text: print(text, flush=True))
        finally:
            KEPT.write_bytes((directory / "history.jsonl").read_bytes())
    figures = done.figures() | {
        "times": times,
        "duration_s": round(time.monotonic() - began),
        "versions": versions,
    }
    told.json.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
    if done.violations:
        print(done)
    return 0 if is_clean(done) else 1


def is_clean(done: Done) -> bool:
    figures = done.figures()
    nothing = all(figures[name] == 0 for name in ("lost", "duplicated", "left_behind", "violations"))
    return nothing and figures["planted_leak_found"] and figures["accepted"] == figures["terminal"] == done.setup.runs


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "runsc": _said(str(RUNSC), "--version").partition("\n")[0].removeprefix("runsc version "),
        "kernel": platform.release(),
        "redis": _said("redis-server", "--version").partition("v=")[2].partition(" ")[0],
        "commit": _said("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "cpus": str(os.cpu_count()),
    }


def _said(*argv: str) -> str:
    """Empty where there is no such program."""
    try:
        return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
