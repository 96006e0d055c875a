"""What the scheduler decides: whom a round calls, and what a device is given."""

from collections.abc import Mapping
from dataclasses import dataclass

from shared.messages import EvaluateWork, ProbeWork, WalkWork


@dataclass(frozen=True, slots=True)
class Selection:
    """Who is called for a round; `rounds` names the waves."""

    job: str
    round: int
    wave: int
    probers: Mapping[str, float]
    """Each with its index."""
    evaluators: tuple[str, ...]
    wanted: int
    """How many devices the round needs, over-selection included."""


@dataclass(frozen=True, slots=True)
class Offer:
    """Work for one device, and why."""

    work: ProbeWork | EvaluateWork | WalkWork
    reason: str
