"""The processes of a simulated fleet: started, killed at a boundary, and started again."""

import asyncio
import traceback
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from shared.errors import ConfigError, Fenced
from shared.runtime import Stop
from tests.chaos.brokers import WatchedBroker
from tests.chaos.faults import Fault
from tests.chaos.links import ChaosLink, Weather
from tests.chaos.simulation import PROCESS, SimulatedTask

DRAIN_S = 20.0


class Killed(BaseException):
    """The process ends here, and nothing that it would do on its way out reaches the world."""


class Process:
    """One process, through all its lives. `body` is what a life does."""

    def __init__(
        self,
        name: str,
        broker: WatchedBroker,
        weather: Weather,
        body: Callable[["Process"], Awaitable[None]],
        note: Callable[[str, str], None],
    ) -> None:
        self.name = name
        self.alive = False
        self.lives = 0
        self.steps = 0
        self.ready_at: float | None = None
        self.link: ChaosLink
        self.stop = Stop()
        self.kills: dict[int, Fault] = {}
        self.struck: Callable[[Fault, str], None] = lambda fault, step: None
        self.fenced: Callable[[], None] = lambda: None
        self.crashed: Callable[[str], None] = lambda text: None
        self._broker = broker
        self._weather = weather
        self._body = body
        self._note = note
        self._tasks: dict[SimulatedTask, None] = {}
        self._down_s = 1.0
        self._over = False
        self._root: asyncio.Task[None] | None = None

    # ---- what its code passes

    def step(self, what: str) -> None:
        if not self.alive:
            raise Killed
        self.steps += 1
        self._note(self.name, what)
        fault = self.kills.pop(self.steps, None)
        if fault is not None:
            self.struck(fault, what)
            self.kill(fault.for_s)
            raise Killed

    def born(self, task: SimulatedTask) -> None:
        """A task of this life has begun."""
        self._tasks[task] = None
        task.add_done_callback(self._died)

    def _died(self, task: SimulatedTask) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled():
            task.exception()  # whoever waits for it sees it; nobody waits for a killed one's

    # ---- what is done to it

    def kill(self, down_s: float) -> None:
        """It is gone, now; started again after `down_s`."""
        if not self.alive:
            return
        self._note(self.name, "killed")
        self.alive = False
        self.ready_at = None
        self._down_s = down_s
        self.link.inner.abandon()
        for task in list(self._tasks):
            task.cancel()

    def terminate(self, down_s: float) -> None:
        """As SIGTERM does; killed if it takes too long."""
        if self.alive:
            self._note(self.name, "terminated")
            self._down_s = down_s
            self.ready_at = None
            self.stop.set()

    async def live(self) -> None:
        """Lives, one after the other, until it is told to end."""
        PROCESS.set(self)
        while not self._over:
            self.lives += 1
            self.alive, self.stop, self._down_s = True, Stop(), 1.0
            self.link = ChaosLink(self._broker.connect(self.name), self, self._weather)
            self._note(self.name, f"life {self.lives}")
            root = self._root = asyncio.ensure_future(self._life())
            await asyncio.wait({root})
            again = self._judged(root, asked=self.stop.asked)
            if self.alive:
                await self.link.close()
            self.alive, self.ready_at = False, None
            await self._swept()
            if not again:
                return
            if not self._over:
                await asyncio.sleep(self._down_s)

    async def end(self) -> None:
        """Drain, as an operator would have it at the end."""
        self._over = True
        if self.alive:
            self.stop.set()
            root = self._root
            if root is not None:
                await asyncio.wait({root}, timeout=DRAIN_S)
                if not root.done():
                    self.crashed("it did not drain")
                    self.kill(0)

    async def _swept(self) -> None:
        """None of its tasks is left."""
        left = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left)

    async def _life(self) -> None:
        await self._body(self)

    def _judged(self, root: "asyncio.Task[None]", *, asked: bool) -> bool:
        """Whether it may be started again."""
        if not self.alive:
            return True
        error = None if root.cancelled() else root.exception()
        leaves = list(_leaves(error)) if error is not None else []
        if any(isinstance(leaf, Fenced) for leaf in leaves):
            self._note(self.name, "fenced")
            self.fenced()
            return False
        for leaf in leaves:
            where = "".join(traceback.format_exception(leaf))[-1500:]
            kind = "configuration" if isinstance(leaf, ConfigError) else "a bug"
            self.crashed(f"it ended by {kind}: {where}")
        if not leaves and not asked:
            self.crashed("it ended of itself")
        return True


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        group: BaseExceptionGroup[Any] = error
        for each in group.exceptions:
            yield from _leaves(each)
    else:
        yield error
