"""Slopes as an average becomes a step: the arithmetic that all methods share.

theta -= step * sum_j W_j rho_j z_j / N, with N the sum of the weights, as integer coefficients.
"""

from collections.abc import Sequence

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from services.aggregator.methods.method import RoundSums
from services.aggregator.pooling import QUANTUM
from services.aggregator.terms import of_pool
from shared.adapter import MAX_COEFFICIENT, UNIT
from shared.messages import Frozen, ProbeResult, RoundOpened, Term, WalkResult

UNCLIPPED = 1e300


def frozen_of(opened: RoundOpened, step: float, clip: float, normaliser: float) -> Frozen:
    """What a close fixes for the latecomers of `opened`."""
    return Frozen(
        round=opened.round,
        stream_round=opened.stream_round,
        scope=opened.scope,
        eps=opened.eps,
        step=step,
        clip=clip,
        normaliser=normaliser,
    )


def averaged(rounds: Sequence[RoundSums], step: float) -> tuple[list[Term], Frozen]:
    """One unclipped step along the mean of all that `rounds` measured; what the last one fixes."""
    measured = [(each, *each.pool.slopes(each.opened.eps)) for each in rounds]
    normaliser = float(sum(int(weights.sum()) for _, _, weights in measured))
    frozen = frozen_of(rounds[-1].opened, step, UNCLIPPED, normaliser)
    terms = [
        term_of(each, committed(frozen, slopes, weights, 1.0)) for each, slopes, weights in measured
    ]
    return [term for term in terms if term.ranges], frozen


def term_of(sums: RoundSums, coefficients: NDArray[np.int64]) -> Term:
    """The term of (P,) coefficients where anything was measured."""
    opened = sums.opened
    return of_pool(opened.stream_round, opened.scope, coefficients, sums.pool.measured)


def late(
    frozen: Frozen, result: ProbeResult | WalkResult, rounds_late: int, late_mass: int
) -> NDArray[np.int64]:
    """Coefficients of an update that missed its close: (n,) int64, in the order of its ranges.

    `late_mass` is what the round's latecomers, this one included, add to its sum of weights. It
    belongs in the mean: a round that closed with little must not lend its latecomers more than a
    round's step.
    """
    differences = np.frombuffer(result.differences, "<i4")
    if isinstance(result, WalkResult):
        slopes, weight = differences * (QUANTUM / (2 * frozen.eps)), result.share
    else:
        scale = QUANTUM / (2 * frozen.eps * max(1, result.weight))
        slopes, weight = differences * scale, result.weight
    weights = np.full(len(slopes), weight, np.int64)
    mean = replace(frozen, normaliser=frozen.normaliser + late_mass)
    return committed(mean, slopes, weights, 1 / (1 + rounds_late))


def committed(
    frozen: Frozen, slopes: NDArray[np.float64], weights: NDArray[np.int64], discount: float
) -> NDArray[np.int64]:
    """Coefficients of slopes (n,) that were measured on `weights` (n,): (n,) int64."""
    held = np.clip(slopes, -frozen.clip, frozen.clip)
    exact = held * weights * (-frozen.step * discount / (frozen.normaliser * UNIT))
    return np.clip(np.rint(exact), -MAX_COEFFICIENT, MAX_COEFFICIENT).astype(np.int64)
