"""Structured logs: one constant `snake_case` fact a line, values as keys; never payloads."""

import logging
import sys
from typing import cast

import structlog


def configure(program: str, *, level: str = "info", as_json: bool | None = None) -> None:
    """Send this process's log to stderr: JSON, or for people where stderr is a terminal."""
    if as_json is None:
        as_json = not sys.stderr.isatty()
    numeric = cast("int", getattr(logging, level.upper(), logging.INFO))
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer()
            if as_json
            else structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(numeric),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(program=program)
    # Libraries that log the classic way (nats, aiohttp) speak only when something is wrong.
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr)


def get(name: str) -> structlog.stdlib.BoundLogger:
    """The logger of one part of a process."""
    return cast("structlog.stdlib.BoundLogger", structlog.get_logger(area=name))
