"""One job as the aggregator sees it: `decide` what follows from a message, `evolve` by a fact.

No I/O, clock or randomness. `decide_*` may refuse and changes nothing; `evolve` applies what is in
the log and cannot fail. Where the log stops, `decide_next` derives what is still to be done.
"""

from collections.abc import Sequence
from typing import Literal

import msgspec

from services.aggregator import pooling
from services.aggregator.folding import Folding, Outcome
from services.aggregator.methods import METHODS, Closing
from services.aggregator.pooling import Pool
from services.aggregator.rounds import Evaluated, Progress, RoundRecord, contribute
from services.aggregator.terms import merged, of_pool
from shared.adapter import Adapter
from shared.errors import RejectError, StaleMessage
from shared.messages import (
    AdapterEvaluated,
    BlobRef,
    Commit,
    DetailEvent,
    EpochOpened,
    EvaluationSums,
    JobEnded,
    JobOpened,
    JobSpec,
    JobSummary,
    LogEvent,
    ModelPublished,
    RoundClosed,
    RoundOpened,
    RoundReport,
    SubmitJob,
    SubmitUpdate,
    UpdatesFolded,
)

MAX_DEADLINE_S = 3600.0
KEPT_SNAPSHOTS = 2


def open_job(message: SubmitJob) -> list[LogEvent]:
    """The events that begin a job.

    Raises:
        RejectError: the spec or the manifest cannot work; the text names what.
    """
    tuning = message.spec.tuning
    if tuning.method not in METHODS:
        raise RejectError(f"method {tuning.method!r} is unknown; known: {sorted(METHODS)}")
    if not tuning.final_step and tuning.rounds == 1:
        raise RejectError("final_step 0 with one round would move nothing")
    if message.spec.task.loss == "choices" and len(message.spec.task.labels) < 2:
        raise RejectError("loss 'choices' needs at least two labels")
    adapter = Adapter(message.manifest)
    if adapter.manifest.epoch != 0:
        raise RejectError("a job begins with epoch 0")
    if (tuning.momentum > 0) != (adapter.manifest.update_rule == "momentum"):
        raise RejectError("momentum and the manifest's update_rule disagree")
    kinds = {block.kind for block in adapter.manifest.blocks}
    if tuning.how == "exact" and kinds != {"output_rows"}:
        raise RejectError("how 'exact' needs an adapter of output rows alone; use how 'probe'")
    return [
        JobOpened(job=message.job, spec=message.spec),
        EpochOpened(job=message.job, epoch=0, manifest=message.manifest, digest=adapter.digest()),
    ]


