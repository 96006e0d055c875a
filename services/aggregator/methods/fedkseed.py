"""A finite pool of directions for the whole job; devices walk along it and report their slopes.

Source: Qin et al., FedKSeed (ICML 2024): K seeds, an accumulator each, tau local steps, averaging
by the devices' data sizes; constants and details as the authors' code has them.
Differs in: theta itself holds what the accumulators say, theta = -step sum_k A_k z_k, up to its
rounding once a round, so that a device needs no K numbers to catch up; what moves is the adapter.
"""

from collections.abc import Sequence

from services.aggregator.methods.averaging import UNCLIPPED, committed, frozen_of
from services.aggregator.methods.method import Closing, Method, Past, Plan, RoundSums, plain
from services.aggregator.terms import of_pool
from shared.adapter import Adapter
from shared.errors import RejectError
from shared.messages import Manifest, Tuning, Walk

STREAM_ROUND = 0
"""Of every round: no round has this number."""


class FedKSeed(Method):
    """`directions` is K, `local_steps` tau, `batch_rows` the mini-batch of each step."""

    name = "fedkseed"
    walks = True

    def check(self, tuning: Tuning, manifest: Manifest) -> None:
        plain(self.name, tuning, final_step=1.0)
        if not tuning.local_steps:
            raise RejectError(f"method {self.name!r}: local_steps is 0, set how far devices walk")

    def plan(self, tuning: Tuning, adapter: Adapter, number: int, past: Past) -> Plan:
        walk = self.walk(tuning, past)
        return Plan(stream_round=STREAM_ROUND, directions=tuning.directions, walk=walk)

    def walk(self, tuning: Tuning, past: Past) -> Walk:
        """Directions are drawn alike."""
        return Walk(steps=tuning.local_steps, step=tuning.step)

    def close(self, rounds: Sequence[RoundSums], tuning: Tuning, adapter: Adapter) -> Closing:
        opened, pool = rounds[-1].opened, rounds[-1].pool
        slopes, shares = pool.slopes(opened.eps)
        frozen = frozen_of(opened, tuning.step, UNCLIPPED, float(shares.max()))
        coefficients = committed(frozen, slopes, shares, 1.0)
        terms = [of_pool(STREAM_ROUND, opened.scope, coefficients, coefficients != 0)]
        moved = [term for term in terms if term.ranges]
        return Closing(moved, frozen, pool.signal(opened.eps))
