"""What a record is called is a fixed word in the code: nothing that anybody sends can become an event's name."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEVELS = {"debug", "info", "warning", "error", "critical", "exception"}
LOGGERS = {"log", "logger", "_log", "_LOG", "_logger"}


def computed(source: str) -> Iterator[int]:
    """Lines on which a logger of ours is called with an event that is not a literal."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr not in LEVELS:
            continue
        if not isinstance(node.func.value, ast.Name) or node.func.value.id not in LOGGERS:
            continue
        match node.args:
            case [ast.Constant(value=str())]:  # a second one structlog would format into it
                continue
        yield node.lineno


def calls(source: str) -> int:
    return sum(f"{name}.{level}(" in line for line in source.splitlines() for name in LOGGERS for level in LEVELS)


def test_every_event_is_a_literal() -> None:
    files = [path for part in ("service", "workers") for path in (ROOT / part).rglob("*.py")]

    assert sum(calls(path.read_text()) for path in files) > 50, "it looks where records are made"
    assert {str(path): found for path in files if (found := list(computed(path.read_text())))} == {}


@pytest.mark.parametrize(
    "call", ['log.info(text)', 'log.warning(f"said {text}")', 'logger.error("said %s", text)', '_LOG.info("a" + text)',
             "log.error(event=text)"],
)  # fmt: skip
def test_control_a_computed_event_is_seen(call: str) -> None:
    assert list(computed(f"def f(text):\n    {call}\n")) == [2]
