"""Structured logs: one constant `snake_case` fact a line, values as keys; never payloads."""

import logging
import os
import sys
import time
from collections.abc import Callable, MutableMapping
from typing import Any, TextIO, cast

import structlog

BURST, LINES_A_SECOND = 200.0, 5.0
"""Of warnings and facts that are alike: so many at once, and so many in the long run."""


class _Stderr:
    """Whatever stderr is when a line is written: it may be replaced, and the old one closed."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def configure(program: str, *, level: str = "info", as_json: bool | None = None) -> None:
    """Send this process's log to stderr: JSON, or for people where stderr is a terminal.

    NO_COLOR in the environment leaves those lines without colours.
    """
    if as_json is None:
        as_json = not sys.stderr.isatty()
    numeric = cast("int", getattr(logging, level.upper(), logging.INFO))
    structlog.configure(
        processors=[
            Sparing(),
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer()
            if as_json
            else structlog.dev.ConsoleRenderer(
                colors=not os.environ.get("NO_COLOR"),
                exception_formatter=structlog.dev.plain_traceback,
            ),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(numeric),
        logger_factory=structlog.WriteLoggerFactory(file=cast("TextIO", _Stderr())),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(program=program)
    # Libraries that log the classic way (nats, aiohttp) speak only when something is wrong.
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr)


class Sparing:
    """Leaves out lines of an event that comes too often, so that no peer can fill the disk.

    The next line of that event says how many were `left_out`. Errors and debug lines all stay.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._left: dict[str, tuple[float, float, int]] = {}
        """By event: lines that it may still write, as of when, and how many were left out."""

    def __call__(
        self, _: object, method: str, line: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        if method not in ("info", "warning"):
            return line
        event, now = str(line.get("event")), self._now()
        room, at, left_out = self._left.get(event, (BURST, now, 0))
        room = min(BURST, room + (now - at) * LINES_A_SECOND)
        if room < 1:
            self._left[event] = (room, now, left_out + 1)
            raise structlog.DropEvent
        self._left[event] = (room - 1, now, 0)
        return {**line, "left_out": left_out} if left_out else line


def get(name: str) -> structlog.stdlib.BoundLogger:
    """The logger of one part of a process."""
    return cast("structlog.stdlib.BoundLogger", structlog.get_logger(area=name))
