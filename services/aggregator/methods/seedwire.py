"""The default method: one averaged, clipped step along all of a round's slopes.

Source: Malladi et al., MeZO (NeurIPS 2023), eq. 1-2, for the two-point estimate
g = (1/n) sum_j rho_j z_j; Zhao et al., FZOO (2025), for a step in units of the slopes' spread.
Differs in: slopes are pooled over devices per direction and weighted by what they were measured on;
the spread is their root mean square; a slope is held within `clip` times it.
"""

from dataclasses import dataclass

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from services.aggregator.pooling import QUANTUM, Pool
from shared.adapter import MAX_COEFFICIENT, UNIT
from shared.messages import Frozen, ProbeResult, RoundOpened, Tuning


@dataclass(frozen=True)
class Closing:
    """What a close commits: (P,) int64 coefficients in 2^-24, and what it fixed for latecomers."""

    coefficients: NDArray[np.int64]
    frozen: Frozen


def close(pool: Pool, tuning: Tuning, opened: RoundOpened) -> Closing:
    """The commit of a pool that holds at least one probe."""
    slopes, weights = pool.slopes(opened.eps)
    normaliser = float(weights.sum())
    spread = float(np.sqrt((np.square(slopes) * weights).sum() / normaliser))
    step = tuning.step * _schedule(opened.commits, tuning)
    if tuning.normalise == "rms":
        step = step / spread if spread > 0 else 0.0
    frozen = Frozen(
        round=opened.round,
        stream_round=opened.stream_round,
        scope=opened.scope,
        eps=opened.eps,
        step=step,
        clip=tuning.clip * spread,
        normaliser=normaliser,
    )
    return Closing(_coefficients(frozen, slopes, weights, 1.0), frozen)


def late(
    frozen: Frozen, result: ProbeResult, rounds_late: int, late_weight: int
) -> NDArray[np.int64]:
    """Coefficients of an update that missed its close: (n,) int64, in the order of its ranges.

    `late_weight` is what the round's latecomers, this one included, add to its sum of weights. It
    belongs in the mean: a round that closed with little must not lend its latecomers more than a
    round's step.
    """
    scale = QUANTUM / (2 * frozen.eps * max(1, result.weight))
    slopes = np.frombuffer(result.differences, "<i4") * scale
    weights = np.full(len(slopes), result.weight, np.int64)
    mean = replace(frozen, normaliser=frozen.normaliser + late_weight)
    return _coefficients(mean, slopes, weights, 1 / (1 + rounds_late))


def _coefficients(
    frozen: Frozen, slopes: NDArray[np.float64], weights: NDArray[np.int64], discount: float
) -> NDArray[np.int64]:
    held = np.clip(slopes, -frozen.clip, frozen.clip)
    exact = held * weights * (-frozen.step * discount / (frozen.normaliser * UNIT))
    return np.clip(np.rint(exact), -MAX_COEFFICIENT, MAX_COEFFICIENT).astype(np.int64)


def _schedule(commits: int, tuning: Tuning) -> float:
    """Falls linearly from 1 at the first commit to `final_step` at the last."""
    share = commits / max(1, tuning.rounds - 1)
    return 1 + (tuning.final_step - 1) * min(1.0, share)
