"""After a run in CI that failed: what failed is played once more, alone, with servers and clusters of its own.

Tests that measure time and kill processes run beside two others that do the same, on whatever machine CI has. A test
that then holds, with nobody beside it, was disturbed: it is named here, and is a defect to be looked into. Not for unit
and contract tests, not for those of more than a few files (where one scene is played for all tests of a file, they fail
together), and not at home.
"""

import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterable
from pathlib import Path

FOLDERS = ("cluster", "faults", "escape", "e2e", "integration")
MOST = 3
TESTS_FAILED = 1
"""pytest.ExitCode: all was played, and some failed."""
_LAST_FAILED = Path(".cache/pytest/v/cache/lastfailed")


def why_not(failed: Collection[str], *, status: int = TESTS_FAILED) -> str | None:
    """Why these may not be played again; None when they may. `status`: with which pytest ended."""
    if status != TESTS_FAILED:
        return f"pytest ended with status {status}, and did not play everything"
    if not failed:
        return "no test failed by itself"
    files = {name.partition("::")[0] for name in failed}
    if len(files) > MOST:
        return f"tests of {len(files)} files failed; of more than {MOST} it is no accident"
    others = [name for name in failed if "::" not in name or not name.startswith(_beginnings())]
    return f"{others[0]} is not disturbed by what runs beside it" if others else None


def _beginnings() -> tuple[str, ...]:
    return tuple(f"tests/{folder}/" for folder in FOLDERS)


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, flush=True)


def main() -> int:
    if os.environ.get("CI") != "true":
        return 1
    failed = list(json.loads(_LAST_FAILED.read_text())) if _LAST_FAILED.exists() else []
    if (why := why_not(failed, status=int(sys.argv[1]))) is not None:
        _say([f"\nnothing is played again: {why}"])
        return 1
    _say([f"\nplayed again, alone, after a failure: {len(failed)}", *failed])
    return subprocess.run([sys.executable, "-m", "pytest", *failed], check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
