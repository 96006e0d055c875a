"""What a finished piece of work is, whatever its kind."""

from dataclasses import dataclass
from typing import Protocol, TypeVar

from edge_client.state import Speeded
from shared.engine.protocol import RequestUnion
from shared.messages import EvaluateResult, ProbeResult, SubmitUpdate, WalkResult, WorkAssigned

Answered = TypeVar("Answered")


class Ask(Protocol):
    """A question to the engine that stands where the work wants it."""

    async def __call__(self, request: RequestUnion, expected: type[Answered]) -> Answered: ...


@dataclass(frozen=True, slots=True)
class Measured:
    """A result, and what it cost: `unit_s` is the time of one unit of the speed `what`."""

    result: ProbeResult | EvaluateResult | WalkResult
    seconds: float
    passes: int
    what: Speeded
    unit_s: float

    def update(self, assigned: WorkAssigned) -> SubmitUpdate:
        """As it goes to the aggregator."""
        return SubmitUpdate(
            key=assigned.key,
            digest=assigned.digest,
            result=self.result,
            work_s=self.seconds,
            passes=self.passes,
        )
