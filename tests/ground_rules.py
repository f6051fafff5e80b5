"""Rules for every test: its folder is its mark, CI skips nothing that we claim, and the summary says what really ran.

A pytest plugin, so that the rules are themselves tested (unit/test_ground_rules.py).
"""

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests import summary

FOLDERS = ("cluster", "faults", "escape", "e2e", "integration", "contract", "unit")
"""In the order in which they run: what takes long begins first, so that nothing long is left alone at the end."""
CLUSTER = "tests/cluster/test_"
TOGETHER = {
    "kind": ("kind_", "dedicated_", "engine_lab"),
    "driver": ("namespace_", "kube_", "templates"),
}
"""Where tests run side by side, those on a cluster stay in three processes: those that make clusters of their own by
kind, one at a time; these, on a lab; and the others, on another. Each lab costs seconds and memory."""
# Reasons for which a test may be skipped in CI. Empty: what CI cannot run, we do not claim.
SKIPS_ALLOWED_IN_CI: frozenset[str] = frozenset()


def pytest_configure(config: pytest.Config) -> None:
    for folder in FOLDERS:
        config.addinivalue_line("markers", folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for folder in set(FOLDERS).intersection(_folders(item.path)):
            item.add_marker(folder)
    items.sort(key=lambda item: min((FOLDERS.index(one) for one in _folders(item.path) if one in FOLDERS), default=0))


def _folders(path: Path) -> list[str]:
    """The folders of a test file below `tests`; of all of its path when no folder has that name."""
    parts = path.parts[:-1]
    return list(parts[parts.index("tests") + 1 :] if "tests" in parts else parts)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile`, with what belongs together as one file."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling  # only here is it certain to be installed

    class _Together(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            if not file.startswith(CLUSTER):
                return file
            name = file.removeprefix(CLUSTER)
            return CLUSTER + next((one for one, files in TOGETHER.items() if name.startswith(files)), "others")

    return _Together(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _no_skip_in_ci(report, expected=hasattr(report, "wasxfail"))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _no_skip_in_ci(report, expected=False)
    return report


def _no_skip_in_ci(report: pytest.TestReport | pytest.CollectReport, *, expected: bool) -> None:
    if not _in_ci() or not report.skipped or expected:
        return
    where, line, reason = report.longrepr if isinstance(report.longrepr, tuple) else ("?", 0, str(report.longrepr))
    reason = reason.removeprefix("Skipped: ")
    if reason not in SKIPS_ALLOWED_IN_CI:
        report.outcome = "failed"
        report.longrepr = f"{where}:{line}: skipped in CI, where nothing that we claim may be: {reason}"


def _in_ci() -> bool:
    return os.environ.get("CI") == "true"


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tests that ran side by side (pytest-xdist) say it in processes of their own."""
    told: dict[str, object] | None = getattr(session.config, "workeroutput", None)
    if told is not None:
        told["ran"] = summary.taken()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    summary.add(getattr(node, "workeroutput", {}).get("ran", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("what the tests ran on")
    for line in summary.lines():
        terminalreporter.write_line(line)
