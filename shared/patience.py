"""A call to the broker that is worth waiting for: tried again until the world lets it through."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from shared.clock import backoff_s
from shared.errors import TransientError
from shared.logs import get

Result = TypeVar("Result")

_log = get("log")


async def patiently(call: Callable[[], Awaitable[Result]], what: str) -> Result:
    """The result of `call`, tried again for as long as the world fails it."""
    attempt = 0
    while True:
        try:
            return await call()
        except TransientError as error:
            _log.warning("broker_call_failed", call=what, why=str(error))
            await asyncio.sleep(backoff_s(attempt, first_s=0.05, cap_s=5.0))
            attempt += 1
