"""A log line is one JSON object, whatever a stranger wrote into it."""

import io
import json
import logging
import time
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
    assert (line["event"], line["logger"], line["program"]) == ("library", "celery.worker", "test")
    assert line["message"] == f"dropped {HOSTILE}", "what a library says may quote anybody: a value, never the event"


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


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("key bd_t_0123456789abcdef is wrong", "0123456789abcdef"),
        ("at redis://worker:s3cret-pass@127.0.0.1:6379/0", "s3cret-pass"),
        ("Authorization: Bearer abcdefgh12345678", "abcdefgh12345678"),
        ("signed with whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"),
    ],
)
def test_what_looks_like_a_secret_of_ours_is_hidden_wherever_it_stands(
    stream: io.StringIO, text: str, secret: str
) -> None:
    structlog.get_logger().warning("failed", error=text)
    logging.getLogger("library").warning("failed: %s", text)

    assert secret not in stream.getvalue()
    assert [line["level"] for line in _lines(stream)] == ["warning", "warning"]
    assert stream.getvalue().count(logs.HIDDEN) == 2


def test_the_search_for_secrets_takes_no_longer_for_text_made_to_be_hard_to_search(stream: io.StringIO) -> None:
    began = time.process_time()
    for text in ("a" * 8000, "a." * 4000, "a://b:" * 1300, "a://:" + "x" * 8000, "redis://" + "a" * 8000):
        structlog.get_logger().info("said", text=text)

    assert len(_lines(stream)) == 5
    assert time.process_time() - began < 1.0, "an unbounded pattern takes about a second for each"


def test_a_value_that_cannot_be_written_does_not_lose_the_record(stream: io.StringIO) -> None:
    itself: list[object] = []
    itself.append(itself)
    structlog.get_logger().info("odd", loop=itself, lone="\ud800", number=float("nan"), big="x" * 100_000)

    (line,) = _lines(stream)
    assert line["event"] == "odd"
    assert len(line["big"]) < 2 * logs.MAX_VALUE


def test_what_a_library_prints_becomes_records(stream: io.StringIO) -> None:
    printed = logs._Printed(stream)
    printed.write("first li")
    printed.write("ne\n" + HOSTILE + "\n")

    assert [line["event"] for line in _lines(stream)] == ["printed"] * len(_lines(stream))
    assert _lines(stream)[0]["text"] == "first line"
    assert '{"event": "forged"}\n' not in stream.getvalue()
