"""What is remembered of one job: a row a round, what was measured of it, what was published.

Bounded: past `MAX_ROUNDS` rows the oldest go. A fact that comes again changes nothing but
evaluations, which are pooled: feed it each log event once.
"""

from typing import Literal, TypeVar

import msgspec

from shared.heldout import HeldOut
from shared.messages import (
    AdapterEvaluated,
    Distilled,
    EpochOpened,
    JobEnded,
    JobOpened,
    LogEvent,
    ModelPublished,
    RoundClosed,
    RoundOpened,
    UpdatesFolded,
)

MAX_ROUNDS = 10_000

Row = TypeVar("Row")


class RoundRow(msgspec.Struct):
    """One round. `reason` is empty while it is open, and its counts are of what has come so far."""

    round: int
    kind: str = "tune"
    reason: str = ""
    wanted: int = 0
    """Devices that are enough for it; 0: its opening was not seen."""
    wanted_probes: int = 0
    deadline_s: float = 0.0
    devices: int = 0
    updates: int = 0
    late: int = 0
    probes: int = 0
    weight: int = 0
    loss: float | None = None
    signal: float | None = None
    variance: float | None = None
    digest: str = ""
    reported: bool = False
    """Its RoundReport has been counted."""


class EvaluationRow(msgspec.Struct):
    """What all trusted devices together measured of one adapter."""

    round: int
    digest: str = ""
    examples: int = 0
    correct: int = 0
    weight: int = 0
    loss: float = 0.0
    """Mean over `weight`, nats."""
    accuracy: float = 0.0

    def add(self, event: AdapterEvaluated) -> None:
        summed = self.loss * self.weight + event.loss
        self.digest = event.digest
        self.examples += event.examples
        self.correct += event.correct
        self.weight += event.weight
        self.loss = summed / self.weight if self.weight else 0.0
        self.accuracy = self.correct / self.examples if self.examples else 0.0


class PublishedRow(msgspec.Struct):
    """A version of the adapter that can be fetched."""

    round: int
    digest: str
    snapshot: str
    size_bytes: int


