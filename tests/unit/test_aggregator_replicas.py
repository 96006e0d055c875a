"""An aggregator that restarts, and reads a replica of the broker that lags behind its streams."""

from collections.abc import AsyncGenerator

import pytest

from shared.bus import Stored
from shared.memory_bus import MemoryBroker
from tests.support.aggregators import an_aggregator, open_round, stored
from tests.support.jobs import a_job, a_probe

LAG = 3
READS = 3


async def test_it_reads_on_until_it_has_all_that_the_leader_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broker = MemoryBroker()
    one, two = broker.connect("one"), broker.connect("two")
    first = await an_aggregator(one)
    await first.answer(a_job(enough_devices=9))
    opened = open_round(first)
    for number, device in enumerate(("a", "b"), start=1):
        await first.fold([stored(a_probe(opened, device), number)])
    read, reads = two.read, dict[str, int]()

    async def lagging(
        stream: str, subject: str, *, after: int = 0, up_to: int = 0
    ) -> AsyncGenerator[Stored, None]:
        """Without the newest entries, for some reads."""
        reads[stream] = reads.get(stream, 0) + 1
        last = broker.streams[stream].last - (LAG if reads[stream] <= READS else 0)
        async for entry in read(stream, subject, after=after, up_to=up_to):
            if entry.sequence > last:
                return
            yield entry

    monkeypatch.setattr(two, "read", lagging)
    second = await an_aggregator(two)
    assert set(reads.values()) == {READS + 1}
    again = second.jobs["demo"]
    assert again.open == opened
    assert again.progress.updates == first.jobs["demo"].progress.updates == 2
