"""A log line is one JSON object, whatever a stranger wrote into it."""

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from service import logs

HOSTILE = 'a\n{"event": "forged"}\x1b]0;owned\x07\x9b31m\u202e\u2028'


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    handlers, level = logging.root.handlers, logging.root.level
    written = io.StringIO()
    logs.configure("info", program="test", stream=written)
    yield written
    structlog.reset_defaults()
    logging.root.handlers, logging.root.level = handlers, level


def test_hostile_text_stays_inside_one_line_of_plain_ascii(stream: io.StringIO) -> None:
    structlog.get_logger().info("said", text=HOSTILE, raw=HOSTILE.encode())

    (line,) = _lines(stream)
    assert line["text"] == HOSTILE
    assert (line["event"], line["level"], line["program"]) == ("said", "info", "test")
    assert stream.getvalue().isascii()
    assert all(character.isprintable() for character in stream.getvalue().rstrip("\n"))


def test_the_standard_librarys_records_come_out_the_same_way(stream: io.StringIO) -> None:
    logging.getLogger("celery.worker").warning("dropped %s", HOSTILE)

    (line,) = _lines(stream)
    assert (line["event"], line["logger"], line["program"]) == (f"dropped {HOSTILE}", "celery.worker", "test")


def test_what_is_below_the_level_is_not_written(stream: io.StringIO) -> None:
    structlog.get_logger().debug("quiet")
    logging.getLogger("x").debug("quiet")

    assert _lines(stream) == []


def test_a_traceback_shows_no_values_of_variables(stream: io.StringIO) -> None:
    def fail(key: str) -> None:
        raise ValueError(len(key))

    for log in (structlog.get_logger(), logging.getLogger("x")):
        try:
            fail("bd_t_secret")
        except ValueError:
            log.exception("failed")

    assert [line["exception"][0]["exc_type"] for line in _lines(stream)] == ["ValueError", "ValueError"]
    assert "bd_t_secret" not in stream.getvalue()


def _lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]
