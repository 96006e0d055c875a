"""What one run came to, point by point, and what it cost to come so far."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

Measure = Literal["accuracy", "loss"]
"""What a data set is judged by: classes by accuracy, generation by loss."""
Ended = Literal["finished", "budget", "goal", "diverged"]
"""Why a run went no further: all its rounds, its tokens, nothing more to gain, or no loss left."""


@dataclass(frozen=True, slots=True)
class Point:
    """Where the adapter stands after `commits`, and what all devices together have spent so far.

    `forward_tokens` counts every token that a device sent forward; a row that goes backward too
    counts the tokens that it sent forward. Bytes are those of one device, on average.
    """

    commits: int
    forward_tokens: int
    loss: float
    """Held-out, nats per example, or per token where the loss is of tokens."""
    accuracy: float
    wall_s: float
    up_bytes: float
    down_bytes: float


@dataclass(frozen=True, slots=True)
class Curve:
    """One run of one row; its first point is the start, before any commit."""

    row: str
    dataset: str
    seed: int
    points: tuple[Point, ...]
    peak_mb: float = 0.0
    """Highest resident memory of what one device computes with, MB."""
    facts: dict[str, float] = field(default_factory=dict[str, float])
    """Further numbers of the run, by name."""
    ended: Ended = "finished"

    def record(self) -> dict[str, Any]:
        """As JSON knows it."""
        return msgspec.to_builtins(self)

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Curve":
        """The curve that `record` was made of."""
        return msgspec.convert(record, cls)

    def best(self, measure: Measure) -> float:
        """The best value of `measure` at any point."""
        values = [getattr(point, measure) for point in self.points]
        return max(values) if measure == "accuracy" else min(values)

    @property
    def last(self) -> Point:
        return self.points[-1]


@dataclass(frozen=True, slots=True)
class Cost:
    """Forward tokens; where the target was not `reached`, those that were spent."""

    tokens: float
    reached: bool


def tokens_to(
    curve: Curve, start: float, goal: float, share: float, measure: Measure = "accuracy"
) -> Cost:
    """What it took until `measure` first reached start + share * (goal - start)."""
    target = start + share * (goal - start)
    for point in curve.points:
        value: float = getattr(point, measure)
        if value >= target if measure == "accuracy" else value <= target:
            return Cost(point.forward_tokens, reached=True)
    return Cost(curve.last.forward_tokens, reached=False)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
