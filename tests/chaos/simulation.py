"""Virtual time: an event loop that never waits, and a clock that ticks coarsely while all is still.

Hours pass in milliseconds, and twice the same way: tasks are hashed by their number, so that no set
of tasks is ever walked in the order of addresses.
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from typing import Any

QUIET_TICK_S = 15.0
"""A service that ticks while nothing happens at all is woken this seldom."""
TICK_S = 1.0
"""What sleeps for less is a tick."""


class Stalled(Exception):
    """Nothing is ever going to happen again."""


class _Selector:
    """Moves the time on instead of waiting for it."""

    def __init__(self, loop: "SimulatedLoop") -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise Stalled(f"at {self._loop.time():.3f} s")
        self._loop.now += max(0.0, timeout)
        return []

    def close(self) -> None:
        """There is nothing to close."""


class SimulatedTask(asyncio.Task[Any]):
    """A task whose place in a set follows from when it was made."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], number: int, **options: Any) -> None:
        self.number = number
        super().__init__(coroutine, **options)

    def __hash__(self) -> int:
        return self.number


class SimulatedLoop(asyncio.BaseEventLoop):
    """`born` is told of every task that begins."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.born: Callable[[SimulatedTask], None] = lambda task: None
        self.disk_s: Callable[[], float] = lambda: 0.0
        """How long the next piece of work given to a thread takes."""
        self._tasks_made = 0
        self._selector = _Selector(self)
        self._clock_resolution = 1e-9
        self.set_task_factory(self._make)  # pyright: ignore[reportArgumentType]

    def time(self) -> float:
        return self.now

    def run_in_executor(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, executor: object, func: Callable[..., Any], *args: Any
    ) -> "asyncio.Future[Any]":
        """`func` runs here, all at once, a little later; its result comes later still."""
        future = self.create_future()
        self.call_later(self.disk_s(), self._executed, future, func, args)
        return future

    def _executed(
        self, future: "asyncio.Future[Any]", func: Callable[..., Any], args: tuple[Any, ...]
    ) -> None:
        try:
            result = func(*args)
        except BaseException as error:  # noqa: BLE001 - handed on, as a thread would
            self.call_later(self.disk_s(), _handed, future.set_exception, future, error)
        else:
            self.call_later(self.disk_s(), _handed, future.set_result, future, result)

    def _make(
        self, loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any], **options: Any
    ) -> SimulatedTask:
        self._tasks_made += 1
        task = SimulatedTask(coroutine, self._tasks_made, loop=loop, **options)
        self.born(task)
        return task

    def _process_events(self, event_list: list[Any]) -> None:
        """There are none: all that happens is scheduled here."""

    def _write_to_self(self) -> None:
        """Nobody sleeps who would have to be woken."""


def _handed(hand: Callable[[Any], None], future: "asyncio.Future[Any]", what: Any) -> None:
    if not future.done():
        hand(what)


class SimulatedClock:
    """Reads hours off the truth, and ticks coarsely while `activity` stands still."""

    def __init__(self, loop: SimulatedLoop, activity: Callable[[], int], offset_s: float) -> None:
        self._loop = loop
        self._activity = activity
        self._offset_s = offset_s
        self._seen = -1
        self._stretch = 1.0

    def now(self) -> float:
        return self._loop.time() + self._offset_s

    async def sleep(self, seconds: float) -> None:
        if seconds < TICK_S:
            seen = self._activity()
            self._stretch = 1.0 if seen != self._seen else 2 * self._stretch
            self._seen = seen
            seconds = min(QUIET_TICK_S, seconds * self._stretch)
        await asyncio.sleep(seconds)


PROCESS: ContextVar[Any] = ContextVar("process", default=None)
"""The process that a task belongs to."""
