"""The default method: one averaged, clipped step along all of a round's slopes.

Source: Malladi et al., MeZO (NeurIPS 2023), eq. 1-2, for the two-point estimate
g = (1/n) sum_j rho_j z_j; Zhao et al., FZOO (2025), for a step in units of the slopes' spread.
Differs in: slopes are pooled over devices per direction and weighted by what they were measured on;
the spread is their root mean square; a slope is held within `clip` times it.
"""

from collections.abc import Sequence

import numpy as np

from services.aggregator.methods.averaging import committed, frozen_of, term_of
from services.aggregator.methods.method import Closing, Method, RoundSums
from shared.adapter import Adapter
from shared.messages import Tuning


class Seedwire(Method):
    """Closes each round by itself."""

    def close(self, rounds: Sequence[RoundSums], tuning: Tuning, adapter: Adapter) -> Closing:
        sums = rounds[-1]
        opened, pool = sums.opened, sums.pool
        slopes, weights = pool.slopes(opened.eps)
        normaliser = float(weights.sum())
        spread = float(np.sqrt((np.square(slopes) * weights).sum() / normaliser))
        step = tuning.step * _schedule(opened.commits, tuning)
        if tuning.normalise == "rms":
            step = step / spread if spread > 0 else 0.0
        frozen = frozen_of(opened, step, tuning.clip * spread, normaliser)
        term = term_of(sums, committed(frozen, slopes, weights, 1.0))
        return Closing([term], frozen, pool.signal(opened.eps))


def _schedule(commits: int, tuning: Tuning) -> float:
    """Falls linearly from 1 at the first commit to `final_step` at the last."""
    share = commits / max(1, tuning.rounds - 1)
    return 1 + (tuning.final_step - 1) * min(1.0, share)
