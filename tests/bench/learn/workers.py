"""Runs side by side, each in a process of its own; what is kept already is not made again."""

import asyncio

import msgspec

from tests.bench.learn.curve import Curve
from tests.bench.learn.orders import Order, kept
from tests.bench.processes import RunFailed, run_module

ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}
"""numpy's threads spin against the model's, as in the engine's child."""


class Workers:
    """At most `at_once` processes; a run that fails ends the others."""

    def __init__(self, at_once: int) -> None:
        self._places = asyncio.Semaphore(at_once)

    async def curve(self, order: Order) -> Curve:
        """What the order's run comes to, now or before.

        Raises:
            RunFailed: it came to nothing.
        """
        curve = kept(order)
        if curve is None:
            async with self._places:
                await run_module(
                    f"learn: {order.name}",
                    "tests.bench.learn.running",
                    msgspec.json.encode(order).decode(),
                    environment=ONE_THREAD,
                )
            curve = kept(order)
        if curve is None:
            raise RunFailed(f"learn: {order.name} has left nothing in the cache")
        return curve
