"""The one engine of the device, and whether what it was told is still there.

Jobs live in the child process. `life` changes whenever a child and all that it held are gone, so
whoever opened a job sees at once that it has to be opened again.
"""

import asyncio
from typing import Protocol, TypeVar

from shared.engine.protocol import AnswerUnion, RequestUnion, Worker
from shared.errors import EngineDied, EngineError
from shared.logs import get
from shared.metrics import Counters

log = get("engine")

Answered = TypeVar("Answered")


class EngineLost(EngineError):
    """The child that held the job is gone; nothing was asked. Open the job again."""


class Restartable(Worker, Protocol):
    """What EngineProcess offers beyond Worker."""

    generation: int


class Engine:
    """One request at a time, and never to a child that does not know the job."""

    def __init__(self, process: Restartable, counters: Counters, *, timeout_s: float) -> None:
        self._process = process
        self._counters = counters
        self._timeout_s = timeout_s
        self._turn = asyncio.Lock()
        self.life = 0

    async def ask(
        self, request: RequestUnion, expected: type[Answered], *, life: int | None = None
    ) -> Answered:
        """The child's answer. `life`: only if that is still the engine's.

        Cancelling it ends the child.

        Raises:
            EngineLost: another child has taken the place of the one that is meant.
            EngineDied: the child ended in the middle of it, or was silent for too long.
            EngineError: the child refused.
        """
        async with self._turn:
            if life is not None and life != self.life:
                raise EngineLost("the engine was restarted")
            answered = refused = False
            answer: AnswerUnion | None = None
            try:
                answer = await self._process.ask(request, timeout_s=self._timeout_s)
                answered = True
            except EngineDied as error:
                self._counters.add("engine_deaths")
                log.warning("engine_died", asked=type(request).__name__, why=str(error))
                raise
            except EngineError:
                refused = True
                raise
            except OSError as error:
                raise EngineError(f"the engine cannot be started: {error}") from error
            finally:
                if not answered and not refused:
                    self.life += 1
        if not isinstance(answer, expected):
            raise EngineError(f"the engine answered {type(answer).__name__}")
        return answer

    async def rest(self) -> None:
        """End the child, and so give its memory back; it is started again when asked."""
        async with self._turn:
            self.life += 1
            await self._process.close()
