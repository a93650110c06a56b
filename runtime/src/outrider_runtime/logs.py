"""Logs as logfmt or JSON lines on standard error, for our own code and for libraries alike.

An event is a constant text; what varies goes into fields, so that logs can be searched. Never put
a secret into a field. Uses structlog, so that neither format is written here.
"""

import logging
import sys
from collections.abc import Collection
from typing import Annotated, Any, Literal, TextIO

import structlog
from msgspec import Meta
from structlog.typing import EventDict, Processor, WrappedLogger

from outrider_runtime.settings import Section

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["logfmt", "json"]


class LogSettings(Section, frozen=True):
    """What is logged, and how."""

    level: Annotated[
        Level, Meta(description="Least level that is logged: debug, info, warning or error.")
    ] = "info"
    format: Annotated[Format, Meta(description="Form of the lines: logfmt or json.")] = "logfmt"


def _order(_logger: WrappedLogger, _name: str, event: EventDict) -> EventDict:
    """Put the fields that every line has in front, the rest as they came."""
    first = {
        "ts": event.pop("timestamp"),
        "level": event.pop("level"),
        "logger": event.pop("logger", ""),
        "msg": event.pop("event"),
    }
    return {**first, **event}


def _printable(_logger: WrappedLogger, _name: str, event: EventDict) -> EventDict:
    """Make values fit on one line: logfmt refuses some types, and nothing may break a line."""
    for key, value in event.items():
        if value is not None and not isinstance(value, bool | int | float | str):
            event[key] = str(value)
    if isinstance(event.get("exception"), str):
        event["exception"] = event["exception"].replace("\n", " | ")
    return event


def configure(
    level: str = "info",
    line_format: str = "logfmt",
    stream: TextIO | None = None,
    hidden: Collection[str] = (),
) -> None:
    """Set up logging for the process.

    Args:
        level: "debug", "info", "warning" or "error".
        line_format: "logfmt" or "json".
        stream: Where to; standard error by default.
        hidden: Fields that are left out: what libraries attach to their records for themselves.
    """
    shared: list[Processor] = [
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.stdlib.ExtraAdder(),
    ]

    def hide(_logger: WrappedLogger, _name: str, event: EventDict) -> EventDict:
        for field in hidden:
            event.pop(field, None)
        return event

    renderer: Processor = (
        structlog.processors.JSONRenderer()
        if line_format == "json"
        else structlog.processors.LogfmtRenderer(bool_as_flag=False)
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            hide,
            structlog.processors.format_exc_info,
            _order,
            _printable,
            renderer,
        ],
    )
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared[:-1],
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


def set_level(level: str) -> None:
    """Change the least level that is logged, from the next line on."""
    logging.getLogger().setLevel(level.upper())


def get_logger(name: str, **fields: Any) -> structlog.stdlib.BoundLogger:
    """A logger whose lines all carry the given fields."""
    # Bound at the first line and not here: modules make their loggers before `configure` ran.
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name, **fields)
    return logger
