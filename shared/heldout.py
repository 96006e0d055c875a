"""What trusted devices measured of a job's adapters, and which of them did best. Pure.

The aggregator, the proxy and the console read the same facts and come to the same version.
"""

from dataclasses import dataclass
from itertools import islice

from shared.messages import (
    AdapterEvaluated,
    EpochOpened,
    JobOpened,
    LogEvent,
    ModelPublished,
    RoundClosed,
    RoundOpened,
)

MOST_VERSIONS = 256
"""So many published versions of an epoch are told apart; of more, the best and the newest."""
_BEST_KEPT = 32
_NEWEST_KEPT = 128
MOST_MEASURED = 10_000


@dataclass(eq=False)
class Measured:
    """What the trusted devices together say of the adapter that `round` opened with."""

    round: int
    examples: int = 0
    correct: int = 0
    weight: int = 0
    """0: nobody has answered yet."""
    loss_sum: float = 0.0
    """Nats."""

    @property
    def accuracy(self) -> float | None:
        return self.correct / self.examples if self.examples else None

    @property
    def loss(self) -> float | None:
        """Mean over `weight`, nats."""
        return self.loss_sum / self.weight if self.weight else None

    def add(self, event: AdapterEvaluated) -> None:
        """One more device's rows."""
        self.examples += event.examples
        self.correct += event.correct
        self.weight += event.weight
        self.loss_sum += event.loss


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
        self._ranked: list[ModelPublished] | None = None
        """None: not known since the last fact that may have changed it."""

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
                return
            case RoundClosed():
                if self._opened is None or event.commit is not None:
                    return
                stays = self._of.get(self._opened.digest)
                if stays is not None:
                    self._of[event.digest] = stays
            case AdapterEvaluated():
                self._measure(event)
            case ModelPublished():
                self._published[event.digest] = event
                self._forget()
            case _:
                return
        self._ranked = None

    def of(self, digest: str) -> Measured | None:
        """What was measured of this adapter, if anything was."""
        found = self._of.get(digest)
        return found if found is not None and found.weight else None

    def ranked(self) -> list[ModelPublished]:
        """The published adapters that were measured, the best first; of equals the newest.

        By accuracy where labels are chosen, and then by loss.
        """
        if self._ranked is None:
            found = [(self.of(digest), one) for digest, one in reversed(self._published.items())]
            judged = [(self._rank(figures), one) for figures, one in found if figures is not None]
            self._ranked = [one for _, one in sorted(judged, key=lambda pair: pair[0])]
        return list(self._ranked)

    @property
    def best(self) -> ModelPublished | None:
        """The first of `ranked`; None where nothing that is published was measured."""
        return next(iter(self.ranked()), None)

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
            rank = self._rank(measured)
            if best is None or rank < best:
                best, since = rank, 0
            else:
                since += 1
        return since >= self._patience

    def _measure(self, event: AdapterEvaluated) -> None:
        measured = self._of.get(event.digest)
        if measured is None or not event.weight:
            return
        first = not measured.weight
        measured.add(event)
        if first:  # it may come after that of a later round
            self.measured.append(measured)
            self.measured.sort(key=lambda one: one.round)
            del self.measured[:-MOST_MEASURED]

    def _rank(self, measured: Measured) -> tuple[float, float]:
        """Of what has been measured; the least is the best."""
        accuracy = measured.accuracy if self._by_accuracy else None
        return -(accuracy or 0.0), measured.loss_sum / measured.weight

    def _forget(self) -> None:
        """Drop versions that can hardly be the best any more, and what was measured of them."""
        if len(self._published) <= MOST_VERSIONS:
            return
        self._ranked = None
        best = {one.digest for one in self.ranked()[:_BEST_KEPT]}
        newest = set(islice(reversed(self._published), _NEWEST_KEPT))
        kept = best | newest
        self._published = {key: one for key, one in self._published.items() if key in kept}
        recent = set(islice(reversed(self._of), MOST_VERSIONS))
        self._of = {key: one for key, one in self._of.items() if key in kept or key in recent}
