"""What a device reads of a job's log before it follows it: the opening, and the end backwards.

Reading backwards ends at the newest snapshot, so that a long log need not be read to find it; what
is read on the way has to be applied after that snapshot anyway.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from shared import subjects
from shared.bus import Streams
from shared.clock import Clock
from shared.codec import decode
from shared.errors import EngineError, MalformedMessage
from shared.messages import EpochOpened, JobOpened, LogEvent, Message, ModelPublished, RoundClosed

WINDOW = 128
KEPT_BYTES = 4 * 1024 * 1024
"""Reading backwards ends here; a replay reads what is before it from its beginning."""


@dataclass(frozen=True, slots=True)
class Entry:
    sequence: int
    size_bytes: int
    event: LogEvent


@dataclass(frozen=True, slots=True)
class Epoch:
    """An epoch, and where it was opened."""

    epoch: EpochOpened
    sequence: int


@dataclass(frozen=True, slots=True)
class Opening(Epoch):
    """The first facts of a job."""

    opened: JobOpened


@dataclass(frozen=True, slots=True)
class Tail:
    """The log's newest entries, oldest first: all beyond `after`.

    `snapshot` is the newest among them; `closes` counts the rounds closed and `close_bytes` is what
    one took on average.
    """

    entries: list[Entry]
    after: int
    last: int
    snapshot: ModelPublished | None

    @property
    def close_bytes(self) -> float:
        closes = sum(isinstance(entry.event, RoundClosed) for entry in self.entries)
        return sum(entry.size_bytes for entry in self.entries) / closes if closes else 0.0


@dataclass(slots=True)
class Link:
    """How fast the broker's bytes arrive; the newest measurement counts for a third."""

    bytes_per_s: float = 1e6
    _floor_bytes: int = field(default=16_384)

    def moved(self, size_bytes: int, seconds: float) -> None:
        """Count one transfer; small ones say more of the delay than of the rate."""
        if size_bytes >= self._floor_bytes and seconds > 0:
            self.bytes_per_s += (size_bytes / seconds - self.bytes_per_s) / 3


async def opening(streams: Streams, job: str) -> Opening:
    """How the job began.

    Raises:
        EngineError: the log does not know the job.
        TransientError: the broker did not answer.
    """
    opened: JobOpened | None = None
    async with aclosing(entries(streams, job, 0, 0)) as beginning:
        async for entry in beginning:
            match entry.event:
                case JobOpened():
                    opened = entry.event
                case EpochOpened() if opened is not None:
                    return Opening(entry.event, entry.sequence, opened)
                case _:
                    pass
    raise EngineError(f"job {job} has no beginning in the log: was the broker's store emptied?")


async def newest_epoch(streams: Streams, job: str, epoch: int, found: Tail) -> Epoch | None:
    """The newest epoch, if it is one after `epoch` and the log's end tells of it.

    Raises:
        TransientError: the broker did not answer.
    """
    opened = [entry for entry in found.entries if isinstance(entry.event, EpochOpened)]
    snapshot = found.snapshot
    if not opened and snapshot is not None and snapshot.epoch_sequence:
        place = snapshot.epoch_sequence
        async with aclosing(entries(streams, job, place - 1, place)) as one:
            opened = [entry async for entry in one]
    for entry in opened[-1:]:
        if isinstance(entry.event, EpochOpened) and entry.event.epoch > epoch:
            return Epoch(entry.event, entry.sequence)
    return None


async def tail(streams: Streams, job: str, after: int, link: Link, clock: Clock) -> Tail:
    """The end of the log, back to the newest snapshot or to `after`.

    Raises:
        TransientError: the broker did not answer.
    """
    newest = await streams.get_last(subjects.LOG_STREAM, subjects.log(job))
    last = after if newest is None else max(newest.sequence, after)
    found: list[Entry] = []
    snapshot: ModelPublished | None = None
    start, window, size_bytes = last, WINDOW, 0
    while start > after and not _reaches(found, snapshot) and size_bytes < KEPT_BYTES:
        end, start = start, max(after, start - window)
        window *= 2
        began = clock.now()
        page = [entry async for entry in entries(streams, job, start, end)]
        page_bytes = sum(entry.size_bytes for entry in page)
        link.moved(page_bytes, clock.now() - began)
        found = page + found
        size_bytes += page_bytes
        if snapshot is None:
            published = [e.event for e in page if isinstance(e.event, ModelPublished)]
            snapshot = published[-1] if published else None
    return Tail(found, start, last, snapshot)


async def entries(
    streams: Streams, job: str, after: int, up_to: int
) -> AsyncGenerator[Entry, None]:
    """A stretch of the job's log; what does not decode is skipped."""
    stored_entries = streams.read(subjects.LOG_STREAM, subjects.log(job), after=after, up_to=up_to)
    async with aclosing(stored_entries):
        async for stored in stored_entries:
            try:
                event = decode(stored.data, Message)
            except MalformedMessage:
                continue
            if isinstance(event, LogEvent):
                yield Entry(stored.sequence, len(stored.data), event)


def _reaches(found: list[Entry], snapshot: ModelPublished | None) -> bool:
    """Whether everything after the snapshot's round is there; it may be logged some rounds late."""
    return snapshot is not None and any(
        isinstance(entry.event, RoundClosed)
        and entry.event.epoch == snapshot.epoch
        and entry.event.round <= snapshot.round
        for entry in found
    )
