"""The pool of a round: integer sums over its directions, so that the order of arrival is nothing.

Each half of the updates is summed apart; the halves together are the pool, their agreement is its
signal-to-noise.

Source: papers on variance-controlled pacing (FwdLLM, ATC 2024) for comparing two halves.
Differs in: the unbiased ratio <a, b> / (|a - b|^2 / 4) instead of a raw variance, which depends on
the scale of the loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shared.errors import InvalidUpdate
from shared.messages import PoolSums, ProbeResult, Range, WalkSums
from shared.ranges import width

QUANTUM = 2.0**-20
"""One step of a loss difference, nats."""


@dataclass
class Pool:
    """Sums over `directions` P: (2, P) int64 by half, and (P,) int64 bends."""

    directions: int
    differences: NDArray[np.int64] = field(init=False)
    weights: NDArray[np.int64] = field(init=False)
    bends: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.differences = np.zeros((2, self.directions), np.int64)
        self.weights = np.zeros((2, self.directions), np.int64)
        self.bends = np.zeros(self.directions, np.int64)

    def add(self, sums: PoolSums) -> None:
        """Add what an UpdatesFolded carries."""
        first, count = sums.span
        span = slice(first, first + count)
        self.differences[sums.half, span] += np.frombuffer(sums.differences, "<i8")
        self.weights[sums.half, span] += np.frombuffer(sums.weights, "<i8")
        if sums.bends:
            self.bends[span] += np.frombuffer(sums.bends, "<i8")

    def add_walk(self, sums: WalkSums) -> None:
        """Add a half's walks: their word is on every direction, 0 where they did not go."""
        indices = indices_of(sums.ranges)
        self.differences[sums.half, indices] += np.frombuffer(sums.differences, "<i8")
        self.weights[sums.half] += sums.share

    @property
    def measured(self) -> NDArray[np.bool]:
        """Which directions anyone has measured: (P,)."""
        return (self.weights[0] > 0) | (self.weights[1] > 0)

    def slopes(self, eps: float) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """rho_j in nats per unit of weight and of theta, 0 where unmeasured; and W_j. Both (P,)."""
        return _slopes(self.differences.sum(axis=0), self.weights.sum(axis=0), eps)

    def half(self, half: int, eps: float) -> NDArray[np.float64]:
        """Weight times slope of one half: (P,) float64."""
        return self.differences[half] * (QUANTUM / (2 * eps))

    def signal(self, eps: float) -> float | None:
        """Signal-to-noise of the slopes: 0 is all noise, 1 as much signal. None: one half only."""
        a, a_weight = _slopes(self.differences[0], self.weights[0], eps)
        b, b_weight = _slopes(self.differences[1], self.weights[1], eps)
        both = (a_weight > 0) & (b_weight > 0)
        noise = float(np.square(a - b)[both].sum()) / 4
        return float((a * b)[both].sum()) / noise if noise > 0 else None


def _slopes(
    differences: NDArray[np.int64], weights: NDArray[np.int64], eps: float
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    measured = weights > 0
    slopes = np.zeros(len(weights), np.float64)
    np.divide(differences * (QUANTUM / (2 * eps)), weights, out=slopes, where=measured)
    return slopes, weights


@dataclass
class Batch:
    """Updates of one batch, summed before they are logged."""

    directions: int
    pool: Pool = field(init=False)
    touched: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])

    def __post_init__(self) -> None:
        self.pool = Pool(self.directions)

    def add(self, result: ProbeResult, half: int) -> None:
        """Count one update, whose shape `check` has found right."""
        differences = np.frombuffer(result.differences, "<i4")
        bends = np.frombuffer(result.bends, "<i4")
        at = 0
        for first, count in result.ranges:
            span = slice(first, first + count)
            self.pool.differences[half, span] += differences[at : at + count]
            self.pool.weights[half, span] += result.weight
            if len(bends):
                self.pool.bends[span] += bends[at : at + count]
            at += count
            self.touched.append((first, first + count))

    def sums(self, round: int = 0) -> list[PoolSums]:
        """What to log of `round` (0: the open one): one entry for each half that was touched."""
        if not self.touched:
            return []
        low = min(first for first, _ in self.touched)
        high = max(end for _, end in self.touched)
        found: list[PoolSums] = []
        bends = self.pool.bends[low:high]
        for half in (0, 1):
            weights = self.pool.weights[half, low:high]
            if not weights.any():
                continue
            uniform = bool((weights == weights[0]).all())
            found.append(
                PoolSums(
                    span=(low, high - low),
                    half=half,
                    differences=self.pool.differences[half, low:high].astype("<i8").tobytes(),
                    bends=bends.astype("<i8").tobytes() if bends.any() else b"",
                    weights=(weights[:1] if uniform else weights).astype("<i8").tobytes(),
                    round=round,
                )
            )
            bends = np.zeros(0, np.int64)  # both halves share them: logged once
        return found


def check(result: ProbeResult, directions: int) -> None:
    """Find a result whose parts do not fit together or the round.

    Raises:
        InvalidUpdate: says which part.
    """
    count = width(result.ranges)
    if len(result.differences) != 4 * count:
        raise InvalidUpdate(
            f"{count} directions but {len(result.differences)} bytes of differences"
        )
    if result.bends and len(result.bends) != 4 * count:
        raise InvalidUpdate(f"{count} directions but {len(result.bends)} bytes of bends")
    check_ranges(result.ranges, directions)
    if count and not result.weight:
        raise InvalidUpdate("probes of weight 0")


def check_ranges(ranges: Sequence[Range], directions: int) -> None:
    """Find a direction that is named twice or lies outside the pool.

    Raises:
        InvalidUpdate: names it.
    """
    end = 0
    for first, length in sorted(ranges):
        if first < end:
            raise InvalidUpdate(f"direction {first} is named twice")
        end = first + length
    if end > directions:
        raise InvalidUpdate(f"direction {end - 1} in a pool of {directions}")


def indices_of(ranges: Sequence[Range]) -> NDArray[np.intp]:
    """The directions of `ranges`, in their order: (n,)."""
    if not ranges:
        return np.zeros(0, np.intp)
    return np.concatenate([np.arange(first, first + count) for first, count in ranges])


def slopes_of(result: ProbeResult, eps: float) -> NDArray[np.float64]:
    """One update's own slopes: (n,) float64 in the order of its ranges."""
    scale = QUANTUM / (2 * eps * max(1, result.weight))
    return np.frombuffer(result.differences, "<i4") * scale
