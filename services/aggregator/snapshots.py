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
        self._outdated: tuple[list[BlobRef], list[BlobRef]] = ([], [])
        """Those that were so when the last but one was published, and when the last was."""

    def see(self, event: LogEvent) -> None:
        """Take in one fact."""
        self.held_out.see(event)
        match event:
            case EpochOpened():
                self._begun_with += filter(None, (event.start, event.anchor))
            case ModelPublished():
                self.round = event.round
                # Who is restarted tells the store once more: the first time may have been cut
                # short.
                told, again = self._outdated
                there = [one for one in self.listed if one not in told or one not in again]
                self.listed = [*there, event.snapshot]
                self._outdated = again, self.outdated
            case _:
                pass

    @property
    def outdated(self) -> list[BlobRef]:
        """What newer or better ones pushed out, unless a kept one has the same bytes."""
        needed = self.needed
        return [snapshot for snapshot in self.listed if snapshot not in needed]

    @property
    def needed(self) -> list[BlobRef]:
        """Where the job began, its newest, its best, and what may be."""
        judged = self.held_out.ranked()[:KEPT]
        judged += self.held_out.awaited()[-KEPT_UNMEASURED:]
        return [*self._begun_with, *self.listed[-KEPT:], *(one.snapshot for one in judged)]
