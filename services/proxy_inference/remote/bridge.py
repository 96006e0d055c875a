"""Lets a worker's thread wait for what the event loop does for it."""

import asyncio
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

from shared.errors import EngineError

Result = TypeVar("Result")


class Bridge:
    """Made on the event loop; crossed by threads."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waited_for: set[Future[Any]] = set()
        self._stopped = False

    def begin(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        """`work` has begun; its end is to be waited for with `end`."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        self._waited_for.add(future)
        future.add_done_callback(self._waited_for.discard)
        if self._stopped:
            future.cancel()
        return future

    def end(self, future: Future[Result]) -> Result:
        """What the work came to; not to be called on the event loop.

        Raises:
            EngineError: `stop` was called meanwhile.
        """
        try:
            return future.result()
        except CancelledError as error:
            raise EngineError("the proxy is stopping") from error

    def stop(self) -> None:
        """Nobody waits any more, now or later."""
        self._stopped = True
        for future in list(self._waited_for):
            future.cancel()
