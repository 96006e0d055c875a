"""An engine double: holds real adapters, and measures numbers that follow from what it is asked."""

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np

from shared.adapter import Adapter
from shared.engine.protocol import (
    AnswerUnion,
    Apply,
    CloseJob,
    Done,
    Evaluate,
    Evaluated,
    Opened,
    OpenJob,
    Probe,
    Probed,
    RequestUnion,
    Restore,
    Standing,
)
from shared.errors import EngineDied, EngineError
from shared.messages import EvaluateResult, ProbeResult

ROWS = 6


class EngineDouble:
    """The child process of one device; `dies` says whether this request is its last."""

    def __init__(
        self, device: str, probe_s: Callable[[], float], dies: Callable[[], bool], rows: int
    ) -> None:
        self.generation = 1
        self._device = device
        self._probe_s = probe_s
        self._dies = dies
        self._rows = rows
        self._manifests: dict[str, bytes] = {}
        self._adapters: dict[str, Adapter] = {}

    @property
    def peak_rss_mb(self) -> float:
        return 0.0

    async def ask(self, request: RequestUnion, *, timeout_s: float) -> AnswerUnion:
        try:
            await asyncio.sleep(self._probe_s() * _units(request))
        except asyncio.CancelledError:
            await self.close()
            raise
        if self._dies():
            await self.close()
            raise EngineDied(f"the engine was ended during {type(request).__name__}")
        return self._answer(request)

    async def close(self) -> None:
        self.generation += 1
        self._manifests.clear()
        self._adapters.clear()

    def _answer(self, request: RequestUnion) -> AnswerUnion:
        match request:
            case OpenJob():
                self._manifests[request.job] = request.manifest
                adapter = self._adapters[request.job] = Adapter(request.manifest)
                heldout = ROWS if request.heldout else 0
                return Opened(
                    digest=adapter.digest(),
                    rows=self._rows,
                    heldout_rows=heldout,
                    refused_rows=0,
                    refused=[],
                )
            case Restore():
                adapter = Adapter.from_bytes(
                    self._manifests[request.job], Path(request.path).read_bytes()
                )
                self._adapters[request.job] = adapter
                return Standing(adapter.round, adapter.digest())
            case Apply():
                adapter = self._adapter(request.job)
                adapter.apply(request.round, request.commit)
                return Standing(adapter.round, adapter.digest())
            case Probe():
                self._standing_at(request.job, request.digest)
                return Probed(self._probed(request), 0.01 + self._probe_s() * _units(request), 9)
            case Evaluate():
                self._standing_at(request.job, request.digest)
                chance = random.Random(f"{self._device} {request.digest}")
                loss = chance.uniform(0, 9)
                result = EvaluateResult(ROWS, chance.randint(0, ROWS), ROWS, loss)
                return Evaluated(result, 0.1, 9)
            case CloseJob():
                self._adapters.pop(request.job, None)
                return Done()
            case _:
                raise EngineError(f"{type(request).__name__} is not doubled")

    def _probed(self, request: Probe) -> ProbeResult:
        count = sum(length for _, length in request.ranges)
        chance = random.Random(f"{self._device} {request.job} {request.round} {request.ranges}")
        numbers = [chance.randint(-(2**22), 2**22) for _ in range(count)]
        return ProbeResult(
            how=request.how,
            ranges=request.ranges,
            differences=np.array(numbers, "<i4").tobytes(),
            bends=np.array([abs(n) // 7 for n in numbers], "<i4").tobytes(),
            loss=chance.randint(0, 2**24),
            weight=chance.randint(1, 9),
        )

    def _adapter(self, job: str) -> Adapter:
        if job not in self._adapters:
            raise EngineError(f"job {job} is not open")
        return self._adapters[job]

    def _standing_at(self, job: str, digest: str) -> None:
        if self._adapter(job).digest() != digest:
            raise EngineError("asked to measure at an adapter that is not there")


def _units(request: RequestUnion) -> float:
    match request:
        case Probe():
            return sum(count for _, count in request.ranges)
        case Evaluate():
            return ROWS
        case OpenJob():
            return 2
        case _:
            return 0.02
