"""From the few log-probabilities that a server tells to logits over the whole vocabulary. Pure.

A token that was not told has at most the probability of the least likely one that was. What mass is
missing is dealt out in the shape of the small base model, up to that bound; restricting the
ensemble to the tokens that were told leaves twice its distance from the true one. A token that the
server has no name for may be any of the likeliest: it knows no bound.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Row = NDArray[np.float64]

_LEAST = -70.0
"""No logit is smaller, but for what was told: all stay finite."""


@dataclass(frozen=True, slots=True)
class Told:
    """What a server said of one position.

    `tokens` (k,) int64 are distinct, `logprobs` (k,) float64 go with them. `bound` is the
    log-probability of the least likely token that was told, by any name; 0 where none was.
    """

    tokens: NDArray[np.int64]
    logprobs: Row
    bound: float = 0.0
    drifted: bool = False
    """The server read the same text as other tokens than ours."""


@dataclass(frozen=True, slots=True)
class Filled:
    """Log-probabilities (n_vocab,) float64 that sum to one; `missing` of it was not told."""

    logits: Row
    k: int
    missing: float
    drifted: bool = False


NOTHING = Told(np.empty(0, np.int64), np.empty(0, np.float64))


def fill(told: Told, base: NDArray[np.floating], nameless: NDArray[np.bool_]) -> Filled:
    """What was told as it is, and the rest in the shape of `base`.

    `base` (n_vocab,) are the small base model's logits, all finite; `nameless` (n_vocab,): the
    tokens that the server cannot name. Where everything was told, the logits are what was told.
    """
    known = np.exp(told.logprobs)
    missing = min(max(1.0 - float(known.sum()), 0.0), 1.0)
    unseen = np.ones(len(base), bool)
    unseen[told.tokens] = False
    logits = np.empty(len(base))
    logits[told.tokens] = told.logprobs
    if unseen.any():
        shape = base[unseen].astype(np.float64)
        shape = np.exp(np.maximum(shape - shape.max(), _LEAST))
        bound = np.where(nameless[unseen], 0.0, told.bound)
        dealt = _dealt(missing, shape, np.exp(bound))
        some = dealt > 0.0
        rest = np.minimum(bound, _LEAST)
        rest[some] = np.maximum(rest[some], np.log(dealt[some]))
        logits[unseen] = rest
    logits -= np.log(np.exp(logits).sum())
    return Filled(logits, len(told.tokens), missing, told.drifted)


def _dealt(mass: float, shape: Row, bound: Row) -> Row:
    """`mass` in proportion to `shape`, none above its bound; less than `mass` if all reach it."""
    dealt = np.zeros(len(shape))
    free = np.ones(len(shape), bool)
    while mass > 0.0 and free.any():
        share = shape[free] * (mass / shape[free].sum())
        full = share >= bound[free]
        if not full.any():
            dealt[free] = share
            break
        places = np.flatnonzero(free)[full]
        dealt[places] = bound[places]
        mass -= float(bound[places].sum())
        free[places] = False
    return dealt
