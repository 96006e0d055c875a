"""What the small models say to a large one that takes a bias on its logits. Pure.

A bias that is the same for every token changes nothing, so the median is taken off: most tokens
need no entry then. A server takes so many entries: those come first that move the small models'
own probabilities most. Whatever had to be left out is told as the total variation that it makes
where the small base model stands for the large one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

THRESHOLD = 0.02
"""A smaller bias is not worth an entry, in nats."""

Row = NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class Push:
    """A bias by token, and how far off it leaves the distribution, between 0 and 1."""

    bias: dict[int, float]
    clipped: float


def push(
    tuned: Row,
    base: Row,
    alpha: float,
    *,
    most: int,
    reach: float,
    also: Mapping[int, float] | None = None,
) -> Push:
    """The bias that makes of a large model the ensemble, from two rows of logits (n_vocab,).

    At most `most` entries, none beyond +-`reach`. `also` is a request's own bias by token: it comes
    on top, and before all others.
    """
    wanted = alpha * (_probabilities(tuned)[1] - _probabilities(base)[1])
    wanted -= np.median(wanted)
    own = {token: value for token, value in (also or {}).items() if value}
    for token, value in own.items():
        wanted[token] += value
    plain = _probabilities(base)[0]
    # The root, as the large model's mass lies elsewhere: of llama-3m steered by 100 entries a total
    # variation of 0.11 was left; 0.14 without the root, 0.39 by the bias alone.
    moved = np.sqrt(plain + _probabilities(tuned)[0]) * np.abs(wanted)
    moved[np.abs(wanted) < THRESHOLD] = 0.0
    moved[list(own)] = np.inf
    listed = np.argsort(-moved, kind="stable")[:most]
    listed = listed[moved[listed] > 0.0]
    sent = np.zeros_like(wanted)
    sent[listed] = np.clip(wanted[listed], -reach, reach)
    clipped = 0.5 * float(np.abs(_steered(plain, wanted) - _steered(plain, sent)).sum())
    return Push({int(token): round(float(sent[token]), 4) for token in listed}, clipped)


def _probabilities(logits: Row) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    shifted = logits.astype(np.float64) - float(logits.max())
    shifted -= np.log(np.exp(shifted).sum())
    return np.exp(shifted), shifted


def _steered(plain: NDArray[np.float64], bias: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = plain * np.exp(bias - bias.max())
    return weights / weights.sum()
