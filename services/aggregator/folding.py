"""A batch of updates becomes one fact: what is counted, what is late, what is refused.

Decides and changes nothing: what it finds is logged, and only then evolved.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Literal

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from services.aggregator import pooling, walking
from services.aggregator.methods.averaging import late as late_coefficients
from services.aggregator.pooling import Batch
from services.aggregator.rounds import RoundRecord
from services.aggregator.terms import merged
from services.aggregator.walking import WalkBatch
from shared.adapter import term
from shared.codec import MAX_PAYLOAD_BYTES, encode
from shared.errors import InvalidUpdate, SeedwireError, StaleMessage
from shared.messages import (
    EvaluateResult,
    EvaluationSums,
    FoldedUpdate,
    ProbeResult,
    RoundOpened,
    SubmitUpdate,
    Term,
    UpdatesFolded,
    WalkResult,
)
from shared.ranges import width

Slopes = ProbeResult | WalkResult


MOST_EVENT_BYTES = MAX_PAYLOAD_BYTES - 16 * 1024
"""The broker counts a message's headers as well."""


class TooMuchAtOnce(SeedwireError):
    """A batch is more than one event can hold; each of its updates alone is less."""


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
        judges: frozenset[str],
    ) -> None:
        """`opened` is the open round, if any.

        `counted`: how many updates it has so far, with those of the rounds carried on into it.
        `allowed` devices alone may take part, and of them `judges` alone measure held-out rows;
        empty: all.
        """
        self._job = job
        self._epoch = epoch
        self._opened = opened
        self._rounds = rounds
        self._counted = counted
        self._allowed = allowed
        self._judges = judges
        self._seen: set[tuple[int, str, int]] = set()
        self._rows: list[FoldedUpdate] = []
        self._batches: dict[int, Batch] = {}
        self._walks: dict[int, WalkBatch] = {}
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
                if self._judges and key.device not in self._judges:
                    raise InvalidUpdate(f"job {self._job} has others measure held-out rows")
                if not record.opened.evaluate:
                    raise InvalidUpdate(f"round {key.round} is not evaluated")
                row = self._evaluation(update, update.result)
            case ProbeResult() | WalkResult() if record.progress is not None:
                row = self._in_time(update, update.result, record.opened)
            case ProbeResult() | WalkResult():
                row = self._in_arrears(update, update.result, record, open_round - key.round)
        self._rows.append(row)
        self._seen.add((key.round, key.device, key.part))
        return Outcome(row.outcome)

    def event(self) -> UpdatesFolded | None:
        """What to log, or None if nothing was taken.

        Raises:
            TooMuchAtOnce: the broker would not take it; fewer are to be folded at a time.
        """
        if not self._rows or self._opened is None:
            return None
        opened = self._opened
        event = UpdatesFolded(
            job=self._job,
            epoch=opened.epoch,
            round=opened.round,
            updates=self._rows,
            sums=[
                sums
                for number, batch in self._batches.items()
                for sums in batch.sums(_other(number, opened))
            ],
            walks=[
                sums
                for number, batch in self._walks.items()
                for sums in batch.sums(_other(number, opened))
            ],
            late=merged(self._late),
            evaluations=list(self._evaluations.values()),
            loss=self._loss,
            loss_weight=self._loss_weight,
        )
        if len(self._rows) > 1 and (size_bytes := len(encode(event))) > MOST_EVENT_BYTES:
            raise TooMuchAtOnce(
                f"job {self._job}: {len(self._rows)} updates make an event of {size_bytes} bytes, "
                f"one may have {MOST_EVENT_BYTES}"
            )
        return event

    def _record(self, update: SubmitUpdate) -> RoundRecord:
        key, opened = update.key, self._opened
        if opened is None:
            raise StaleMessage(f"job {self._job} has ended, or its epoch has")
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

    def _in_time(self, update: SubmitUpdate, result: Slopes, opened: RoundOpened) -> FoldedUpdate:
        half = (self._counted + len(self._rows)) % 2
        self._check(result, opened)
        if isinstance(result, WalkResult):
            self._walk_batch(opened).add(result, half)
        else:
            self._batches.setdefault(opened.round, Batch(opened.directions)).add(result, half)
        self._loss += result.loss
        self._loss_weight += result.weight
        return _measured_row(update, "folded", result, opened.eps)

    def _in_arrears(
        self, update: SubmitUpdate, result: Slopes, record: RoundRecord, rounds_late: int
    ) -> FoldedUpdate:
        if record.expired:
            raise StaleMessage(f"round {update.key.round} is past the lateness bound")
        if self._opened is not None and self._opened.kind == "evaluate":
            raise StaleMessage("the job's last round has closed: its adapter moves no more")
        self._check(result, record.opened)
        if record.frozen is None:
            raise StaleMessage(f"round {update.key.round} was closed without a commit")
        row = _measured_row(update, "late", result, record.opened.eps)
        key = update.key.round
        self._late_weight[key] += row.mass or row.weight * row.probes
        already = record.late_weight + self._late_weight[key]
        values = late_coefficients(record.frozen, result, rounds_late, already)
        self._late.append(
            term(record.frozen.stream_round, record.frozen.scope, list(result.ranges), values)
        )
        if isinstance(result, WalkResult) and result.sizes and self._opened is not None:
            self._walk_batch(self._opened).size(result, 0)
        return row

    def _check(self, result: Slopes, opened: RoundOpened) -> None:
        if opened.kind != "tune":
            raise InvalidUpdate(f"slopes in round {opened.round}, which is an evaluation alone")
        if isinstance(result, WalkResult):
            walking.check(result, opened)
            return
        pooling.check(result, opened.directions)
        if result.how != opened.how or opened.walk is not None:
            wanted = "walks" if opened.walk is not None else opened.how
            raise InvalidUpdate(f"a {result.how} update in a round of {opened.kind} {wanted}")

    def _walk_batch(self, opened: RoundOpened) -> WalkBatch:
        return self._walks.setdefault(opened.round, WalkBatch(opened.directions))


def _other(number: int, opened: RoundOpened) -> int:
    """How sums name their round: by 0 if it is the open one."""
    return 0 if number == opened.round else number


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


def _measured_row(
    update: SubmitUpdate, outcome: Literal["folded", "late"], result: Slopes, eps: float
) -> FoldedUpdate:
    if isinstance(result, WalkResult):
        slope = _spread(walking.slopes_of(result, eps))
        weight = result.weight // max(1, result.steps)
        return replace(_row(update, outcome, result.steps, weight, slope), mass=result.share)
    slope = _spread(pooling.slopes_of(result, eps))
    return _row(update, outcome, width(result.ranges), result.weight, slope)


def _spread(slopes: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.square(slopes).mean())) if len(slopes) else 0.0
