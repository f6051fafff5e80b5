"""Which trace a request belongs to, by W3C Trace Context."""

import re

import pytest

from service.api.tracing import trace_of

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
VALID = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def headers(*values: str) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"x"), *((b"traceparent", value.encode("latin-1")) for value in values)]


@pytest.mark.parametrize("flags", ["00", "01", "03"])
def test_the_callers_trace_goes_on_with_a_span_of_ours_and_its_flags(flags: str) -> None:
    trace = trace_of(headers(f"00-{TRACE}-{SPAN}-{flags}"))

    assert trace.trace_id == TRACE
    assert VALID.fullmatch(trace.traceparent)
    version, trace_id, span, kept = trace.traceparent.split("-")
    assert (version, trace_id, kept) == ("00", TRACE, flags)
    assert span != SPAN


def test_a_later_version_is_understood_as_far_as_ours_goes() -> None:
    assert trace_of(headers(f"cc-{TRACE}-{SPAN}-01-what-is-to-come")).trace_id == TRACE


@pytest.mark.parametrize(
    "given",
    [
        (),
        ("",),
        ("nonsense",),
        (f"00-{'0' * 32}-{SPAN}-01",),
        (f"00-{TRACE}-{'0' * 16}-01",),
        (f"00-{TRACE.upper()}-{SPAN}-01",),
        (f"00-{TRACE}-{SPAN}-01-more",),
        (f"ff-{TRACE}-{SPAN}-01",),
        (f"00-{TRACE}-{SPAN}",),
        (f"00-{TRACE}-{SPAN}-01\x1b[31m",),
        (f"00-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-01"),
        (f"00-{TRACE}-{SPAN}-01" + " " * 10_000,),
    ],
)
def test_what_is_not_one_valid_header_begins_a_trace_that_nobody_records(given: tuple[str, ...]) -> None:
    trace = trace_of(headers(*given))

    assert VALID.fullmatch(trace.traceparent)
    assert trace.traceparent.split("-")[1] == trace.trace_id != TRACE
    assert trace.traceparent.endswith("-00")


def test_no_two_requests_begin_the_same_trace() -> None:
    assert len({trace_of([]).trace_id for _ in range(100)}) == 100
