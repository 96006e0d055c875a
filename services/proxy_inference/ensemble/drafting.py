"""How many tokens are worth drafting: measured acceptance against the measured cost. Pure.

A draft is verified together with what comes before it, so its price is what it adds to the pass;
what it brings is the chance that it and all before it are taken, at the present price of a token.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass, field

MOST_DRAFTS = 16
_EDGES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
_PRIOR = 4.0
"""Before anything was seen, drafts are taken as often as the drafting model is sure of them."""
_MEMORY = 500.0
"""About so many drafts of the past count."""
_RECENT = 0.02


class Acceptance:
    """How often drafts are taken, by how sure the drafting model was of them."""

    def __init__(self) -> None:
        middles = zip((0.0, *_EDGES), (*_EDGES, 1.0), strict=True)
        self._taken = [_PRIOR * (low + high) / 2 for low, high in middles]
        self._seen = [_PRIOR] * len(self._taken)
        self.mean = 0.6

    def chance(self, sure: float) -> float:
        place = _bin(sure)
        return self._taken[place] / self._seen[place]

    def learn(self, sure: float, taken: float) -> None:
        """A draft was taken (1) or not (0), or would have been with probability `taken`."""
        place = _bin(sure)
        if self._seen[place] >= _MEMORY:
            self._taken[place] *= 1.0 - 1.0 / _MEMORY
            self._seen[place] *= 1.0 - 1.0 / _MEMORY
        self._taken[place] += taken
        self._seen[place] += 1.0
        self.mean += _RECENT * (taken - self.mean)


def _bin(sure: float) -> int:
    return bisect_right(_EDGES, sure)


@dataclass(frozen=True, slots=True)
class Prices:
    """Seconds of the pass with 0, 1, 2 ... drafts more than those that are certain."""

    drafts: list[float]
    token: float
    """Of a token, as things go at present; above 0."""


def least(later: float, prices: Prices) -> float:
    """It is worth drafting on where the next draft and all before it are taken with a chance above
    this; `later` is that of each one after it.

    Not only the next draft is looked at: where a second token costs much and a third little, two
    are worth their price together or not at all.
    """
    without, *more = prices.drafts
    found, gained, chance = math.inf, 0.0, 1.0
    for price in more:
        gained += chance * prices.token
        found = min(found, (price - without) / gained)
        chance *= later
    return found


@dataclass
class Rate:
    """Seconds of a token over the last passes."""

    seconds: float = 0.0
    tokens: float = 0.0
    _weight: float = field(default=0.05, repr=False)

    def passed(self, seconds: float, tokens: int) -> None:
        keep = 1.0 - self._weight if self.tokens else 0.0
        self.seconds = keep * self.seconds + (1.0 - keep) * seconds
        self.tokens = keep * self.tokens + (1.0 - keep) * tokens

    @property
    def token(self) -> float:
        """0 before anything was measured."""
        return self.seconds / self.tokens if self.tokens else 0.0
