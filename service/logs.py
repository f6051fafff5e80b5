"""Structured logs: one JSON object a line, on standard error.

Text that a guest or a stranger wrote is only ever a *value*. A value is JSON-encoded, all of it ASCII, so it can forge
no line and reach no terminal with a control character. Events are fixed words of ours: `log.info("claimed", run=...)`.
Composition roots call `configure`; everyone else takes a logger from structlog.
"""

import logging
import sys
from typing import Literal, TextIO

import structlog
from structlog.typing import Processor

Level = Literal["debug", "info", "warning", "error"]


def configure(level: Level, *, program: str, stream: TextIO | None = None) -> None:
    """Send structlog's and the standard library's records the same way. `program` (api, relay, worker) is on each line.

    `stream` is for tests; otherwise each record goes to what `sys.stderr` is at that moment.
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
    rendered: list[Processor] = [
        structlog.processors.ExceptionRenderer(tracebacks),
        structlog.processors.JSONRenderer(),
    ]
    structlog.configure(
        processors=[*shared, *rendered],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.WriteLoggerFactory(file=stream or sys.stderr),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendered],
        )
    )
    logging.root.handlers = [handler]
    logging.root.setLevel(threshold)


def _with(program: str) -> Processor:
    def add(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        event["program"] = program
        return event

    return add
