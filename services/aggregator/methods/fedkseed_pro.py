"""FedKSeed whose devices draw those directions more often whose slopes have been larger.

Source: Qin et al., FedKSeed (ICML 2024), FedKSeed-Pro: q_k = the mean over all visits so far of
|slope| held within 1000, and one 0; min-max normalised over k; p = softmax(q).
Differs in: probabilities are rounded to integers, which are logged.
"""

import numpy as np
from numpy.typing import NDArray

from services.aggregator.methods.fedkseed import FedKSeed
from services.aggregator.methods.method import Past
from shared.messages import Importance, Tuning, Walk

HELD = 1000.0
"""A slope's size is held within this."""
LEAST = 2**14
"""What the least likely direction weighs; the likeliest weighs e times as much, within uint16."""


class FedKSeedPro(FedKSeed):
    name = "fedkseed-pro"

    def walk(self, tuning: Tuning, past: Past) -> Walk:
        weights = b"" if past.importance is None else weighed(past.importance).tobytes()
        return Walk(steps=tuning.local_steps, step=tuning.step, held=HELD, weights=weights)


def weighed(importance: Importance) -> NDArray[np.uint16]:
    """What each direction weighs when one is drawn: (K,) little-endian uint16, within e."""
    sizes = np.frombuffer(importance.sizes, "<i8").astype(np.float64)
    mean = sizes / (np.frombuffer(importance.visits, "<i8") + 1)
    spread = float(np.ptp(mean))
    mean = (mean - mean.min()) / spread if spread > 0 else np.zeros_like(mean)
    return np.floor(LEAST * np.exp(mean)).astype("<u2")
