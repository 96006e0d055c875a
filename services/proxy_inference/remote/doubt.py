"""How far an answer may be from the ensemble's own, summed over its tokens. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class Doubt:
    """Of one answer that a large model on a server had part in."""

    positions: int = 0
    k: int = 0
    """Log-probabilities that came of the last position; of a pushed answer 0."""
    missing: float = 0.0
    """Sum of the mass that the server did not tell; pull."""
    clipped: float = 0.0
    """Sum of the total variations that the bias's limits made; push."""
    drifted: int = 0
    """Positions before which the server read other tokens than ours, of the same text."""
    unheard: int = 0
    """Positions at which the server could not be asked, or not told: the small models spoke."""


def shown(doubts: Sequence[Doubt], *, pulled: bool) -> dict[str, object]:
    """What the answers together tell: means over their tokens."""
    positions = max(sum(one.positions for one in doubts), 1)
    told: dict[str, object] = {
        "exact": False,
        "way": "pull" if pulled else "push",
    }
    if pulled:
        told["k"] = max((one.k for one in doubts), default=0)
        told["missing_mass"] = round(sum(one.missing for one in doubts) / positions, 6)
    else:
        told["clipped"] = round(sum(one.clipped for one in doubts) / positions, 6)
    if drifted := sum(one.drifted for one in doubts):
        told["drifted_tokens"] = drifted
    if unheard := sum(one.unheard for one in doubts):
        told["unheard_tokens"] = unheard
    return told