class JobState:
    """A job after the events it has been evolved by."""

    def __init__(self, opened: JobOpened) -> None:
        self.job = opened.job
        self.spec: JobSpec = opened.spec
        self.adapter: Adapter | None = None
        self.rounds: dict[int, RoundRecord] = {}
        self.open: RoundOpened | None = None
        self.progress = Progress(Pool(0))
        self.round = 0
        self.commits = 0
        self.abandoned_in_a_row = 0
        self.finished = False
        self.stopped = False
        self.ended: JobEnded | None = None
        self.reported_round = 0
        self.published_round = -1
        self.snapshot_due = False
        self.snapshots: list[BlobRef] = []
        self.detail_sequence = 0
        self.unlogged: list[tuple[int, EvaluationSums]] = []
        self.evaluations_logged = 0
        self.evaluated: Evaluated | None = None
        self._successor: Adapter | None = None

    # ---- decide

    def decide_updates(
        self, updates: Sequence[SubmitUpdate]
    ) -> tuple[UpdatesFolded | None, list[Outcome]]:
        """What to log for a batch of this job's updates, and what becomes of each, in order."""
        epoch = self._adapter().manifest.epoch
        counted = self.progress.updates
        batch = Folding(self.job, epoch, self.open, self.rounds, counted)
        outcomes: list[Outcome] = []
        for update in updates:
            try:
                outcomes.append(batch.take(update))
            except StaleMessage as error:
                outcomes.append(Outcome("too_late", str(error)))
            except RejectError as error:
                outcomes.append(Outcome("rejected", str(error)))
        return batch.event(), outcomes

    def decide_close(self, *, overdue: bool = False, stop: bool = False) -> list[LogEvent]:
        """The close of the open round, if it has enough, is overdue, or must stop; else nothing."""
        opened = self.open
        if opened is None:
            return []
        enough = self._enough(opened)
        if not (enough or overdue or stop):
            return []
        if stop:
            return [self._closed(opened, "stopped", None)]
        if opened.kind == "evaluate":
            return [self._closed(opened, "evaluated" if enough else "deadline", None)]
        if self.progress.probes < self.spec.pacing.minimum_probes:
            return [self._closed(opened, "abandoned", None)]
        method = METHODS[self.spec.tuning.method]
        closing = method(self.progress.pool, self.spec.tuning, opened)
        return [self._closed(opened, "enough" if enough else "deadline", closing)]

    def decide_next(self) -> list[LogEvent | DetailEvent]:
        """What the log still lacks, apart from a due snapshot; asked again after every event."""
        if self.ended:
            return []
        if self.unlogged:
            return [self._evaluated(sequence, sums) for sequence, sums in self.unlogged]
        if self.open is not None:
            return [*self.decide_close()]
        if self.reported_round < self.round:
            return [self._report(self.rounds[self.round])]
        if not self.finished:
            return [self._next_round()]
        return [self._end()] if self.published_round == self.round else []

    def decide_published(self, snapshot: BlobRef) -> ModelPublished:
        """The fact that the adapter as it stands lies in the blob store."""
        adapter = self._adapter()
        return ModelPublished(
            job=self.job,
            epoch=adapter.manifest.epoch,
            round=adapter.round,
            digest=adapter.digest(),
            snapshot=snapshot,
        )

    @property
    def outdated_snapshot(self) -> BlobRef | None:
        """The snapshot that the newest pushed out, unless a kept one holds the same bytes."""
        kept, older = self.snapshots[-KEPT_SNAPSHOTS:], self.snapshots[:-KEPT_SNAPSHOTS]
        return older[-1] if older and older[-1] not in kept else None

    # ---- evolve

    def evolve(self, event: LogEvent | DetailEvent, sequence: int) -> None:
        """Apply one fact; `sequence` is its place in its stream."""
        match event:
            case EpochOpened():
                self.adapter = Adapter(event.manifest)
            case RoundOpened():
                self.open = event
                self.round = event.round
                self.rounds.setdefault(event.round, RoundRecord(event)).opened = event
                self.progress = Progress(Pool(event.directions))
                self._forget()
            case RoundClosed():
                self._evolve_closed(event)
            case AdapterEvaluated():
                self._evolve_evaluated(event)
            case ModelPublished():
                self.published_round = event.round
                self.snapshot_due = False
                self.snapshots.append(event.snapshot)
            case JobEnded():
                self.ended = event
            case UpdatesFolded():
                self._evolve_folded(event, sequence)
            case RoundReport():
                self.reported_round = max(self.reported_round, event.round)
            case JobOpened():
                pass

    def summary(self) -> JobSummary:
        """What the operator is told of this job."""
        adapter, evaluated = self._adapter(), self.evaluated
        status = "ended" if self.ended else "finishing" if self.finished else "running"
        return JobSummary(
            job=self.job,
            status=status,
            epoch=adapter.manifest.epoch,
            round=self.round,
            rounds=self.spec.tuning.rounds,
            digest=adapter.digest(),
            reason=self.ended.reason if self.ended else "",
            accuracy=evaluated.correct / evaluated.examples
            if evaluated and evaluated.examples
            else None,
            loss=evaluated.loss / evaluated.weight if evaluated and evaluated.weight else None,
        )

    # ---- inside

    def _adapter(self) -> Adapter:
        if self.adapter is None:
            raise RuntimeError(f"job {self.job} has no epoch")
        return self.adapter

    def _enough(self, opened: RoundOpened) -> bool:
        progress = self.progress
        if opened.kind == "evaluate":
            return progress.evaluators >= self.spec.evaluation.enough_devices
        return (
            progress.probes >= opened.enough_probes
            and len(progress.devices) >= opened.enough_devices
        )

    def _closed(
        self,
        opened: RoundOpened,
        reason: Literal["enough", "deadline", "abandoned", "evaluated", "stopped"],
        closing: Closing | None,
    ) -> RoundClosed:
        adapter, progress = self._adapter(), self.progress
        commit = None if closing is None else adapter.fitting(self._commit(opened, closing))
        self._successor = adapter.after(opened.round, commit)
        return RoundClosed(
            job=self.job,
            epoch=opened.epoch,
            round=opened.round,
            reason=reason,
            commit=commit,
            digest=self._successor.digest(),
            detail_sequence=self.detail_sequence,
            frozen=closing.frozen if closing else None,
            updates=progress.updates,
            late=progress.late_updates,
            devices=len(progress.devices),
            probes=progress.probes,
            weight=progress.loss_weight,
            loss=progress.loss * pooling.QUANTUM / progress.loss_weight
            if progress.loss_weight
            else None,
            signal=progress.pool.signal(opened.eps) if closing else None,
        )

    def _commit(self, opened: RoundOpened, closing: Closing) -> Commit:
        measured = self.progress.pool.measured
        own = of_pool(opened.stream_round, opened.scope, closing.coefficients, measured)
        return Commit(self.spec.tuning.momentum, [own, *merged(self.progress.late)])

    def _next_round(self) -> RoundOpened:
        spec, adapter = self.spec, self._adapter()
        number = self.round + 1
        tune = self.commits < spec.tuning.rounds
        every = spec.evaluation.every_rounds
        deadline_s = spec.pacing.deadline_s * 2.0 ** min(self.abandoned_in_a_row, 20)
        return RoundOpened(
            job=self.job,
            epoch=adapter.manifest.epoch,
            round=number,
            stream_round=number,
            kind="tune" if tune else "evaluate",
            how=spec.tuning.how,
            directions=spec.tuning.directions if tune else 0,
            eps=spec.tuning.eps,
            batch_rows=spec.tuning.batch_rows,
            scope=adapter.layout.everything,
            digest=adapter.digest(),
            evaluate=not tune or (bool(every) and self.commits % every == 0),
            enough_devices=spec.pacing.enough_devices if tune else spec.evaluation.enough_devices,
            enough_probes=spec.pacing.enough_probes if tune else 0,
            over_selection=spec.pacing.over_selection,
            deadline_s=min(max(MAX_DEADLINE_S, spec.pacing.deadline_s), deadline_s),
            commits=self.commits,
        )

    def _evaluated(self, sequence: int, sums: EvaluationSums) -> AdapterEvaluated:
        epoch = self._adapter().manifest.epoch
        fields = msgspec.structs.asdict(sums)
        return AdapterEvaluated(job=self.job, epoch=epoch, detail_sequence=sequence, **fields)

    def _report(self, record: RoundRecord) -> RoundReport:
        return RoundReport(
            job=self.job,
            epoch=record.opened.epoch,
            round=record.opened.round,
            contributions=list(record.contributions.values()),
        )

    def _end(self) -> JobEnded:
        adapter = self._adapter()
        return JobEnded(
            job=self.job,
            epoch=adapter.manifest.epoch,
            round=self.round,
            reason="stopped" if self.stopped else "finished",
            digest=adapter.digest(),
        )

    def _evolve_closed(self, event: RoundClosed) -> None:
        successor, self._successor = self._successor, None
        if successor is None or successor.digest() != event.digest:
            successor = self._adapter().after(event.round, event.commit)
        self.adapter = successor
        self.open = None
        self.round = event.round
        self.detail_sequence = max(self.detail_sequence, event.detail_sequence)
        self.commits += event.commit is not None
        self.abandoned_in_a_row = self.abandoned_in_a_row + 1 if event.reason == "abandoned" else 0
        self.rounds[event.round].frozen = event.frozen
        self.stopped = event.reason == "stopped"
        ended_tuning = self.commits >= self.spec.tuning.rounds
        evaluation_left = self.spec.evaluation.every_rounds and event.commit is not None
        self.finished = self.stopped or (ended_tuning and not evaluation_left)
        every = self.spec.snapshot_every
        periodic = event.commit is not None and self.commits % every == 0
        self.snapshot_due = self.snapshot_due or self.finished or periodic

    def _evolve_evaluated(self, event: AdapterEvaluated) -> None:
        self.evaluations_logged = max(self.evaluations_logged, event.detail_sequence)
        self.unlogged = [
            (sequence, sums)
            for sequence, sums in self.unlogged
            if (sequence, sums.round) != (event.detail_sequence, event.round)
        ]
        if self.evaluated is None or self.evaluated.round < event.round:
            self.evaluated = Evaluated(event.round)
        if self.evaluated.round == event.round:
            self.evaluated.examples += event.examples
            self.evaluated.correct += event.correct
            self.evaluated.weight += event.weight
            self.evaluated.loss += event.loss

    def _evolve_folded(self, event: UpdatesFolded, sequence: int) -> None:
        self.detail_sequence = max(self.detail_sequence, sequence)
        if sequence > self.evaluations_logged:
            self.unlogged += [(sequence, sums) for sums in event.evaluations]
        for row in event.updates:
            if row.round in self.rounds:
                record = self.rounds[row.round]
                record.seen.add((row.device, row.part))
                record.late_weight += row.weight * row.probes * (row.outcome == "late")
            if row.kind == "probe" and event.round in self.rounds:
                contribute(self.rounds[event.round].contributions, row)
        if self.open is None or event.round != self.open.round:
            return
        progress = self.progress
        for sums in event.sums:
            progress.pool.add(sums)
        progress.late += event.late
        progress.loss += event.loss
        progress.loss_weight += event.loss_weight
        for row in event.updates:
            if row.kind == "evaluate":
                progress.evaluators += row.round == self.open.round
            elif row.outcome == "late":
                progress.late_updates += 1
            else:
                progress.updates += 1
                progress.probes += row.probes
                progress.devices.add(row.device)

    def _forget(self) -> None:
        """Drop what is past the lateness bound."""
        oldest = self.round - self.spec.pacing.lateness_rounds
        for number in [number for number in self.rounds if number < oldest]:
            del self.rounds[number]
