"""Aggregators on the in-memory broker that a test drives by hand, several on one log."""

from services.aggregator.config import Settings
from services.aggregator.service import Aggregator
from shared import subjects
from shared.bus import Link, Stored
from shared.clock import Clock, SystemClock
from shared.codec import encode
from shared.log import ensure_streams
from shared.messages import RoundOpened, SubmitUpdate


async def an_aggregator(link: Link, clock: Clock | None = None) -> Aggregator:
    """One that has read the streams; they are there."""
    await ensure_streams(link)
    aggregator = Aggregator(link, link, Settings(), clock or SystemClock())
    await aggregator.replay()
    return aggregator


def open_round(aggregator: Aggregator, job: str = "demo") -> RoundOpened:
    opened = aggregator.jobs[job].open
    assert opened is not None
    return opened


def stored(update: SubmitUpdate, sequence: int = 1) -> Stored:
    """The update as an aggregator takes it from its stream."""
    subject = subjects.update(update.key.job, update.key.device)
    return Stored(sequence, subject, encode(update), {})
