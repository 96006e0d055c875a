"""One job as the aggregator sees it: `decide` what follows from a message, `evolve` by a fact.

No I/O, clock or randomness. `decide_*` may refuse and changes nothing; `evolve` applies what is in
the log and cannot fail. Where the log stops, `decide_next` derives what is still to be done.
"""

from collections.abc import Sequence
from typing import Literal

import msgspec

from services.aggregator import pooling
from services.aggregator.folding import Folding, Outcome, TooMuchAtOnce
from services.aggregator.methods import METHODS, Closing, Method, Past, RoundSums
from services.aggregator.opening import open_epoch
from services.aggregator.pooling import Pool
from services.aggregator.roster import Counted, Roster
from services.aggregator.rounds import Progress, RoundRecord, contribute, round_of
from services.aggregator.snapshots import Snapshots
from services.aggregator.standing import Standing
from services.aggregator.terms import merged
from shared.adapter import Adapter
from shared.errors import RejectError, StaleMessage
from shared.messages import (
    AdapterEvaluated,
    BlobRef,
    Commit,
    DetailEvent,
    EpochOpened,
    EvaluationSums,
    Importance,
    JobEnded,
    JobOpened,
    JobSpec,
    JobSummary,
    LogEvent,
    ModelPublished,
    OpenEpoch,
    PoolSums,
    RoundClosed,
    RoundOpened,
    RoundReport,
    SubmitUpdate,
    UpdatesFolded,
    WalkSums,
)

EVALUATION_ROUNDS = 100
"""How late an evaluation may come: the first one of a job reads all held-out rows."""


