"""How logs look: lines for people, or JSON for machines, always on stderr."""

import logging
import sys
from typing import Any, Literal, TextIO, cast

import structlog

from nbdserve.observe.streams import LogFile

LogFormat = Literal["console", "json"]

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


def configure(log_format: LogFormat = "console", level: str = "info") -> None:
    """Set up logging for the whole process; only `app` and `cli` may call this.

    Args:
        log_format: `console` for people (coloured on a terminal), `json` for one object
            a line with `event`, `level` and an ISO 8601 `timestamp` in UTC.
        level: `debug`, `info`, `warning` or `error`.
    """
    processors: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.StackInfoRenderer(),
    ]
    if log_format == "json":
        processors += [
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.dict_tracebacks,
            structlog.processors.JSONRenderer(),
        ]
    else:
        processors += [
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(),
                # the default one shows local variables, which takes seconds, on the loop
                exception_formatter=structlog.dev.plain_traceback,
            ),
        ]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(cast("TextIO", LogFile())),
        cache_logger_on_first_use=True,
    )
