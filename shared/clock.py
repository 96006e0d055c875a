"""Time as an argument: what code that must wait or measure is given instead of `time`."""

import asyncio
import random
import time
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Seconds since some fixed moment; never goes back."""
        ...

    async def sleep(self, seconds: float) -> None: ...


class SystemClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def jittered(seconds: float, *, spread: float = 0.5) -> float:
    """`seconds` within +-`spread` of itself, so that many waiters do not come as one herd."""
    return seconds * (1 + spread * (2 * random.random() - 1))  # noqa: S311 - no secret hangs on it


def backoff_s(attempt: int, *, first_s: float = 0.2, cap_s: float = 15.0) -> float:
    """How long to wait before retry `attempt` (from 0): doubling, capped, jittered."""
    return jittered(min(cap_s, first_s * 2.0 ** min(attempt, 30)))
