"""Failpoints: what may be said, where it is refused, and that every name is reached exactly where it is documented."""

import ast
import inspect
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.adapters import failpoints as adapter
from service.core.failpoints import PLACES, Action, Armed, Failpoint, FailpointReached, install, parse, reach
from service.settings import Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    install(None)


def test_a_specification_names_points_actions_and_times() -> None:
    assert parse("claim.after:exit, finish.before:raise@2") == (
        Armed(Failpoint.CLAIM_AFTER, Action.EXIT),
        Armed(Failpoint.FINISH_BEFORE, Action.RAISE, 2),
    )
    assert parse("") == ()


@pytest.mark.parametrize("text", ["claim.after", "nowhere:exit", "claim.after:explode", "claim.after:exit@0",
                                  "claim.after:exit,claim.after:raise"])  # fmt: skip
def test_what_is_not_one_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="failpoint"):
        parse(text)


@pytest.mark.parametrize("environment", ["production", "development"])
def test_outside_of_tests_they_are_refused(environment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLASTDOOR_FAILPOINTS", "claim.after:raise")
    monkeypatch.setenv("BLASTDOOR_ENVIRONMENT", environment)
    with pytest.raises(ValidationError, match="only where environment=test"):
        Settings()
    with pytest.raises(ValueError, match="only where environment=test"):
        adapter.arm("claim.after:raise", environment=environment)  # type: ignore[arg-type]
    reach(Failpoint.CLAIM_AFTER)

    monkeypatch.setenv("BLASTDOOR_ENVIRONMENT", "test")
    assert Settings().failpoints == "claim.after:raise"


def test_a_failpoint_that_is_not_armed_does_nothing() -> None:
    adapter.arm("", environment="production")
    adapter.arm("claim.after:raise", environment="test")

    reach(Failpoint.FINISH_AFTER)

    with pytest.raises(FailpointReached, match=r"claim\.after"):
        reach(Failpoint.CLAIM_AFTER)


def test_the_nth_time_counts_over_what_was_forked() -> None:
    adapter.arm("claim.after:raise@3", environment="test")
    reach(Failpoint.CLAIM_AFTER)
    if (child := os.fork()) == 0:
        reach(Failpoint.CLAIM_AFTER)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    with pytest.raises(FailpointReached):
        reach(Failpoint.CLAIM_AFTER)
    reach(Failpoint.CLAIM_AFTER)


def test_exit_ends_the_process_without_a_word_to_anybody() -> None:
    program = (
        "import atexit; from service.adapters.failpoints import arm; from service.core.failpoints import *\n"
        "atexit.register(print, 'said goodbye'); arm('claim.after:exit', environment='test')\n"
        "try: reach(Failpoint.CLAIM_AFTER)\nfinally: print('cleaned up')"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)

    assert ended.returncode == adapter.EXIT_STATUS
    assert "failpoint_reached" in ended.stdout + ended.stderr
    assert "goodbye" not in ended.stdout
    assert "cleaned up" not in ended.stdout


def test_every_name_is_reached_exactly_where_the_registry_says() -> None:
    found: dict[Failpoint, set[str]] = defaultdict(set)
    for path in [*ROOT.glob("service/**/*.py"), *ROOT.glob("workers/**/*.py")]:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for point, function in _reached(ast.parse(path.read_text())):
            found[point].add(f"{module}:{function}")

    assert dict(found) == {point: set(places) for point, places in PLACES.items()}
    assert set(PLACES) == set(Failpoint)


def _reached(tree: ast.Module) -> Iterator[tuple[Failpoint, str]]:
    def visit(node: ast.AST, where: tuple[str, ...]) -> Iterator[tuple[Failpoint, str]]:
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if isinstance(child, ast.Call) and getattr(child.func, "id", None) == inspect.unwrap(reach).__name__:
                (argument,) = child.args
                assert isinstance(argument, ast.Attribute), "a failpoint is reached by its name, written out"
                yield Failpoint[argument.attr], ".".join(where)
            yield from visit(child, (*where, child.name) if named else where)  # type: ignore[attr-defined]

    yield from visit(tree, ())