class JobState:
    """A job after the events it has been evolved by."""

    def __init__(self, opened: JobOpened) -> None:
        self.job = opened.job
        self.spec: JobSpec = opened.spec
        self._allowed = frozenset(opened.spec.allow_devices)
        self._judges = frozenset(opened.spec.evaluation.allow_devices)
        self.snapshots = Snapshots()
        self._standing: Standing | None = None
        self.rounds: dict[int, RoundRecord] = {}
        self._roster = Roster()
        self.open: RoundOpened | None = None
        self.carried: list[int] = []
        """Closed rounds whose sums wait for the commit of the open one."""
        self.round = 0
        self.commits = 0
        self.abandoned_in_a_row = 0
        self.finished = False
        self.stopped = False
        self.ended: JobEnded | None = None
        self.reported_round = 0
        self.snapshot_due = False
        self.detail_sequence = 0
        self.unlogged: list[tuple[int, EvaluationSums]] = []
        self.evaluations_logged: set[tuple[int, int]] = set()
        """Each by the UpdatesFolded it was made from, and the round it is of."""
        self._newest: Commit | None = None
        self._importance: Importance | None = None

    @property
    def begun(self) -> bool:
        """Whether the log has the job's epoch: a kill may have come between the two."""
        return self._standing is not None

    # ---- decide

    def decide_updates(
        self, updates: Sequence[SubmitUpdate]
    ) -> tuple[UpdatesFolded | None, list[Outcome]]:
        """What to log for this job's updates, and what becomes of each, in order.

        Of as many of the first of them as one event can hold; the others are for the next call.
        """
        try:
            return self._folded(updates)
        except TooMuchAtOnce:
            return self.decide_updates(updates[: len(updates) // 2])

    def _folded(
        self, updates: Sequence[SubmitUpdate]
    ) -> tuple[UpdatesFolded | None, list[Outcome]]:
        counted = sum(progress.updates for _, progress in self._together())
        who = self._allowed, self._judges
        batch = Folding(self.job, self._epoch, self.open, self.rounds, counted, *who)
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
        sums = [RoundSums(record.opened, progress.pool) for record, progress in self._together()]
        measured = [each for each in sums if each.opened is opened or each.pool.measured.any()]
        closing = self._method.close(measured, self.spec.tuning, self.adapter)
        return [self._closed(opened, "enough" if enough else "deadline", closing)]

    def decide_next(self) -> list[LogEvent | DetailEvent]:
        """What the log still lacks, apart from a due snapshot; asked again after every event."""
        if self.ended or not self.begun:
            return []
        if self.unlogged:
            return [self._evaluated(sequence, sums) for sequence, sums in self.unlogged]
        if self.open is not None:
            return [*self.decide_close()]
        if self.reported_round < self.round:
            return [self._report(self.rounds[self.round])]
        if not self.finished:
            return [self._next_round()]
        if self.snapshots.round != self.round or self.waiting:
            return []
        return [self._end("stopped" if self.stopped else "finished")]

    @property
    def waiting(self) -> bool:
        """Whether nothing but an OpenEpoch, or a StopJob, can move it on."""
        if not self.finished or self.stopped or self.ended:
            return False
        last = self._epoch + 1 >= self.spec.epochs
        return not last and self.snapshots.round == self.round

    def decide_stop(self) -> list[LogEvent]:
        """The close of the open round, or the end of a job that waits, or that lacks its start."""
        if self.waiting or self.start is not None:
            return [self._end("stopped")]
        return self.decide_close(stop=True)

    def decide_epoch(self, request: OpenEpoch, start: bytes, anchor: bytes | None) -> EpochOpened:
        """The next epoch; `start` and `anchor` are the bytes of the blobs that `request` names.

        Raises:
            RejectError: the job does not wait for it, or it cannot work; the text names what.
        """
        if not self.waiting:
            summary = self.summary()
            raise RejectError(
                f"job {self.job} is {summary.status} in epoch {summary.epoch + 1} of"
                f" {self.spec.epochs} and waits for no other; it does when the rounds of an epoch"
                " that is not the last are done"
            )
        return open_epoch(request, self.spec, self.adapter, start, anchor)

    def decide_published(self, snapshot: BlobRef) -> ModelPublished:
        """The fact that the adapter as it stands lies in the blob store."""
        adapter = self.adapter
        return ModelPublished(
            job=self.job,
            epoch=adapter.manifest.epoch,
            round=adapter.round,
            digest=adapter.digest(),
            snapshot=snapshot,
            epoch_sequence=self._stands.sequence,
        )

    # ---- evolve

    def evolve(self, event: LogEvent | DetailEvent, sequence: int) -> None:
        """Apply one fact; `sequence` is its place in its stream."""
        if isinstance(event, LogEvent):
            self.snapshots.see(event)
        match event:
            case EpochOpened():
                self._evolve_epoch(event, sequence)
            case RoundOpened():
                self.open = event
                self.round = event.round
                self.rounds[event.round] = RoundRecord.of(event, Counted(self._roster))
                self._forget()
            case RoundClosed():
                self._evolve_closed(event)
            case AdapterEvaluated():
                self._evolve_evaluated(event)
            case ModelPublished():
                self.snapshot_due = False
            case JobEnded():
                self.ended, self.open = event, None
                if self._standing is not None:
                    self._standing.forget()
            case UpdatesFolded():
                self._evolve_folded(event, sequence)
            case RoundReport():
                self.reported_round = max(self.reported_round, event.round)
                if event.epoch == self._epoch:
                    self._importance = event.importance or self._importance
                if event.round in self.rounds:
                    self.rounds[event.round].contributions.clear()
            case JobOpened():
                pass

    def summary(self) -> JobSummary:
        """What the operator is told of this job."""
        measured = self.snapshots.held_out.measured
        evaluated = measured[-1] if measured else None
        return JobSummary(
            job=self.job,
            status=self._status,
            epoch=self._epoch,
            epochs=self.spec.epochs,
            round=self.round,
            rounds=self.spec.tuning.rounds,
            digest=self.ended.digest if self.ended else self._stands.digest,
            reason=self.ended.reason if self.ended else "",
            accuracy=evaluated.accuracy if evaluated else None,
            loss=evaluated.loss if evaluated else None,
        )

    @property
    def progress(self) -> Progress:
        """Of the open round."""
        record = None if self.open is None else self.rounds[self.open.round]
        return (record and record.progress) or Progress(Pool(0))

    @property
    def start(self) -> BlobRef | None:
        """Where theta begins, as long as nobody has brought its bytes; see `begin`."""
        return None if self._standing is None else self._standing.start

    def begin(self, data: bytes) -> None:
        """The bytes of the blob `start` are here: theta begins with them.

        Raises:
            MalformedMessage: they are no adapter of the epoch's manifest.
        """
        self._stands.begin(data)

    # ---- inside

    @property
    def adapter(self) -> Adapter:
        """The adapter after the last close.

        Raises:
            RuntimeError: the job has no epoch (see `begun`), or not its start (see `begin`).
        """
        return self._stands.adapter

    @property
    def _stands(self) -> Standing:
        if self._standing is None:
            raise RuntimeError(f"job {self.job} has no epoch")
        return self._standing

    @property
    def _epoch(self) -> int:
        return 0 if self._standing is None else self._standing.epoch

    @property
    def _status(self) -> Literal["running", "finishing", "waiting", "ended"]:
        if self.ended:
            return "ended"
        if self.waiting:
            return "waiting"
        return "finishing" if self.finished else "running"

    @property
    def _method(self) -> Method:
        return METHODS[self.spec.tuning.method]

    def _together(self) -> list[tuple[RoundRecord, Progress]]:
        """The rounds that make one commit: those carried on, and the open one last."""
        numbers = [*self.carried, *([self.open.round] if self.open else [])]
        records = [self.rounds[number] for number in numbers]
        return [(record, record.progress) for record in records if record.progress is not None]

    def _enough(self, opened: RoundOpened) -> bool:
        progress = self.progress
        if opened.kind == "evaluate":
            return progress.evaluators >= self.spec.evaluation.enough_devices
        return progress.probes >= opened.enough_probes and progress.devices >= opened.enough_devices

    def _closed(
        self,
        opened: RoundOpened,
        reason: Literal["enough", "deadline", "abandoned", "evaluated", "stopped"],
        closing: Closing | None,
    ) -> RoundClosed:
        adapter, progress = self.adapter, self.progress
        more = closing is not None and closing.frozen is None
        waiting = more or (reason == "abandoned" and bool(self.carried))
        commit = None if waiting else self._commit(closing)
        if commit is not None:
            commit = adapter.fitting(commit)
        return RoundClosed(
            job=self.job,
            epoch=opened.epoch,
            round=opened.round,
            reason=reason,
            commit=commit,
            digest=self._stands.after(opened.round, commit),
            detail_sequence=self.detail_sequence,
            frozen=closing.frozen if closing else None,
            updates=progress.updates,
            late=progress.late_updates,
            devices=progress.devices,
            probes=progress.probes,
            weight=progress.loss_weight,
            loss=progress.loss * pooling.QUANTUM / progress.loss_weight
            if progress.loss_weight
            else None,
            signal=closing.signal if closing else None,
            more=more,
            variance=closing.variance if closing else None,
        )

    def _commit(self, closing: Closing | None) -> Commit | None:
        """The rounds' own terms, if they have enough for one, and the late ones, always."""
        late = [term for _, progress in self._together() for term in progress.late]
        terms = [*(closing.terms if closing else ()), *merged(late)]
        return Commit(self.spec.tuning.momentum, terms) if terms else None

    def _next_round(self) -> RoundOpened:
        spec, adapter, number = self.spec, self.adapter, self.round + 1
        plan = None
        if self.commits < spec.tuning.rounds:
            terms = self._newest.terms if self._newest else ()
            past = Past(self.commits, terms, self._importance)
            plan = self._method.plan(spec.tuning, adapter, number, past)
        opened = round_of(self.job, spec, adapter, number, plan, self.abandoned_in_a_row)
        due = self._evaluation_due and not self.carried
        return msgspec.structs.replace(
            opened,
            evaluate=plan is None or due,
            commits=self.commits,
            batch_round=self.carried[0] if self.carried else 0,
        )

    @property
    def _evaluation_due(self) -> bool:
        """Whether held-out rows are to be measured after so many commits."""
        every = self.spec.evaluation.every_rounds
        return bool(every) and self.commits % every == 0

    def _evaluated(self, sequence: int, sums: EvaluationSums) -> AdapterEvaluated:
        epoch = self.adapter.manifest.epoch
        fields = msgspec.structs.asdict(sums)
        return AdapterEvaluated(job=self.job, epoch=epoch, detail_sequence=sequence, **fields)

    def _report(self, record: RoundRecord) -> RoundReport:
        return RoundReport(
            job=self.job,
            epoch=record.opened.epoch,
            round=record.opened.round,
            contributions=list(record.contributions.values()),
            importance=record.visits.after(self._importance) if record.visits else None,
        )

    def _end(self, reason: Literal["finished", "stopped"]) -> JobEnded:
        stands = self.round - (self.open is not None)
        return JobEnded(self.job, self._epoch, stands, reason, self._stands.digest)

    def _evolve_epoch(self, event: EpochOpened, sequence: int) -> None:
        """Nothing of the epoch before is of use any more: its latecomers would move nothing."""
        self._standing = Standing(event, sequence)
        self.rounds, self.carried = {}, []
        self._roster.forget([])
        self.commits = self.abandoned_in_a_row = 0
        self.finished = self.snapshot_due = False
        self._newest = self._importance = None
        self.reported_round = self.round  # an epoch is opened after the report of the one before

    def _evolve_closed(self, event: RoundClosed) -> None:
        record = self.rounds.get(event.round)
        if record is None or self._standing is None:
            return
        self._standing.close(event)
        self.open = None
        self.round = event.round
        self.detail_sequence = max(self.detail_sequence, event.detail_sequence)
        self._carry(event, record)
        ended = event.reason in ("enough", "deadline") and not event.more
        tuned = record.opened.kind == "tune" and ended
        if tuned:
            self._newest = event.commit
        self.commits += tuned
        self.abandoned_in_a_row = self.abandoned_in_a_row + 1 if event.reason == "abandoned" else 0
        self.stopped = event.reason == "stopped"
        evaluation_left = self.spec.evaluation.every_rounds and record.opened.kind == "tune"
        complete = self.commits >= self.spec.tuning.rounds and not evaluation_left
        converged = self.snapshots.held_out.converged and not self.carried
        self.finished = self.stopped or complete or converged
        periodic = tuned and self.commits % self.spec.snapshot_every == 0
        # What is measured is published: it may turn out to be the best.
        measured = event.commit is not None and self._evaluation_due
        self.snapshot_due = self.snapshot_due or self.finished or periodic or measured

    def _carry(self, event: RoundClosed, record: RoundRecord) -> None:
        """Its sums wait for a later commit, or all that wait are in this one, or dropped.

        Told by LOG alone: a replay has not read DETAIL yet. A round to which nobody came while
        others wait is not carried, or they would pile up where nobody comes for long.
        """
        abandoned = event.reason == "abandoned"
        if self.carried and abandoned and not (event.updates or event.late):
            record.committed(None)
            return
        self.carried.append(event.round)
        if not (event.more or (abandoned and len(self.carried) > 1)):
            for number in self.carried:
                self.rounds[number].committed(event.frozen)
            self.carried = []

    def _evolve_evaluated(self, event: AdapterEvaluated) -> None:
        self.evaluations_logged.add((event.detail_sequence, event.round))
        self.unlogged = [
            (sequence, sums)
            for sequence, sums in self.unlogged
            if (sequence, sums.round) != (event.detail_sequence, event.round)
        ]

    def _evolve_folded(self, event: UpdatesFolded, sequence: int) -> None:
        self.detail_sequence = max(self.detail_sequence, sequence)
        self.unlogged += [
            (sequence, sums)
            for sums in event.evaluations
            if (sequence, sums.round) not in self.evaluations_logged
        ]
        for row in event.updates:
            if row.round in self.rounds:
                self.rounds[row.round].count(row)
            if row.kind == "probe" and event.round in self.rounds:
                contribute(self.rounds[event.round].contributions, row)
        for sums in (*event.sums, *event.walks):
            self._add(sums, sums.round or event.round)
        record = self.rounds.get(event.round)
        if record is None or record.progress is None:
            return
        progress = record.progress
        progress.late += event.late
        progress.loss += event.loss
        progress.loss_weight += event.loss_weight
        for row in event.updates:
            if row.kind == "evaluate":
                progress.evaluators += row.round == event.round
            elif row.outcome == "late":
                progress.late_updates += 1
            else:  # of a round that is carried on, it is not counted for the open one
                progress.updates += 1
                if row.round == event.round:
                    progress.probes += row.probes
                    progress.devices += record.seen.delivers(row.device)

    def _add(self, sums: PoolSums | WalkSums, number: int) -> None:
        """What updates add to the round `number`, if it has no commit yet."""
        record = self.rounds.get(number)
        if record is None:
            return
        if isinstance(sums, WalkSums) and record.visits is not None:
            record.visits.add(sums)
        if record.progress is None:
            return
        if isinstance(sums, WalkSums):
            record.progress.pool.add_walk(sums)
        else:
            record.progress.pool.add(sums)

    def _forget(self) -> None:
        """Drop what is past the lateness bound; of evaluated rounds, what probes need."""
        for number, record in list(self.rounds.items()):
            if record.progress is not None:
                continue
            age = self.round - number
            if age > self.spec.pacing.lateness_rounds:
                record.expire()
            if record.expired and (age > EVALUATION_ROUNDS or not record.opened.evaluate):
                del self.rounds[number]
        self._roster.forget([record.seen for record in self.rounds.values()])
