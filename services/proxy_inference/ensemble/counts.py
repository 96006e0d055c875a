"""What ensembles have done, written by the worker's thread, read by others at any time."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from services.proxy_inference.ensemble.combining import divergence
from services.proxy_inference.ensemble.drafting import MOST_DRAFTS

_EVERY = 16
"""Divergences are measured every so many passes."""


@dataclass
class Counts:
    """Since the process began."""

    passes: int = 0
    tokens: int = 0
    """Written by ensembles."""
    seconds: float = 0.0
    """Spent in their passes."""
    drafted: list[int] = field(default_factory=lambda: [0] * MOST_DRAFTS)
    """By position: the first, second ... draft after what is certain."""
    taken: list[int] = field(default_factory=lambda: [0] * MOST_DRAFTS)
    rollbacks: int = 0
    """Times a cache was cut back because a draft was not taken."""
    divergences: int = 0
    """Positions at which the two below were measured."""
    from_large: float = 0.0
    """Sum of KL(P || L), nats."""
    from_tuned: float = 0.0
    """Sum of KL(P || M+), nats."""

    @property
    def watches(self) -> bool:
        """Whether one position of the present pass is wanted, for `watch`."""
        return self.passes % _EVERY == 0

    def watch(
        self, logits: NDArray[np.float32], large: NDArray[np.float32], tuned: NDArray[np.float32]
    ) -> None:
        """Of one position (n_vocab,): what the ensemble made of it, the large and the tuned."""
        if all(np.isfinite(row.max()) for row in (logits, large, tuned)):
            self.divergences += 1
            self.from_large += divergence(logits, large)
            self.from_tuned += divergence(logits, tuned)
