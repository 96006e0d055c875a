"""The plain baseline: constant steps along n two-point estimates, nothing clipped or normalised.

Source: Malladi et al., MeZO (NeurIPS 2023), algorithm 1; n-SPSA of its appendix A.
Differs in: the mini-batch of a step is the measuring devices' own, so that a direction's slope is
their weighted mean; the adapter is what moves, not the model.
"""

from collections.abc import Sequence

from services.aggregator.methods.averaging import averaged
from services.aggregator.methods.method import Closing, Method, RoundSums, plain
from shared.adapter import Adapter
from shared.messages import Manifest, Tuning


class Mezo(Method):
    """`directions` is n."""

    def check(self, tuning: Tuning, manifest: Manifest) -> None:
        plain("mezo", tuning, final_step=1.0)

    def close(self, rounds: Sequence[RoundSums], tuning: Tuning, adapter: Adapter) -> Closing:
        sums = rounds[-1]
        terms, frozen = averaged([sums], tuning.step)
        return Closing(terms, frozen, sums.pool.signal(sums.opened.eps))
