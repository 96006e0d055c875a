"""How far a job is, as its log tells it. Pure: facts go in, numbers and sentences come out."""

from dataclasses import dataclass, field

from shared.heldout import HeldOut, Measured
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
)


@dataclass
class Progress:
    """A job as one line and, when it is over, as a summary."""

    job: str
    rounds: int = 0
    epoch: int = 0
    epochs: int = 1
    distilled: Distilled | None = None
    round: int = 0
    closed: int = 0
    closed_before: int = 0
    """In the epochs before this one."""
    abandoned: int = 0
    updates: int = 0
    devices: int = 0
    reason: str = ""
    is_open: bool = False
    """Whether a round is."""
    has_answers: bool = True
    """Whether the task has right answers, so that an accuracy means something."""
    final: bool = False
    """The round measures the adapter as it will stay."""
    news: bool = False
    """Held-out figures came with the round that has just closed."""
    loss: float | None = None
    first_loss: float | None = None
    first: Measured | None = None
    last: Measured | None = None
    published: ModelPublished | None = None
    ended: JobEnded | None = None
    evaluations: list[Measured] = field(default_factory=list[Measured])
    losses: list[float] = field(default_factory=list[float])
    """Of the devices' batches, by round."""
    _measured: bool = False
    _judged: HeldOut = field(default_factory=HeldOut)

    @property
    def untouched(self) -> bool:
        """No device has sent anything yet."""
        return not self.updates and self.last is None

    def evolve(self, event: LogEvent) -> None:
        """Take in one fact of the job's log."""
        self._judged.see(event)
        match event:
            case JobOpened():
                self.rounds, self.epochs = event.spec.tuning.rounds, event.spec.epochs
                self.has_answers = event.spec.task.loss != "tokens"
            case EpochOpened():
                self.epoch, self.distilled = event.epoch, event.distilled
                self.closed_before = self.closed
            case RoundOpened():
                self.round, self.final = event.round, event.kind == "evaluate"
                self.is_open = True
            case RoundClosed():
                self._close(event)
            case AdapterEvaluated():
                self._measure(event)
            case ModelPublished():
                self.published = event
            case JobEnded():
                self.ended = event
            case _:
                pass

    @property
    def kept(self) -> ModelPublished | None:
        """The version that serves and is exported: the best that was measured, or the newest."""
        return self._judged.best or self.published

    @property
    def waits(self) -> bool:
        """Whether the rounds of an epoch that is not the last are done and published."""
        if self.ended is not None or self.epoch + 1 >= self.epochs or self.published is None:
            return False
        done = self.closed - self.closed_before >= self.rounds or self._judged.converged
        return done and not self.is_open and self.published.round == self.round

    def epoch_line(self) -> str:
        """What the epoch that has just begun starts with."""
        made = self.distilled
        if made is None:
            return f"epoch {self.epoch + 1} begins"
        losses = [("held-out loss", made.held_out_loss_before, made.held_out_loss_after)]
        losses.append(("ensemble's loss", made.ensemble_loss_before, made.ensemble_loss_after))
        before, after = made.teacher_entropy_before, made.teacher_entropy_after
        losses.append(("teacher's entropy", before, after))
        told = [f"{name} {_number(old)} -> {_number(new)}" for name, old, new in losses]
        return f"epoch {self.epoch + 1} begins distilled: {', '.join(told)}"

    def curve(self) -> tuple[str, list[float]]:
        """What tells best how well the job goes, by name, and its values so far."""
        measured = self.evaluations
        if not measured:  # of batches that differ from round to round: says less
            return "devices' loss", self.losses
        if self.has_answers and all(one.examples for one in measured):
            return "held-out accuracy", [one.correct / one.examples for one in measured]
        return "held-out loss", [one.loss for one in measured if one.loss is not None]

    def line(self) -> str:
        """The state of things in some fifty characters."""
        parts = [f"loss {_number(self.loss)}", *self._held_out()]
        return ", ".join([*parts, "final evaluation" if self.final else self._came()])

    def close_line(self) -> str:
        """What the round that has just closed brought; held-out figures only where they are new."""
        new = self._held_out() if self.news else []
        if self.final:
            return f"final evaluation: {', '.join(new) or 'none came'}"
        if new and self.last is not None and self.last.round < self.round:
            new[-1] += f" (as round {self.last.round} began)"
        parts = [f"loss {_number(self.loss)}", *new, self._came()]
        return f"round {self.round}: {', '.join(parts)}"

    def summary(self) -> list[tuple[str, str]]:
        """What came of it, as rows of a table."""
        rows = [("rounds closed", f"{self.closed}" + self._abandoned())]
        if self.epochs > 1:
            rows.insert(0, ("epochs", f"{self.epoch + 1} of {self.epochs}"))
        if self.ended is not None:
            early = self._judged.converged and self.closed - self.closed_before < self.rounds
            stood = early and self.ended.reason == "finished"
            why = ", as nothing came that was better" if stood else ""
            rows.insert(0, ("ended", self.ended.reason + why))
        rows.append(("updates counted", str(self.updates)))
        if self.first is not None and self.last is not None:
            before, after = self.first, self.last
            if self.has_answers and before.accuracy is not None and after.accuracy is not None:
                rows.append(("held-out accuracy", f"{before.accuracy:.1%} -> {after.accuracy:.1%}"))
            rows.append(("held-out loss", f"{_number(before.loss)} -> {_number(after.loss)}"))
        else:  # of batches that differ from round to round: says less
            rows.append(("devices' loss", f"{_number(self.first_loss)} -> {_number(self.loss)}"))
        if self.kept is not None:
            name, figures = f"after round {self.kept.round}", self._judged.of(self.kept.digest)
            if figures is not None:
                rows.append((f"best, {name}", ", ".join(self._figures(figures))))
            rows.append((f"adapter {name}", self.kept.digest))
            rows.append(("its snapshot blob", self.kept.snapshot.digest))
        elif self.ended is not None:
            rows.append(("adapter", self.ended.digest))
        return rows

    def _close(self, event: RoundClosed) -> None:
        self.round, self.devices, self.is_open = event.round, event.devices, False
        self.reason = "more on the same batch" if event.more else event.reason
        self.news, self._measured = self._measured, False
        self.updates += event.updates + event.late
        self.abandoned += event.reason == "abandoned"
        self.closed += event.commit is not None
        if event.loss is not None:
            self.loss = event.loss
            self.losses.append(event.loss)
            if self.first_loss is None:
                self.first_loss = event.loss

    def _measure(self, event: AdapterEvaluated) -> None:
        if self.last is None or event.round > self.last.round:
            self.last = Measured(event.round)
            self.evaluations.append(self.last)
        if event.round != self.last.round:
            return
        self.last.add(event)
        self._measured = True
        if self.first is None:
            self.first = self.last

    def _held_out(self) -> list[str]:
        return [] if self.last is None else self._figures(self.last)

    def _figures(self, measured: Measured) -> list[str]:
        loss = f"held-out loss {_number(measured.loss)}"
        if measured.accuracy is None or not self.has_answers:
            return [loss]
        return [f"accuracy {measured.accuracy:.1%}", loss]

    def _came(self) -> str:
        came = f"{self.devices} {'device' if self.devices == 1 else 'devices'}"
        return f"{came} ({self.reason})" if self.reason else came

    def _abandoned(self) -> str:
        return f", {self.abandoned} abandoned" if self.abandoned else ""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
