"""A job's published versions: what the store keeps of them, and what it is to forget. Pure."""

from shared.heldout import HeldOut
from shared.messages import BlobRef, EpochOpened, LogEvent, ModelPublished

KEPT = 2
"""So many of the newest, and so many of those that did best on held-out rows, as one more device's
figures may change which of them is the best."""
KEPT_UNMEASURED = 8
"""So many of the newest whose figures are yet to come stay as well: one may be the best."""


class Snapshots:
    """What the log says of them; feed it each fact of the job."""

    def __init__(self) -> None:
        self.held_out = HeldOut()
        self.listed: list[BlobRef] = []
        """Those that may be in the store."""
        self.round = -1
        """Of the newest."""
        self._begun_with: list[BlobRef] = []
        """Starts and anchors of all epochs: each is needed by whoever reads the log."""
        self._best_before: list[BlobRef] = []
        """Of the epoch before, until this one has published: it serves so long."""
        self._outdated_before: set[BlobRef] = set()
        self._outdated_then: set[BlobRef] = set()
        """Those that were so when the last but one was published, and when the last was."""

    def see(self, event: LogEvent) -> None:
        """Take in one fact."""
        if isinstance(event, EpochOpened):
            best = self.held_out.best
            self._best_before = [best.snapshot] if best else []
        self.held_out.see(event)
        match event:
            case EpochOpened():
                self._begun_with += filter(None, (event.start, event.anchor))
            case ModelPublished():
                self.round, self._best_before = event.round, []
                # Gone is what was outdated twice: who is restarted tells the store once more, as
                # the first time may have been cut short.
                gone = self._outdated_before & self._outdated_then
                self.listed = [*(one for one in self.listed if one not in gone), event.snapshot]
                self._outdated_before = self._outdated_then
                self._outdated_then = set(self.outdated)
            case _:
                pass

    @property
    def outdated(self) -> list[BlobRef]:
        """What newer or better ones pushed out, unless a kept one has the same bytes."""
        needed = set(self.needed)
        return [snapshot for snapshot in self.listed if snapshot not in needed]

    @property
    def needed(self) -> list[BlobRef]:
        """Where the job began, its newest, its best, and what may be."""
        judged = self.held_out.ranked()[:KEPT]
        judged += self.held_out.awaited()[-KEPT_UNMEASURED:]
        kept = [*self._begun_with, *self._best_before, *self.listed[-KEPT:]]
        return [*kept, *(one.snapshot for one in judged)]
