"""A process from start to exit: signals, the one task group, what an error means, exit codes.

Exit codes: 0 drained, 1 bug, 75 the drain deadline was missed, 78 configuration.
"""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Awaitable, Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from shared.errors import ConfigError, MalformedMessage, RejectError, TransientError
from shared.logs import get
from shared.metrics import Counters

EXIT_BUG, EXIT_DRAIN, EXIT_CONFIG = 1, 75, 78

log = get("runtime")


def project_version() -> str:
    """The installed version of Seedwire, `0` from a bare checkout."""
    try:
        return version("seedwire")
    except PackageNotFoundError:
        return "0"


class Stop:
    """Set when the process should drain; the second signal ends it at once."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def set(self) -> None:
        self._event.set()

    @property
    def asked(self) -> bool:
        return self._event.is_set()

    async def wait(self) -> None:
        await self._event.wait()

    async def sleep(self, seconds: float) -> bool:
        """Wait for `seconds` or the stop; True if it is time to stop."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._event.wait()
        return self._event.is_set()


def run(main: Callable[[Stop], Awaitable[None]], *, drain_s: float = 20.0) -> int:
    """Run a process's `main` until it returns or is asked to stop; its exit code.

    `main` must return soon after its Stop is set; past `drain_s` it is cancelled.
    """
    try:
        return asyncio.run(_supervised(main, drain_s))
    except* ConfigError as group:
        for error in _leaves(group):
            log.error("configuration_error", error=str(error))
            print(f"error: {error}", file=sys.stderr)  # noqa: T201 - for whoever has no log reader
    return EXIT_CONFIG


async def _supervised(main: Callable[[Stop], Awaitable[None]], drain_s: float) -> int:
    stop = Stop()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    task = asyncio.ensure_future(main(stop))
    asked = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, asked}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            await asyncio.wait({task}, timeout=drain_s)
        if not task.done():
            log.error("drain_deadline_missed", drain_s=drain_s)
            task.cancel()
            await asyncio.wait({task})
            return EXIT_DRAIN
        task.result()
        return 0
    finally:
        asked.cancel()


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    leaves: list[BaseException] = []
    for error in group.exceptions:
        leaves += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return leaves


Outcome = Literal["done", "rejected", "again", "failed"]


async def settle(
    handling: Awaitable[object], counters: Counters, *, what: str
) -> tuple[Outcome, str]:
    """Await one message's handling; a failing handler costs that message, not the process.

    Returns what became of it and why. ConfigError and cancellation pass through.
    """
    try:
        await handling
    except MalformedMessage as error:
        counters.add("messages_malformed")
        log.warning("message_malformed", what=what, error=str(error))
        return "rejected", str(error)
    except RejectError as error:
        log.info("message_rejected", what=what, error=str(error))
        return "rejected", str(error)
    except TransientError as error:
        log.warning("message_put_off", what=what, error=str(error), delay_s=error.delay_s)
        return "again", str(error)
    except ConfigError:
        raise
    except Exception as error:  # the one place: a bug costs one message
        counters.add("messages_failed")
        log.exception("message_failed", what=what)
        return "failed", repr(error)
    return "done", ""
