"""The default method: one averaged, clipped step along all of a round's slopes.

Source: Malladi et al., MeZO (NeurIPS 2023), eq. 1-2, for the two-point estimate
g = (1/n) sum_j rho_j z_j; Zhao et al., FZOO (2025), for a step in units of the slopes' spread.
Differs in: slopes are pooled over devices per direction and weighted by what they were measured on;
the spread is their root mean square; a slope is held within `clip` times it. With local steps
(Reddi et al., Adaptive Federated Optimization, ICLR 2021) what is averaged is each device's own
move, by its products with the directions.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from services.aggregator.methods.averaging import committed, frozen_of, term_of
from services.aggregator.methods.method import Closing, Method, Past, Plan, RoundSums
from shared.adapter import Adapter
from shared.errors import RejectError
from shared.messages import LocalSteps, Manifest, Tuning


class Seedwire(Method):
    """Closes each round by itself."""

    def check(self, tuning: Tuning, manifest: Manifest) -> None:
        if tuning.local_steps and (tuning.how != "exact" or tuning.normalise != "none"):
            raise RejectError("local_steps need how 'exact' and normalise 'none'")

    def plan(self, tuning: Tuning, adapter: Adapter, number: int, past: Past) -> Plan:
        plan = super().plan(tuning, adapter, number, past)
        if not tuning.local_steps:
            return plan
        rate = tuning.local_rate * _schedule(past.commits, tuning)
        return replace(plan, local=LocalSteps(tuning.local_steps, tuning.local_rows, rate))

    def close(self, rounds: Sequence[RoundSums], tuning: Tuning, adapter: Adapter) -> Closing:
        sums = rounds[-1]
        opened, pool = sums.opened, sums.pool
        slopes, weights = pool.slopes(opened.eps)
        normaliser = float(weights.sum())
        spread = float(np.sqrt((np.square(slopes) * weights).sum() / normaliser))
        if opened.local is None:
            step = tuning.step * _schedule(opened.commits, tuning)
        else:
            kept = _kept(int(pool.measured.sum()), adapter.layout.span(opened.scope))
            step = min(tuning.step * kept, 1 - tuning.momentum / 256)
        if tuning.normalise == "rms":
            step = step / spread if spread > 0 else 0.0
        frozen = frozen_of(opened, step, tuning.clip * spread, normaliser)
        term = term_of(sums, committed(frozen, slopes, weights, 1.0))
        return Closing([term], frozen, pool.signal(opened.eps))


def _kept(directions: int, span: tuple[int, int]) -> float:
    """How much of a move to believe that is rebuilt from its products with random directions.

    Rebuilt as (1/P) sum_j <x, z_j> z_j, x of d entries comes with noise of (d - 1) / P times its
    square; P / (P + d - 1) of it is nearest to x. What momentum adds in later rounds comes on top:
    with a step of 1 - momentum the whole move is made, and no round asks for more.
    """
    return directions / (directions + span[1] - 1)


def _schedule(commits: int, tuning: Tuning) -> float:
    """Falls linearly from 1 at the first commit to `final_step` at the last."""
    share = commits / max(1, tuning.rounds - 1)
    return 1 + (tuning.final_step - 1) * min(1.0, share)
