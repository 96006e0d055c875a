"""What a job's log says of it, as far as an export tells it on. Pure."""

from dataclasses import dataclass, field

from services.console.failure import Failure
from shared.heldout import HeldOut, Measured
from shared.messages import (
    EpochOpened,
    JobEnded,
    JobOpened,
    JobSpec,
    LogEvent,
    ModelPublished,
    RoundClosed,
)


@dataclass
class History:
    """One job's facts of its last epoch."""

    job: str
    spec: JobSpec | None = None
    epoch: EpochOpened | None = None
    closed: list[RoundClosed] = field(default_factory=list[RoundClosed])
    held_out: HeldOut = field(default_factory=HeldOut)
    published: dict[int, ModelPublished] = field(default_factory=dict[int, ModelPublished])
    ended: JobEnded | None = None

    def evolve(self, event: LogEvent) -> None:
        """Take in one fact."""
        self.held_out.see(event)
        match event:
            case JobOpened():
                self.spec = event.spec
            case EpochOpened():
                self.epoch = event
                self.closed, self.published = [], {}
            case RoundClosed():
                self.closed.append(event)
            case ModelPublished():
                self.published[event.round] = event
            case JobEnded():
                self.ended = event
            case _:
                pass

    def opened(self) -> tuple[JobSpec, EpochOpened]:
        """The events that a job begins with.

        Raises:
            Failure: the log has none of this job.
        """
        if self.spec is None or self.epoch is None:
            raise Failure(f"no job is called {self.job}; `seedwire job list` names them")
        return self.spec, self.epoch

    def round_to_export(self, wanted: int | None) -> int:
        """`wanted`, or else the published one that did best, or the newest of them, or of all.

        Raises:
            Failure: that round has not closed.
        """
        if not self.closed:
            epoch = self.epoch.epoch if self.epoch else 0
            where = f" in epoch {epoch + 1}" if epoch else ""
            raise Failure(
                f"no round of job {self.job} has closed yet{where}, so there is no adapter: "
                f"see `seedwire job watch {self.job}`"
            )
        last = self.closed[-1].round
        if wanted is None:
            best = self.held_out.best
            return best.round if best else max(self.published, default=last)
        if all(closed.round != wanted for closed in self.closed):
            snapshots = ", ".join(map(str, sorted(self.published)[-5:])) or "none yet"
            raise Failure(
                f"--round {wanted}: job {self.job} has rounds {self.closed[0].round} to {last}; "
                f"the newest that were published: {snapshots}"
            )
        return wanted

    def is_best(self, round: int) -> bool:
        """Whether the adapter after `round` is the published one that did best."""
        best = self.held_out.best
        return best is not None and best.round == round

    def until(self, round: int) -> list[RoundClosed]:
        """The closes up to `round`."""
        return [closed for closed in self.closed if closed.round <= round]

    def evaluations_until(self, round: int) -> list[Measured]:
        """What was measured of the adapters up to that of `round`, in order."""
        last = self.evaluation_of(round)
        return [one for one in self.held_out.measured if one.round <= round or one is last]

    def evaluation_of(self, round: int) -> Measured | None:
        """What was measured of the very adapter that `round` ended with, if anything was."""
        digests = (closed.digest for closed in self.closed if closed.round == round)
        return next(filter(None, map(self.held_out.of, digests)), None)
