"""What trusted devices measured of a job's adapters, and which of them did best. Pure.

The aggregator, the proxy and the console read the same facts and come to the same version.
"""

from dataclasses import dataclass

from shared.messages import (
    AdapterEvaluated,
    EpochOpened,
    JobOpened,
    LogEvent,
    ModelPublished,
    RoundClosed,
    RoundOpened,
)


@dataclass(eq=False)
class Measured:
    """What the trusted devices together say of the adapter that `round` opened with."""

    round: int
    examples: int = 0
    correct: int = 0
    weight: int = 0
    summed: float = 0.0
    """Loss, nats."""

    @property
    def accuracy(self) -> float | None:
        return self.correct / self.examples if self.examples else None

    @property
    def loss(self) -> float | None:
        """Mean over `weight`, nats."""
        return self.summed / self.weight if self.weight else None

    def add(self, event: AdapterEvaluated) -> None:
        """One more device's rows."""
        self.examples += event.examples
        self.correct += event.correct
        self.weight += event.weight
        self.summed += event.loss


class HeldOut:
    """The measurements of a job's present epoch; feed it each fact of the job once, in order."""

    def __init__(self) -> None:
        self.measured: list[Measured] = []
        """In the order of their rounds."""
        self._of: dict[str, Measured] = {}
        """By the adapter's digest; a round that does not move it changes its digest alone."""
        self._published: dict[str, ModelPublished] = {}
        self._opened: RoundOpened | None = None
        self._by_accuracy = True
        self._patience = 0

    def see(self, event: LogEvent) -> None:
        """Take in one fact."""
        match event:
            case JobOpened():
                self._by_accuracy = event.spec.task.loss == "choices"
                self._patience = event.spec.evaluation.patience
            case EpochOpened():
                self.measured, self._of, self._published = [], {}, {}
            case RoundOpened():
                self._opened = event
                if event.evaluate:
                    self._of.setdefault(event.digest, Measured(event.round))
            case RoundClosed():
                if self._opened is not None and event.commit is None:
                    stays = self._of.get(self._opened.digest)
                    if stays is not None:
                        self._of[event.digest] = stays
            case AdapterEvaluated():
                self._measure(event)
            case ModelPublished():
                self._published[event.digest] = event
            case _:
                pass

    def of(self, digest: str) -> Measured | None:
        """What was measured of this adapter, if anything was."""
        found = self._of.get(digest)
        return found if found is not None and found.weight else None

    def ranked(self) -> list[ModelPublished]:
        """The published adapters that were measured, the best first; of equals the newest.

        By accuracy where labels are chosen, and then by loss.
        """
        found = [(self.of(digest), one) for digest, one in reversed(self._published.items())]
        measured = [(figures, one) for figures, one in found if figures is not None]
        return [one for _, one in sorted(measured, key=lambda pair: self._rank(pair[0]))]

    def awaited(self) -> list[ModelPublished]:
        """The published adapters that are being measured, in order: nobody has answered yet."""
        found = ((self._of.get(digest), one) for digest, one in self._published.items())
        return [one for measured, one in found if measured is not None and not measured.weight]

    @property
    def converged(self) -> bool:
        """Whether measurements have brought nothing better for as long as the job has patience."""
        if not self._patience:
            return False
        best, since = None, 0
        for measured in self.measured:
            if best is None or self._better(measured, best):
                best, since = measured, 0
            else:
                since += 1
        return since >= self._patience

    def _measure(self, event: AdapterEvaluated) -> None:
        measured = self._of.get(event.digest)
        if measured is None:
            return
        measured.add(event)
        if measured not in self.measured:  # one may come after that of a later round
            self.measured.append(measured)
            self.measured.sort(key=lambda one: one.round)

    def _better(self, one: Measured, other: Measured) -> bool:
        return self._rank(one) < self._rank(other)

    def _rank(self, measured: Measured) -> tuple[float, float]:
        accuracy = measured.accuracy if self._by_accuracy else None
        loss = measured.summed / measured.weight if measured.weight else 0.0
        return -(accuracy or 0.0), loss
