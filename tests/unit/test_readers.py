"""What may be trimmed off the stream, and who loses what by it."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.readers import (
    MOST_SPANS,
    Reader,
    StreamState,
    counted,
    has_caught_up,
    merged,
    trim_below,
    unread_below,
)


def a_stream(*readers: Reader, first: int = 1, last: int = 300) -> StreamState:
    return StreamState(length=last - first + 1, first=first, last=last, readers=readers)


def read_to(delivered: int, **more: Any) -> Reader:
    return Reader(group=more.pop("group", "app"), delivered=delivered, **more)


@pytest.mark.parametrize(
    ("stream", "below"),
    [
        (a_stream(read_to(100), last=100), None),  # it is not too long
        (a_stream(read_to(150), last=150), 51),  # the reader has everything
        (a_stream(read_to(101), last=101), 2),
        (a_stream(read_to(20), last=150), 21),  # so far, and no further, while it is not twice too long
        (a_stream(read_to(0), last=150), None),
        (a_stream(last=150), None),  # nobody reads yet: who comes begins here
        (a_stream(last=300), 101),
        (a_stream(read_to(0), last=300), 101),  # now it goes, whoever needs it
        (a_stream(read_to(0), last=200), None),
        (a_stream(read_to(0), last=201), 2),
        (a_stream(read_to(150, pending=30), last=150), 30),  # given to somebody, who has not acknowledged it
        (a_stream(read_to(150), read_to(10, group="slow"), last=150), 11),  # the slowest decides
    ],
)
def test_what_is_trimmed(stream: StreamState, below: int | None) -> None:
    assert trim_below(stream, max_length=100) == below


def test_a_long_stream_is_trimmed_by_a_hundredth_at_a_time() -> None:
    cut = [trim_below(a_stream(read_to(n), last=n), max_length=1000) for n in (1001, 1009, 1010, 1011)]

    assert cut == [None, None, 11, 12]


@given(
    delivered=st.integers(0, 500), pending=st.none() | st.integers(1, 500), first=st.integers(1, 400),
    length=st.integers(1, 500), max_length=st.integers(1, 200),
)  # fmt: skip
def test_what_a_reader_needs_stays_unless_the_stream_would_be_twice_too_long(
    delivered: int, pending: int | None, first: int, length: int, max_length: int
) -> None:
    last = first + length - 1
    delivered = min(delivered, last)
    reader = read_to(delivered, pending=pending if pending is not None and first <= pending <= delivered else None)
    below = trim_below(a_stream(reader, first=first, last=last), max_length=max_length)

    if below is not None:
        assert first < below <= last
        assert last - below + 1 >= max_length
        if unread_below(reader, below, first=first) or (reader.pending is not None and reader.pending < below):
            assert last - below + 1 == 2 * max_length, "not a single one more than must be"
    elif length > 2 * max_length:
        assert length - 2 * max_length < max(1, max_length // 100)


@pytest.mark.parametrize(
    ("delivered", "spans"), [(0, ((5, 9),)), (4, ((5, 9),)), (6, ((7, 9),)), (8, ((9, 9),)), (9, ()), (20, ())]
)
def test_what_a_reader_was_never_given(delivered: int, spans: tuple[tuple[int, int], ...]) -> None:
    assert unread_below(read_to(delivered), 10, first=5) == spans


def test_spans_that_touch_become_one() -> None:
    assert merged([(7, 7), (1, 3), (2, 5), (6, 6), (9, 9)]) == ((1, 7), (9, 9))
    assert counted(merged([(7, 7), (1, 3), (2, 5), (6, 6), (9, 9)])) == 8
    assert merged([]) == ()


def test_too_many_spans_become_one_that_covers_them() -> None:
    alone = [(2 * n, 2 * n) for n in range(MOST_SPANS)]

    assert merged(alone) == tuple(alone)
    assert merged([*alone, (5000, 5001)]) == ((0, 5001),)


def test_who_is_near_the_end_has_caught_up() -> None:
    stream = a_stream(last=300)

    assert [has_caught_up(read_to(n), stream, max_length=100) for n in (249, 250, 300)] == [False, True, True]
