"""Walks of a round, summed: each is a word on the directions it went along, with a share.

As in `pooling`, sums are of integers, and the order of arrival is nothing.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from services.aggregator.pooling import QUANTUM, check_ranges, indices_of
from shared.errors import InvalidUpdate
from shared.messages import Importance, RoundOpened, WalkResult, WalkSums
from shared.ranges import runs, width


@dataclass
class Visits:
    """Sizes of slopes and how many there were, over K directions: (K,) int64 each."""

    directions: int
    sizes: NDArray[np.int64] = field(init=False)
    visits: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.sizes = np.zeros(self.directions, np.int64)
        self.visits = np.zeros(self.directions, np.int64)

    def add(self, sums: WalkSums) -> None:
        """Add what an UpdatesFolded carries."""
        if sums.sizes:
            indices = indices_of(sums.ranges)
            self.sizes[indices] += np.frombuffer(sums.sizes, "<i8")
            self.visits[indices] += np.frombuffer(sums.visits, "<i8")

    def after(self, before: Importance | None) -> Importance:
        """These on top of what was there before."""
        sizes, visits = self.sizes, self.visits
        if before is not None:
            sizes = sizes + np.frombuffer(before.sizes, "<i8")
            visits = visits + np.frombuffer(before.visits, "<i8")
        return Importance(sizes.astype("<i8").tobytes(), visits.astype("<i8").tobytes())


@dataclass
class WalkBatch:
    """Walks of one round and one batch, summed before they are logged."""

    directions: int
    differences: NDArray[np.int64] = field(init=False)
    shares: list[int] = field(default_factory=lambda: [0, 0])
    seen: Visits = field(init=False)
    sized: bool = False
    _touched: NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        self.differences = np.zeros((2, self.directions), np.int64)
        self.seen = Visits(self.directions)
        self._touched = np.zeros((2, self.directions), np.bool_)

    def add(self, result: WalkResult, half: int) -> None:
        """Count one walk, whose shape `check` has found right."""
        indices = indices_of(result.ranges)
        differences = np.frombuffer(result.differences, "<i4").astype(np.int64)
        self.differences[half, indices] += differences * result.share
        self.shares[half] += result.share
        self.size(result, half)

    def size(self, result: WalkResult, half: int) -> None:
        """Count only what a walk says of sizes: it came late."""
        indices = indices_of(result.ranges)
        self._touched[half, indices] = True
        if result.sizes:
            self.sized = True
            self.seen.sizes[indices] += np.frombuffer(result.sizes, "<i8")
            self.seen.visits[indices] += np.frombuffer(result.visits, "<u2")

    def sums(self, round: int) -> list[WalkSums]:
        """What to log of `round`: one entry for each half that was touched."""
        found: list[WalkSums] = []
        sized = np.full(self.directions, self.sized)
        for half in (0, 1):
            indices = np.flatnonzero(self._touched[half])
            if not (len(indices) or self.shares[half]):
                continue
            told = sized[indices].any()  # both halves share the sizes: each is logged once
            sizes = np.where(sized, self.seen.sizes, 0)[indices]
            visits = np.where(sized, self.seen.visits, 0)[indices]
            sized[indices] = False
            found.append(
                WalkSums(
                    ranges=runs(indices.tolist()),
                    half=half,
                    differences=self.differences[half, indices].astype("<i8").tobytes(),
                    share=self.shares[half],
                    sizes=sizes.astype("<i8").tobytes() if told else b"",
                    visits=visits.astype("<i8").tobytes() if told else b"",
                    round=round,
                )
            )
        return found


def check(result: WalkResult, opened: RoundOpened) -> None:
    """Find a walk whose parts do not fit together or the round.

    Raises:
        InvalidUpdate: says which part.
    """
    walk = opened.walk
    if walk is None:
        raise InvalidUpdate(f"a walk in round {opened.round}, which is none of walks")
    check_ranges(result.ranges, opened.directions)
    count = width(result.ranges)
    if len(result.differences) != 4 * count:
        raise InvalidUpdate(
            f"{count} directions but {len(result.differences)} bytes of differences"
        )
    if not count <= result.steps <= walk.steps:
        raise InvalidUpdate(f"{count} directions in {result.steps} of {walk.steps} steps")
    if not walk.held:
        if result.sizes or result.visits:
            raise InvalidUpdate("sizes that nobody asked for")
        return
    if len(result.sizes) != 8 * count or len(result.visits) != 2 * count:
        raise InvalidUpdate(
            f"{count} directions but {len(result.sizes)} bytes of sizes and"
            f" {len(result.visits)} of visits"
        )
    visits = np.frombuffer(result.visits, "<u2").astype(np.float64)
    if visits.sum() != result.steps or not visits.all():
        raise InvalidUpdate(f"{visits.sum():.0f} visits in {result.steps} steps")
    sizes = np.frombuffer(result.sizes, "<i8").astype(np.float64)
    if (sizes < 0).any() or (sizes > visits * largest(walk.held, opened.eps)).any():
        raise InvalidUpdate(f"a size that is not within {walk.held}")


def largest(held: float, eps: float) -> int:
    """A slope of size `held` as a difference in 2^-20 nat."""
    return round(held * 2 * eps / QUANTUM)


def slopes_of(result: WalkResult, eps: float) -> NDArray[np.float64]:
    """One walk's sums of slopes: (n,) float64 in the order of its ranges."""
    return np.frombuffer(result.differences, "<i4") * (QUANTUM / (2 * eps))