class JobHistory(msgspec.Struct):
    """Everything shown of one job."""

    job: str
    status: Literal["running", "waiting", "ended"] = "running"
    """`waiting`: the rounds of its epoch are done, and another is to come."""
    reason: str = ""
    epoch: int = 0
    epochs: int = 1
    rounds_before: int = 0
    """Of the epochs before that moved the adapter, as `rounds_planned` counts them."""
    commits: int = 0
    """Of the present epoch."""
    distilled: Distilled | None = None
    """How the epoch's start was made, where it was distilled."""
    round: int = 0
    """The last round that was opened."""
    rounds_planned: int = 0
    method: str = ""
    how: str = ""
    has_answers: bool = True
    """Whether the task has right answers, so that an accuracy means something."""
    snapshot_every: int = 0
    """Rounds from one published version to the next; 0: its opening was not seen."""
    digest: str = ""
    loss: float | None = None
    """Of the devices' own batches, at the last close that had any."""
    closed: dict[str, int] = {}
    """Rounds closed, by reason."""
    rounds: dict[int, RoundRow] = {}
    evaluations: dict[int, EvaluationRow] = {}
    published: dict[int, PublishedRow] = {}
    held_out: HeldOut = msgspec.field(default_factory=HeldOut)
    """Of the present epoch."""
    arriving: int = -1
    """The newest round that updates have come for."""
    arrived: set[str] = set()
    """Whose."""

    def evolve(self, event: LogEvent) -> None:
        """Take in one fact of the job's log."""
        self.held_out.see(event)
        match event:
            case JobOpened():
                self.status, self.reason = "running", ""
                self.rounds_planned = event.spec.tuning.rounds
                self.epochs = event.spec.epochs
                self.method, self.how = event.spec.tuning.method, event.spec.tuning.how
                self.has_answers = event.spec.task.loss != "tokens"
                self.snapshot_every = event.spec.snapshot_every
            case EpochOpened():
                self.epoch, self.digest = event.epoch, event.digest
                self.distilled = event.distilled
                self.rounds_before = self.round - self._fruitless
                self.status, self.commits = "running", 0
            case RoundOpened():
                self.status = "running"
                self.round = max(self.round, event.round)
                row = self.row(event.round)
                row.kind, row.deadline_s = event.kind, event.deadline_s
                row.wanted, row.wanted_probes = event.enough_devices, event.enough_probes
            case RoundClosed():
                self._close(event)
            case AdapterEvaluated():
                kept(self.evaluations, event.round, EvaluationRow(event.round)).add(event)
            case ModelPublished():
                snapshot = event.snapshot
                version = PublishedRow(
                    event.round, event.digest, snapshot.digest, snapshot.size_bytes
                )
                kept(self.published, event.round, version)
                done = self.commits >= self.rounds_planned or self.held_out.converged
                if done and self.epoch + 1 < self.epochs:
                    self.status = "waiting"
            case JobEnded():
                self.status, self.reason, self.digest = "ended", event.reason, event.digest

    def fold(self, event: UpdatesFolded) -> bool:
        """Take in a batch of updates; whether it changed an open round.

        The log may be ahead of the batches: what a close has counted stands.
        """
        row = self.rounds.get(event.round)
        if event.round < self.arriving or (row is not None and row.reason):
            return False
        if event.round > self.arriving:
            self.arriving, self.arrived = event.round, set()
        row = self.row(event.round)
        for update in event.updates:
            if update.outcome == "late":
                row.late += 1
            else:
                self.arrived.add(update.device)
                row.probes += update.probes
            row.updates += 1
        row.devices = len(self.arrived)
        return True

    def row(self, round: int) -> RoundRow:
        """The row of a round, new where there is none."""
        return kept(self.rounds, round, RoundRow(round))

    @property
    def evaluation(self) -> EvaluationRow | None:
        """The newest one."""
        return self.evaluations[max(self.evaluations)] if self.evaluations else None

    @property
    def accuracy(self) -> float | None:
        """At the newest evaluation; None also where the task has no right answers."""
        last = self.evaluation
        return last.accuracy if last and self.has_answers else None

    @property
    def best(self) -> dict[str, object] | None:
        """The version that did best on held-out rows."""
        best = self.held_out.best
        measured = None if best is None else self.held_out.of(best.digest)
        if best is None or measured is None:
            return None
        accuracy = measured.accuracy if self.has_answers else None
        return {"round": best.round, "accuracy": accuracy, "loss": measured.loss}

    def summary(self) -> dict[str, object]:
        """The job in a line of a list."""
        last = self.evaluation
        return {
            "job": self.job,
            "status": self.status,
            "reason": self.reason,
            "epoch": self.epoch,
            "epochs": self.epochs,
            "rounds_before": self.rounds_before,
            "distilled": self.distilled,
            "round": self.round,
            "rounds_planned": self.rounds_planned,
            "method": self.method,
            "how": self.how,
            "closed": self.closed,
            "digest": self.digest,
            "loss": self.loss,
            "heldout_loss": last.loss if last else None,
            "accuracy": self.accuracy,
            "best": self.best,
            "has_answers": self.has_answers,
            "snapshot_every": self.snapshot_every,
        }

    @property
    def _fruitless(self) -> int:
        """Rounds that closed without a step."""
        return self.closed.get("more", 0) + self.closed.get("abandoned", 0)

    def _close(self, event: RoundClosed) -> None:
        row = self.row(event.round)
        reason = "more" if event.more else event.reason
        if not row.reason:
            self.commits += reason in ("enough", "deadline")
            self.closed[reason] = self.closed.get(reason, 0) + 1
        row.reason, row.digest = reason, event.digest
        row.devices, row.updates, row.late = event.devices, event.updates, event.late
        row.probes, row.weight = event.probes, event.weight
        row.loss, row.signal, row.variance = event.loss, event.signal, event.variance
        self.digest = event.digest
        if event.loss is not None:
            self.loss = event.loss


def kept(rows: dict[int, Row], round: int, fresh: Row) -> Row:
    """The row of `round`, `fresh` if it had none; the oldest round's goes when there are too many.

    A row older than all that are kept is not kept.
    """
    row = rows.get(round)
    if row is not None:
        return row
    if len(rows) >= MAX_ROUNDS:
        oldest = next(iter(rows))  # rounds come in order: insertion order is age
        if round < oldest:
            return fresh
        del rows[oldest]
    rows[round] = fresh
    return fresh
