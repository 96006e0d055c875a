"""Waiting for a fact instead of sleeping for a while."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable


async def wait_until(
    predicate: Callable[[], bool | Awaitable[bool]], *, timeout_s: float = 10.0, what: str = ""
) -> None:
    """Return as soon as `predicate()` is true; fail the test if it is not in time."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = predicate()
        if (await value) if inspect.isawaitable(value) else value:
            return
        if time.monotonic() > deadline:
            raise AssertionError(f"not true within {timeout_s:g} s: {what or predicate}")
        await asyncio.sleep(0.005)
