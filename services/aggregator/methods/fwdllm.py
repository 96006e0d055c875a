"""Rounds on one batch until two halves of the estimates agree; candidates like the last commit.

Source: Xu et al., FwdLLM (USENIX ATC 2024): variance-controlled pacing, discriminative sampling;
constants and details as the authors' code has them.
Differs in: updates join the halves in turn, not the first half of them the one; sampling compares
whole directions, not tensors one by one (a seed makes all tensors), and all candidates (the code
looks at the last thousand only); the number of rounds on a batch is bounded. `normalised` judges by
the halves' signal-to-noise, which does not depend on the loss's scale.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from services.aggregator.methods.averaging import averaged
from services.aggregator.methods.method import Closing, Method, Past, Plan, RoundSums, plain
from shared import directions
from shared.adapter import Adapter
from shared.errors import RejectError
from shared.messages import Manifest, Range, Tuning
from shared.ranges import runs

MOST_SURVIVORS = 4096
"""They are scattered, and named one by one."""
_FINE = 2.0**20


class FwdLLM(Method):
    """`directions` is how many are measured a round, of `candidates` times as many."""

    def check(self, tuning: Tuning, manifest: Manifest) -> None:
        plain("fwdllm", tuning, final_step=0.0)
        if tuning.monitored >= len(manifest.blocks):
            raise RejectError(
                f"method 'fwdllm': monitored block {tuning.monitored} of an adapter of"
                f" {len(manifest.blocks)} blocks"
            )
        if tuning.candidates > 1 and tuning.directions > MOST_SURVIVORS:
            raise RejectError(
                f"method 'fwdllm': directions {tuning.directions}, with candidates at most"
                f" {MOST_SURVIVORS}"
            )

    def plan(self, tuning: Tuning, adapter: Adapter, number: int, past: Past) -> Plan:
        if tuning.candidates == 1 or past.commits % 2 == 0 or not past.terms:
            return Plan(stream_round=number, directions=tuning.directions)
        pool = tuning.directions * tuning.candidates
        # Theta moved against the aggregate.
        alike = cosines(adapter, number, pool, -adapter.total(past.terms).astype(np.float64))
        best = np.argsort(-alike, kind="stable")[: tuning.directions]
        return Plan(stream_round=number, directions=pool, survivors=runs(np.sort(best).tolist()))

    def close(self, rounds: Sequence[RoundSums], tuning: Tuning, adapter: Adapter) -> Closing:
        variance, signal = agreement(rounds, adapter, tuning.monitored)
        if tuning.variance == "raw":
            steady = variance is not None and variance <= tuning.threshold
        else:
            steady = signal is not None and signal >= tuning.threshold
        if not steady and len(rounds) <= tuning.most_more:
            return Closing([], None, signal, variance)
        step = tuning.step * (1 - rounds[-1].opened.commits / tuning.rounds)
        terms, frozen = averaged(rounds, step)
        return Closing(terms, frozen, signal, variance)


def cosines(
    adapter: Adapter, stream_round: int, pool: int, vector: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Of `vector` (d,) with each direction of a pool, signed: (pool,)."""
    manifest, whole = adapter.manifest, every(pool)
    products = directions.dots(manifest.seed, stream_round, whole, vector, 0, manifest.distribution)
    sizes = directions.lengths(
        manifest.seed, stream_round, whole, 0, len(vector), manifest.distribution
    )
    length = float(np.sqrt(vector @ vector))
    if not length:
        return products
    products /= sizes * length
    return products


def agreement(
    rounds: Sequence[RoundSums], adapter: Adapter, block: int
) -> tuple[float | None, float | None]:
    """How two halves of the mean gradient estimate, a and b, compare over a block's parameters.

    The mean of (a - b)^2 / 2, and <a, b> / (|a - b|^2 / 4); both None if one half is empty.
    """
    start, count = adapter.layout.span((block, 1))
    halves: list[NDArray[np.float64]] = []
    for half in (0, 1):
        weight = sum(int(each.pool.weights[half].sum()) for each in rounds)
        if not weight:
            return None, None
        estimate = np.zeros(count)
        for each in rounds:
            shares = each.pool.half(half, each.opened.eps) / weight
            estimate += _combined(adapter, each.opened.stream_round, shares, start, count)
        halves.append(estimate)
    a, b = halves
    noise = float(np.square(a - b).sum())
    return noise / (2 * count), float(a @ b) / (noise / 4) if noise > 0 else None


def every(pool: int) -> list[Range]:
    """All directions of a pool, as ranges."""
    return [(0, pool)] if pool else []


def _combined(
    adapter: Adapter, stream_round: int, shares: NDArray[np.float64], start: int, count: int
) -> NDArray[np.float64]:
    """sum_j shares_j z_j over parameters [start, start + count), to a millionth of the largest."""
    largest = float(np.abs(shares).max(initial=0.0))
    if largest == 0:
        return np.zeros(count)
    manifest = adapter.manifest
    whole = np.rint(shares * (_FINE / largest)).astype(np.int32)
    summed = directions.total(
        manifest.seed, stream_round, every(len(shares)), whole, start, count, manifest.distribution
    )
    return (summed * (largest / _FINE)).astype(np.float64)
