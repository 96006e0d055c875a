"""What is remembered of rounds: their sums until a commit, and then what latecomers need."""

from dataclasses import dataclass, field

from msgspec.structs import replace

from services.aggregator.methods import Plan
from services.aggregator.pooling import Pool
from services.aggregator.roster import Counted
from services.aggregator.walking import Visits
from shared.adapter import Adapter
from shared.messages import Contribution, FoldedUpdate, Frozen, JobSpec, RoundOpened, Term

MAX_DEADLINE_S = 3600.0
MAX_WORK_S = 1e9
"""What a message may carry."""
MAX_CONTRIBUTIONS = 4000
"""Of a RoundReport, those that came first; the bandit can spare the rest."""


@dataclass
class Progress:
    """A round's own sums; gone with its commit."""

    pool: Pool
    late: list[Term] = field(default_factory=list[Term])
    updates: int = 0
    late_updates: int = 0
    probes: int = 0
    evaluators: int = 0
    loss: int = 0
    loss_weight: int = 0
    devices: int = 0

    @classmethod
    def of(cls, opened: RoundOpened) -> "Progress":
        """Nothing so far."""
        return cls(Pool(opened.directions))


@dataclass
class RoundRecord:
    """What is remembered of a round until its latecomers are too late."""

    opened: RoundOpened
    seen: Counted
    """Probes; none once it has expired."""
    progress: Progress | None
    """None once nothing more can join the round's own sums."""
    visits: Visits | None = None
    """What walks said of sizes while the round was open, where that is asked for."""
    frozen: Frozen | None = None
    evaluated: set[tuple[str, int]] = field(default_factory=set[tuple[str, int]])
    """Evaluations, by device and part."""
    contributions: dict[str, Contribution] = field(default_factory=dict[str, Contribution])
    """By device, until they are reported."""
    expired: bool = False
    """Past the lateness bound; evaluations of it are still welcome, as they move nothing."""
    late_weight: int = 0
    """What latecomers have added to the sum of weights over directions, so far."""

    @classmethod
    def of(cls, opened: RoundOpened, seen: Counted) -> "RoundRecord":
        """A round that has just been opened."""
        sized = opened.walk is not None and opened.walk.held > 0
        visits = Visits(opened.directions) if sized else None
        return cls(opened, seen, Progress.of(opened), visits)

    def committed(self, frozen: Frozen | None) -> None:
        """Its sums are in a commit, or dropped; `frozen` is what holds for who comes now."""
        self.progress = None
        if frozen is not None:
            stream_round = self.opened.stream_round
            self.frozen = replace(frozen, round=self.opened.round, stream_round=stream_round)

    def has(self, device: str, part: int) -> bool:
        """Whether this part of the device's work is counted."""
        return self.seen.has(device, part) or (device, part) in self.evaluated

    def count(self, row: FoldedUpdate) -> None:
        """A row of an UpdatesFolded is of this round."""
        if row.kind == "evaluate":
            self.evaluated.add((row.device, row.part))
        elif not self.expired:
            self.seen.add(row.device, row.part)
        self.late_weight += (row.mass or row.weight * row.probes) * (row.outcome == "late")

    def expire(self) -> None:
        """It is past the lateness bound: which probes it has counted is of no more use."""
        self.expired = True
        self.seen.clear()


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


def round_of(
    job: str, spec: JobSpec, adapter: Adapter, number: int, plan: Plan | None, abandoned: int
) -> RoundOpened:
    """Round `number` after `abandoned` fruitless ones; without a plan, an evaluation alone."""
    tuning, pacing = spec.tuning, spec.pacing
    patience = pacing.deadline_s * 2.0 ** min(abandoned, 20)
    return RoundOpened(
        job=job,
        epoch=adapter.manifest.epoch,
        round=number,
        stream_round=plan.stream_round if plan else number,
        kind="tune" if plan else "evaluate",
        how=tuning.how,
        directions=plan.directions if plan else 0,
        eps=tuning.eps,
        batch_rows=tuning.batch_rows,
        scope=adapter.layout.everything,
        digest=adapter.digest(),
        evaluate=plan is None,
        enough_devices=pacing.enough_devices if plan else spec.evaluation.enough_devices,
        enough_probes=pacing.enough_probes if plan else 0,
        over_selection=pacing.over_selection,
        deadline_s=min(max(MAX_DEADLINE_S, pacing.deadline_s), patience),
        survivors=plan.survivors if plan else [],
        walk=plan.walk if plan else None,
        local=plan.local if plan else None,
    )
