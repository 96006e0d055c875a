"""A batch of updates becomes one fact: what is counted, what is late, what is refused.

Decides and changes nothing: what it finds is logged, and only then evolved.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Literal

import msgspec
import numpy as np
from msgspec.structs import replace

from services.aggregator import pooling
from services.aggregator.methods.seedwire import late as late_coefficients
from services.aggregator.pooling import Batch
from services.aggregator.rounds import RoundRecord
from services.aggregator.terms import merged
from shared.adapter import term
from shared.directions import width
from shared.errors import InvalidUpdate, StaleMessage
from shared.messages import (
    EvaluateResult,
    EvaluationSums,
    FoldedUpdate,
    ProbeResult,
    RoundOpened,
    SubmitUpdate,
    Term,
    UpdatesFolded,
)


class Outcome(msgspec.Struct, frozen=True):
    """What becomes of one update of a batch."""

    word: Literal["folded", "late", "duplicate", "too_late", "rejected"]
    reason: str = ""


class Folding:
    """Updates of one batch as they are taken, before anything is logged."""

    def __init__(
        self,
        job: str,
        epoch: int,
        opened: RoundOpened | None,
        rounds: Mapping[int, RoundRecord],
        counted: int,
        allowed: frozenset[str],
    ) -> None:
        """`opened` is the open round, if any; `counted` how many updates it has so far.

        `allowed` devices alone may take part; empty: all.
        """
        self._job = job
        self._epoch = epoch
        self._opened = opened
        self._rounds = rounds
        self._counted = counted
        self._allowed = allowed
        self._seen: set[tuple[int, str, int]] = set()
        self._rows: list[FoldedUpdate] = []
        self._batch = Batch(opened.directions if opened else 0)
        self._late: list[Term] = []
        self._evaluations: dict[int, EvaluationSums] = {}
        self._late_weight: Counter[int] = Counter()
        self._loss = 0
        self._loss_weight = 0

    def take(self, update: SubmitUpdate) -> Outcome:
        """Count one update.

        Raises:
            StaleMessage: past the lateness bound.
            InvalidUpdate: measured at another adapter, or of another shape.
        """
        key = update.key
        if self._allowed and key.device not in self._allowed:
            raise InvalidUpdate(f"job {self._job} does not allow device {key.device}")
        record = self._record(update)
        taken = (key.round, key.device, key.part) in self._seen
        if taken or record.has(key.device, key.part):
            return Outcome("duplicate")
        if update.digest != record.opened.digest:
            raise InvalidUpdate(
                f"measured at adapter {update.digest[:12]}, round {key.round} opened at"
                f" {record.opened.digest[:12]}"
            )
        open_round = self._opened.round if self._opened else -1
        match update.result:
            case EvaluateResult():
                if not record.opened.evaluate:
                    raise InvalidUpdate(f"round {key.round} is not evaluated")
                row = self._evaluation(update, update.result)
            case ProbeResult() if key.round == open_round:
                row = self._in_time(update, update.result, record.opened)
            case ProbeResult():
                row = self._in_arrears(update, update.result, record, open_round - key.round)
        self._rows.append(row)
        self._seen.add((key.round, key.device, key.part))
        return Outcome(row.outcome)

    def event(self) -> UpdatesFolded | None:
        """What to log, or None if nothing was taken."""
        if not self._rows or self._opened is None:
            return None
        opened = self._opened
        return UpdatesFolded(
            job=self._job,
            epoch=opened.epoch,
            round=opened.round,
            updates=self._rows,
            sums=self._batch.sums(),
            late=merged(self._late),
            evaluations=list(self._evaluations.values()),
            loss=self._loss,
            loss_weight=self._loss_weight,
        )

    def _record(self, update: SubmitUpdate) -> RoundRecord:
        key, opened = update.key, self._opened
        if opened is None:
            raise StaleMessage(f"job {self._job} has ended")
        if key.epoch > self._epoch or key.round > opened.round:
            raise InvalidUpdate(f"epoch {key.epoch}, round {key.round} has not been opened")
        record = self._rounds.get(key.round)
        if key.epoch < self._epoch or record is None:
            raise StaleMessage(f"round {key.round} is past the lateness bound")
        return record

    def _evaluation(self, update: SubmitUpdate, result: EvaluateResult) -> FoldedUpdate:
        if result.correct > result.examples:
            raise InvalidUpdate(f"{result.correct} of {result.examples} examples are correct")
        number = update.key.round
        before = self._evaluations.get(number) or EvaluationSums(number, update.digest, 0, 0, 0, 0)
        self._evaluations[number] = replace(
            before,
            examples=before.examples + result.examples,
            correct=before.correct + result.correct,
            weight=before.weight + result.weight,
            loss=before.loss + result.loss,
        )
        row = _row(update, "folded", weight=result.weight)
        return replace(row, kind="evaluate")

    def _in_time(
        self, update: SubmitUpdate, result: ProbeResult, opened: RoundOpened
    ) -> FoldedUpdate:
        pooling.check(result, opened.directions)
        if result.how != opened.how or opened.kind != "tune":
            raise InvalidUpdate(f"a {result.how} update in a round of {opened.kind} {opened.how}")
        half = (self._counted + len(self._rows)) % 2
        self._batch.add(result, half)
        self._loss += result.loss
        self._loss_weight += result.weight
        slope = _slope(result, opened.eps)
        return _row(update, "folded", width(result.ranges), result.weight, slope)

    def _in_arrears(
        self, update: SubmitUpdate, result: ProbeResult, record: RoundRecord, rounds_late: int
    ) -> FoldedUpdate:
        if record.expired:
            raise StaleMessage(f"round {update.key.round} is past the lateness bound")
        if self._opened is not None and self._opened.kind == "evaluate":
            raise StaleMessage("the job's last round has closed: its adapter moves no more")
        pooling.check(result, record.opened.directions)
        if record.frozen is None:
            raise StaleMessage(f"round {update.key.round} was closed without a commit")
        key = update.key.round
        self._late_weight[key] += width(result.ranges) * result.weight
        already = record.late_weight + self._late_weight[key]
        values = late_coefficients(record.frozen, result, rounds_late, already)
        self._late.append(
            term(record.frozen.stream_round, record.frozen.scope, list(result.ranges), values)
        )
        slope = _slope(result, record.opened.eps)
        return _row(update, "late", width(result.ranges), result.weight, slope)


def _row(
    update: SubmitUpdate,
    outcome: Literal["folded", "late"],
    probes: int = 0,
    weight: int = 0,
    slope: float = 0.0,
) -> FoldedUpdate:
    key = update.key
    return FoldedUpdate(
        key.device, key.round, key.part, outcome, probes, weight, slope, update.work_s
    )


def _slope(result: ProbeResult, eps: float) -> float:
    slopes = pooling.slopes_of(result, eps)
    return float(np.sqrt(np.square(slopes).mean())) if len(slopes) else 0.0
