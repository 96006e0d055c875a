"""Where a job's theta stands as its log has it, moved no sooner than somebody looks."""

from shared.adapter import Adapter
from shared.messages import BlobRef, Commit, EpochOpened, RoundClosed


class Standing:
    """Theta of one epoch after the closes it was told of."""

    def __init__(self, event: EpochOpened, sequence: int) -> None:
        """As the epoch begins; `sequence` is where the log says so."""
        self.sequence = sequence
        self.digest = event.digest
        """As the log has it."""
        self.start: BlobRef | None = event.start
        """Where theta begins, as long as nobody has brought its bytes; see `begin`."""
        self._theta = Adapter(event.manifest)
        self._manifest = event.manifest
        self._behind: list[RoundClosed] = []
        """Closes that theta has not been moved by: a replay of an ended job needs none of them."""
        self._successor: Adapter | None = None

    @property
    def epoch(self) -> int:
        return self._theta.manifest.epoch

    @property
    def adapter(self) -> Adapter:
        """The adapter after the last close.

        Raises:
            RuntimeError: nobody has brought its start.
        """
        if self.start is not None:
            raise RuntimeError("nobody has brought what the epoch starts with")
        for close in self._behind:
            self._theta.apply(close.round, close.commit)
        self._behind.clear()
        return self._theta

    def begin(self, data: bytes) -> None:
        """The bytes of the blob `start` are here: theta begins with them.

        It is the one thing that the log's facts cannot tell. A replay goes on without.

        Raises:
            MalformedMessage: they are no adapter of the epoch's manifest.
        """
        if self.start is not None:
            self._theta = Adapter.from_bytes(self._manifest, data)
            self.start = None

    def after(self, round: int, commit: Commit | None) -> str:
        """The digest after a close of `round` with `commit`, which the log has not yet."""
        self._successor = self.adapter.after(round, commit)
        return self._successor.digest()

    def close(self, event: RoundClosed) -> None:
        """The log has it."""
        successor, self._successor = self._successor, None
        if successor is not None and successor.digest() == event.digest:
            self._theta = successor
        else:
            self._behind.append(event)
        self.digest = event.digest

    def forget(self) -> None:
        """Nobody is going to look any more."""
        self._behind.clear()
