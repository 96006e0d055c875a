"""Runs side by side, each in a process of its own; what is kept already is not made again."""

import asyncio
import os
import sys
import time

import msgspec

from deploy.demo.processes import ROOT
from shared.orphans import ends_with_parent
from tests.bench.learn.curve import Curve
from tests.bench.learn.orders import Order, kept

LAST_WORDS = 4000
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}
"""numpy's threads spin against the model's, as in the engine's child."""


class RunFailed(Exception):
    """A run came to nothing; the text is the end of what it said."""


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
                await self._made(order)
            curve = kept(order)
        if curve is None:
            raise RunFailed(f"learn: {order.name} has left nothing in the cache")
        return curve

    async def _made(self, order: Order) -> None:
        began = time.monotonic()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.bench.learn.running"),
            msgspec.json.encode(order).decode(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, **ONE_THREAD},
            preexec_fn=ends_with_parent(),
        )
        try:
            _, said = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        seconds = time.monotonic() - began
        if process.returncode:
            words = said.decode(errors="replace")[-LAST_WORDS:]
            raise RunFailed(f"learn: {order.name} exited with {process.returncode}:\n{words}")
        print(f"learn: {order.name} took {seconds:.0f} s", file=sys.stderr, flush=True)
