"""Durations and sizes as people write them: one spelling read, one printed, and they agree."""

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.quantities import format_duration, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "seconds"), [("20s", 20), ("500ms", 0.5), ("2m", 120), ("1h", 3600), ("1.5s", 1.5), ("0.25ms", 0.00025)]
)
def test_a_duration_is_read_as_it_is_meant(text: str, seconds: float) -> None:
    assert parse_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "text",
    ["", "20", 20, 20.0, None, True, "-1s", "0s", "1 s", "1S", "1e3s", "8d", "169h", "s", "١s", "1s\n", "9" * 30 + "s"],
)
def test_what_is_no_duration_is_refused_with_what_would_be(text: object) -> None:
    with pytest.raises(ValueError, match="should be a duration"):
        parse_duration(text)


@given(st.integers(min_value=1, max_value=7 * 24 * 3600 * 10**6))
def test_every_duration_is_printed_as_it_is_read_back(microseconds: int) -> None:
    duration = timedelta(microseconds=microseconds)

    assert parse_duration(format_duration(duration)) == duration


@pytest.mark.parametrize(
    ("text", "size"),
    [("256MiB", 2**28), ("64KiB", 65536), ("1GiB", 2**30), ("1MB", 10**6), ("7B", 7), ("0", 0), (12, 12)],
)
def test_a_size_is_read_as_it_is_meant(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "1.5MiB", "-1", -1, 1.0, True, None, "1mib", "1 MiB", "2PiB", 2**50 + 1, "٣MiB", "1MiB\n", "9" * 30]
)
def test_what_is_no_size_is_refused_with_what_would_be(text: object) -> None:
    with pytest.raises(ValueError, match="should be a size"):
        parse_size(text)


@given(st.integers(min_value=0, max_value=2**50))
def test_every_size_is_printed_as_it_is_read_back(size: int) -> None:
    assert parse_size(format_size(size)) == size
