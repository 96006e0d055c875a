"""What is remembered of rounds: of the open one its sums, of closed ones what latecomers need."""

from dataclasses import dataclass, field

from services.aggregator.pooling import Pool
from services.aggregator.roster import Counted
from shared.messages import Contribution, FoldedUpdate, Frozen, RoundOpened, Term

MAX_WORK_S = 1e9
"""What a message may carry."""
MAX_CONTRIBUTIONS = 4000
"""Of a RoundReport, those that came first; the bandit can spare the rest."""


@dataclass
class RoundRecord:
    """What is remembered of a round until its latecomers are too late."""

    opened: RoundOpened
    seen: Counted
    """Probes; none once it has expired."""
    frozen: Frozen | None = None
    evaluated: set[tuple[str, int]] = field(default_factory=set[tuple[str, int]])
    """Evaluations, by device and part."""
    contributions: dict[str, Contribution] = field(default_factory=dict[str, Contribution])
    """By device, until they are reported."""
    expired: bool = False
    """Past the lateness bound; evaluations of it are still welcome, as they move nothing."""
    late_weight: int = 0
    """What latecomers have added to the sum of weights over directions, so far."""

    def has(self, device: str, part: int) -> bool:
        """Whether this part of the device's work is counted."""
        return self.seen.has(device, part) or (device, part) in self.evaluated

    def count(self, row: FoldedUpdate) -> None:
        """A row of an UpdatesFolded is of this round."""
        if row.kind == "evaluate":
            self.evaluated.add((row.device, row.part))
        elif not self.expired:
            self.seen.add(row.device, row.part)
        self.late_weight += row.weight * row.probes * (row.outcome == "late")

    def expire(self) -> None:
        """It is past the lateness bound: which probes it has counted is of no more use."""
        self.expired = True
        self.seen.clear()


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
    devices: int = 0


@dataclass
class Evaluated:
    """The newest evaluation, pooled over its round."""

    round: int
    examples: int = 0
    correct: int = 0
    weight: int = 0
    loss: float = 0.0


def contribute(contributions: dict[str, Contribution], row: FoldedUpdate) -> None:
    """Add one row of an UpdatesFolded to its device's part in a round, if it is reported."""
    if row.device not in contributions and len(contributions) >= MAX_CONTRIBUTIONS:
        return
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
