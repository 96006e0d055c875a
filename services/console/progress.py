"""How far a job is, as its log tells it. Pure: facts go in, numbers and sentences come out."""

from dataclasses import dataclass

from shared.messages import (
    AdapterEvaluated,
    JobEnded,
    JobOpened,
    LogEvent,
    ModelPublished,
    RoundClosed,
    RoundOpened,
)


@dataclass
class Measured:
    """What the trusted devices together say of the adapter at one round."""

    round: int
    examples: int = 0
    correct: int = 0
    weight: int = 0
    summed: float = 0.0

    @property
    def accuracy(self) -> float | None:
        return self.correct / self.examples if self.examples else None

    @property
    def loss(self) -> float | None:
        return self.summed / self.weight if self.weight else None


@dataclass
class Progress:
    """A job as one line and, when it is over, as a summary."""

    job: str
    rounds: int = 0
    round: int = 0
    closed: int = 0
    abandoned: int = 0
    updates: int = 0
    devices: int = 0
    reason: str = ""
    loss: float | None = None
    first_loss: float | None = None
    first: Measured | None = None
    last: Measured | None = None
    published: ModelPublished | None = None
    ended: JobEnded | None = None

    def evolve(self, event: LogEvent) -> None:
        """Take in one fact of the job's log."""
        match event:
            case JobOpened():
                self.rounds = event.spec.tuning.rounds
            case RoundOpened():
                self.round = event.round
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

    def line(self) -> str:
        """The state of things in some fifty characters."""
        parts = [f"loss {_number(self.loss)}"]
        if self.last is not None and self.last.accuracy is not None:
            parts.append(f"accuracy {self.last.accuracy:.1%}")
        if self.last is not None:
            parts.append(f"held-out loss {_number(self.last.loss)}")
        parts.append(f"{self.devices} {'device' if self.devices == 1 else 'devices'}")
        return ", ".join(parts) + (f" ({self.reason})" if self.reason else "")

    def summary(self) -> list[tuple[str, str]]:
        """What came of it, as rows of a table."""
        rows = [("rounds closed", f"{self.closed}" + self._abandoned())]
        if self.ended is not None:
            rows.insert(0, ("ended", self.ended.reason))
        rows.append(("updates counted", str(self.updates)))
        rows.append(("devices' loss", f"{_number(self.first_loss)} -> {_number(self.loss)}"))
        if self.first is not None and self.last is not None:
            before, after = self.first, self.last
            if before.accuracy is not None and after.accuracy is not None:
                rows.append(("held-out accuracy", f"{before.accuracy:.1%} -> {after.accuracy:.1%}"))
            rows.append(("held-out loss", f"{_number(before.loss)} -> {_number(after.loss)}"))
        if self.published is not None:
            rows.append(("adapter", self.published.digest))
            rows.append(("snapshot blob", self.published.snapshot.digest))
        elif self.ended is not None:
            rows.append(("adapter", self.ended.digest))
        return rows

    def _close(self, event: RoundClosed) -> None:
        self.reason, self.devices = event.reason, event.devices
        self.updates += event.updates + event.late
        self.abandoned += event.reason == "abandoned"
        self.closed += event.commit is not None
        if event.loss is not None:
            self.loss = event.loss
            if self.first_loss is None:
                self.first_loss = event.loss

    def _measure(self, event: AdapterEvaluated) -> None:
        if self.last is None or event.round > self.last.round:
            self.last = Measured(event.round)
        if event.round != self.last.round:
            return
        self.last.examples += event.examples
        self.last.correct += event.correct
        self.last.weight += event.weight
        self.last.summed += event.loss
        if self.first is None:
            self.first = self.last

    def _abandoned(self) -> str:
        return f", {self.abandoned} abandoned" if self.abandoned else ""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
