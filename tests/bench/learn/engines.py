"""The engine's own handling of requests, in this process: what a child would do, where it is asked.

Nothing of the engine is doubled: requests go to `worker.Child`, and models are llama.cpp's. Two
things differ. Devices of one job stand at the same adapter, so the first to apply a close does it
for all (each checks its digest against the log as ever). And what a piece of work takes is not
measured but follows from its tokens, so that a run is a function of its settings.
"""

import asyncio

from msgspec.structs import replace

from shared.adapter import Adapter
from shared.engine.evaluating import evaluate
from shared.engine.job import Job
from shared.engine.llama import LlamaEngine
from shared.engine.protocol import (
    AnswerUnion,
    Apply,
    Evaluate,
    Failed,
    OpenJob,
    RequestUnion,
)
from shared.engine.worker import Child
from shared.errors import EngineError
from shared.messages import Commit, EvaluateResult

TOKENS_A_SECOND = 40_000
"""Of virtual time: about what one core sends forward of the benchmark's model."""
KEPT = 8


class Closes:
    """The adapter after each of the newest closes, for all who stood at the one before it."""

    def __init__(self) -> None:
        self._after: dict[tuple[str, int], Adapter] = {}

    def after(self, adapter: Adapter, round: int, commit: Commit | None) -> Adapter:
        key = (adapter.digest(), round)
        if key not in self._after:
            while len(self._after) >= KEPT:
                del self._after[next(iter(self._after))]
            self._after[key] = adapter.after(round, commit)
        return self._after[key]


class _Child(Child):
    def __init__(self, engine: LlamaEngine, closes: Closes) -> None:
        super().__init__(engine)
        self._closes = closes

    def _do(self, request: RequestUnion) -> AnswerUnion:
        if isinstance(request, Apply):
            job = self._job(request.job)
            job.adapter = self._closes.after(job.adapter, request.round, request.commit)
            return job.standing()
        return super()._do(request)


class InProcess:
    """Stands where a device's EngineProcess would; the event loop's time is virtual."""

    def __init__(self, closes: Closes) -> None:
        self.generation = 1
        self.opened: OpenJob | None = None
        self.first: RequestUnion | None = None
        """The first piece of work, at theta = 0 or wherever the device came in."""
        self._child = _Child(LlamaEngine(), closes)

    @property
    def peak_rss_mb(self) -> float:
        return 0.0

    async def ask(self, request: RequestUnion, *, timeout_s: float) -> AnswerUnion:
        """The engine's answer, after as long as its tokens take.

        Raises:
            EngineError: the engine refused.
        """
        answer = self._child.answer(request)
        if isinstance(answer, Failed):
            if answer.bug:
                raise RuntimeError(answer.reason)
            raise EngineError(answer.reason)
        passes: int | None = getattr(answer, "passes", None)
        if isinstance(request, OpenJob):
            self.opened = request
        if passes is not None:  # a piece of work, of whatever kind
            self.first = self.first or request
            seconds = max(passes, 1) / TOKENS_A_SECOND
            answer = replace(answer, seconds=seconds)
            await asyncio.sleep(seconds)
        return answer

    async def close(self) -> None:
        self.generation += 1


class Judge:
    """Held-out rows outside the fleet: stands at every commit, measures when it is asked."""

    def __init__(self, request: OpenJob, closes: Closes) -> None:
        self._job = Job(request, LlamaEngine())
        self._closes = closes

    def apply(self, round: int, commit: Commit | None, digest: str) -> None:
        """Stand after a close, which must lead to `digest`."""
        self._job.adapter = self._closes.after(self._job.adapter, round, commit)
        assert self._job.adapter.digest() == digest

    def measured(self) -> EvaluateResult:
        """Loss and answers where the judge stands.

        Raises:
            EngineError: the loss is not finite.
        """
        digest = self._job.adapter.digest()
        return evaluate(self._job, Evaluate(job=self._job.request.job, digest=digest))
