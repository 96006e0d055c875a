"""What is remembered of rounds: of the open one its sums, of closed ones what latecomers need."""

from dataclasses import dataclass, field

from services.aggregator.pooling import Pool
from shared.messages import Contribution, FoldedUpdate, Frozen, RoundOpened, Term

MAX_WORK_S = 1e9
"""What a message may carry."""


@dataclass
class RoundRecord:
    """What is remembered of a round until its latecomers are too late."""

    opened: RoundOpened
    frozen: Frozen | None = None
    seen: set[tuple[str, int]] = field(default_factory=set[tuple[str, int]])
    contributions: dict[str, Contribution] = field(default_factory=dict[str, Contribution])
    expired: bool = False
    """Past the lateness bound; evaluations of it are still welcome, as they move nothing."""
    late_weight: int = 0
    """What latecomers have added to the sum of weights over directions, so far."""


@dataclass
class Progress:
    """The open round's own sums; gone at its close."""

    pool: Pool
    late: list[Term] = field(default_factory=list[Term])
    updates: int = 0
    late_updates: int = 0
    probes: int = 0
    evaluators: int = 0
    loss: int = 0
    loss_weight: int = 0
    devices: set[str] = field(default_factory=set[str])


@dataclass
class Evaluated:
    """The newest evaluation, pooled over its round."""

    round: int
    examples: int = 0
    correct: int = 0
    weight: int = 0
    loss: float = 0.0


def contribute(contributions: dict[str, Contribution], row: FoldedUpdate) -> None:
    """Add one row of an UpdatesFolded to its device's part in a round."""
    old = contributions.get(row.device) or Contribution(row.device, 0, 0, 0, 0.0, 0.0, 0)
    probes = old.probes + row.probes
    contributions[row.device] = Contribution(
        device=row.device,
        parts=old.parts + 1,
        probes=probes,
        weight=max(old.weight, row.weight),
        slope=(old.slope * old.probes + row.slope * row.probes) / max(1, probes),
        work_s=min(MAX_WORK_S, old.work_s + row.work_s),
        late=old.late + (row.outcome == "late"),
    )
