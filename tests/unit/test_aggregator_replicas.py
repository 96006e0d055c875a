"""An aggregator that restarts, and reads a replica of the broker that lags behind its streams."""

from collections.abc import AsyncGenerator

import pytest

from services.aggregator.config import Settings
from services.aggregator.service import Aggregator
from shared.bus import Stored
from shared.clock import SystemClock
from shared.codec import encode
from shared.log import ensure_streams
from shared.memory_bus import MemoryBroker
from shared.subjects import update as subject_of
from tests.support.jobs import a_job, a_probe

LAG = 3
READS = 3


async def test_it_reads_on_until_it_has_all_that_the_leader_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broker = MemoryBroker()
    one, two = broker.connect("one"), broker.connect("two")
    await ensure_streams(one)
    first = Aggregator(one, one, Settings(), SystemClock())
    await first.replay()
    await first.answer(a_job(enough_devices=9))
    opened = first.jobs["demo"].open
    assert opened is not None
    for number, device in enumerate(("a", "b"), start=1):
        probe = a_probe(opened, device)
        stored = Stored(number, subject_of("demo", device), encode(probe), {})
        await first.fold([stored])
    read, reads = two.read, dict[str, int]()

    async def lagging(
        stream: str, subject: str, *, after: int = 0, up_to: int = 0
    ) -> AsyncGenerator[Stored, None]:
        """Without the newest entries, for some reads."""
        reads[stream] = reads.get(stream, 0) + 1
        last = broker.streams[stream].last - (LAG if reads[stream] <= READS else 0)
        async for stored in read(stream, subject, after=after, up_to=up_to):
            if stored.sequence > last:
                return
            yield stored

    monkeypatch.setattr(two, "read", lagging)
    second = Aggregator(two, two, Settings(), SystemClock())
    await second.replay()
    assert set(reads.values()) == {READS + 1}
    again = second.jobs["demo"]
    assert again.open == opened
    assert again.progress.updates == first.jobs["demo"].progress.updates == 2
