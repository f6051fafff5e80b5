"""Structured logs: one JSON object a line, on standard error.

Text that a guest or a stranger wrote is only ever a *value*. A value is JSON-encoded, all of it ASCII, so it can forge
no line and reach no terminal with a control character. Events are fixed words of ours: `log.info("claimed", run=...)`;
what a library says is the value `message` of the event `library`, since it may quote anybody.
Composition roots call `configure` and, in a process of their own, `own_the_streams`; everyone else takes a logger from
structlog.
"""

import io
import json
import logging
import re
import sys
import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import EventDict, Processor

Level = Literal["debug", "info", "warning", "error"]
MAX_VALUE = 8192
"""Characters of one text value; what a stranger sends must not fill the disk."""
# Nothing of ours puts a secret into a record. These are for text that we did not write: a client library's exception
# that quotes its URL, a path that somebody pasted a key into. Bounded, so that no text takes long to search.
_SECRETS = re.compile(
    r"\b(?P<kept>bd_[tsa]_|whsec_)[A-Za-z0-9_+/=-]{8,}"
    r"|(?P<scheme>\b[a-z][a-z0-9+.-]{0,30}://[^\s:/@\"\\]{0,100}:)[^\s@\"\\]{1,300}(?=@)"
    r"|(?P<bearer>\b(?:Bearer|Basic) )[A-Za-z0-9._~+/=-]{8,}",
    re.ASCII | re.IGNORECASE,
)
HIDDEN = "[hidden]"

log = structlog.get_logger()


def configure(level: Level, *, program: str, stream: TextIO | None = None) -> None:
    """Send structlog's and the standard library's records the same way. `program` (api, relay, worker) is on each line.

    `stream` is for tests; otherwise each record goes to what `sys.stderr` is now.
    """
    threshold = logging.getLevelNamesMapping()[level.upper()]
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _with(program),
    ]
    # Without the frames' locals, which may be keys and guests' files.
    tracebacks = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
    structlog.configure(
        processors=[*shared, structlog.processors.ExceptionRenderer(tracebacks), _line],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.WriteLoggerFactory(file=stream or sys.stderr),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name, _as_a_value],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.ExceptionRenderer(tracebacks),
                _line,
            ],
        )
    )
    logging.root.handlers = [handler]
    logging.root.setLevel(threshold)


def own_the_streams() -> None:
    """After `configure`, in a process whose log is its standard error: whatever else would be written there becomes
    records. Warnings, the last words of an uncaught exception in any thread, and what a library prints."""
    logging.captureWarnings(capture=True)
    sys.excepthook = _died
    threading.excepthook = _thread_died
    sys.unraisablehook = _unraisable
    # Held by the loggers; sys.__stderr__ stays what it is, for the interpreter's own fatal errors.
    sys.stdout, sys.stderr = _Printed(sys.stdout), _Printed(sys.stderr)


def say_unknown(names: Iterable[str]) -> None:
    """Variables that look like settings of ours, and are none."""
    for name in names:
        structlog.get_logger().warning("unknown_setting", name=name)


def _with(program: str) -> Processor:
    def add(_logger: object, _method: str, event: EventDict) -> EventDict:
        event["program"] = program
        return event

    return add


def _as_a_value(_logger: object, _method: str, event: EventDict) -> EventDict:
    event["event"], event["message"] = "library", event.get("event")
    return event


def _line(_logger: object, _method: str, event: EventDict) -> str:
    """The record's one line of ASCII. No value can keep it from being written, nor take it apart."""
    bounded = {str(name): _bounded(value) for name, value in event.items()}
    try:
        text = json.dumps(bounded, default=_shown, allow_nan=False)
    except (TypeError, ValueError, RecursionError):  # a key that is no text, a NaN, something that contains itself
        text = json.dumps({name: value if _is_plain(value) else _shown(value) for name, value in bounded.items()})
    return _SECRETS.sub(_hidden, text)


def _bounded(value: Any) -> Any:
    if isinstance(value, str) and len(value) > MAX_VALUE:
        return f"{value[:MAX_VALUE]}... ({len(value)} characters)"
    return value


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, str | bool | int)


def _shown(value: object) -> str:
    try:
        return str(_bounded(repr(value)))
    except Exception as error:  # noqa: BLE001 - somebody's __repr__; the record is worth more than this value
        return f"<{type(value).__name__}: {type(error).__name__}>"


def _hidden(match: re.Match[str]) -> str:
    return next(kept for kept in match.groupdict().values() if kept) + HIDDEN


def _died(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    log.error("uncaught_exception", exc_info=(kind, error, trace))


def _thread_died(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not issubclass(args.exc_type, SystemExit):
        name = None if args.thread is None else args.thread.name
        log.error("uncaught_exception", thread=name, exc_info=(args.exc_type, args.exc_value, args.exc_traceback))


def _unraisable(unraisable: Any) -> None:
    error = unraisable.exc_value
    log.error("unraisable_exception", where=repr(unraisable.object), exc_info=error)


class _Printed(io.TextIOBase):
    """Each line that is written to it is a record. Has the descriptor of what it stands for, for who asks."""

    def __init__(self, behind: TextIO) -> None:
        self._behind = behind
        self._mine = threading.local()

    def write(self, text: str) -> int:
        *lines, rest = (getattr(self._mine, "begun", "") + text).split("\n")
        if len(rest) > MAX_VALUE:
            lines, rest = [*lines, rest], ""
        self._mine.begun = rest
        for line in filter(None, map(str.strip, lines)):
            log.info("printed", text=line)
        return len(text)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._behind.fileno()
