"""W3C Trace Context: which trace a request belongs to. The header is read by OpenTelemetry's propagator, not by us.

What is not a valid `traceparent` (or is there twice) counts as absent, as the recommendation wants: then a trace begins
here. `tracestate` is other vendors' and goes no further.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    TraceFlags,
    format_trace_id,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_PROPAGATOR = TraceContextTextMapPropagator()


@dataclass(frozen=True)
class Trace:
    """`trace_id`: 32 hex digits. `traceparent`: a span of our own in that trace, as the header spells it."""

    trace_id: str
    traceparent: str


def trace_of(headers: Sequence[tuple[bytes, bytes]]) -> Trace:
    """The caller's trace with a new span of ours, flags as they came; or a new trace, which nobody records."""
    given = [value.decode("latin-1") for name, value in headers if name == b"traceparent"]
    carrier = {"traceparent": given[0]} if len(given) == 1 else {}
    parent = get_current_span(_PROPAGATOR.extract(carrier)).get_span_context()
    span = SpanContext(
        trace_id=parent.trace_id if parent.is_valid else _not_zero(128),
        span_id=_not_zero(64),
        is_remote=False,
        trace_flags=parent.trace_flags if parent.is_valid else TraceFlags(0),
    )
    ours: dict[str, str] = {}
    _PROPAGATOR.inject(ours, set_span_in_context(NonRecordingSpan(span)))
    return Trace(trace_id=format_trace_id(span.trace_id), traceparent=ours["traceparent"])


def _not_zero(bits: int) -> int:
    return secrets.randbelow(2**bits - 1) + 1
