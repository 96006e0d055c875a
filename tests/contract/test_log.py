"""The job log over both brokers: one writer, and followers without gaps or repeats."""

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, Literal, TypeVar

import pytest

from shared import log, subjects
from shared.bus import Appended, Delivery, Link, SequenceMismatch
from shared.errors import Fenced
from shared.log import ensure_streams, follow, follow_all, follow_detail
from shared.log_writer import LogWriter
from shared.messages import JobEnded, RoundReport
from shared.nats_bus import connect
from shared.subjects import DETAIL_STREAM, LOG_STREAM
from tests.support.hubs import Hub, MemoryHub, NatsHub
from tests.support.proxy import start_proxy
from tests.support.waiting import wait_until

Item = TypeVar("Item")


def an_event(job: str, number: int) -> JobEnded:
    return JobEnded(job=job, epoch=0, round=number, reason="finished", digest="0" * 64)


def a_report(job: str, number: int) -> RoundReport:
    return RoundReport(job=job, epoch=0, round=number, contributions=[])


async def rounds(followed: AsyncIterator[tuple[int, JobEnded | object]], count: int) -> list[int]:
    """The rounds of the next `count` events."""
    got: list[int] = []
    async with asyncio.timeout(20):
        while len(got) < count:
            _, event = await anext(followed)
            assert isinstance(event, JobEnded | RoundReport)
            got.append(event.round)
    return got


@pytest.fixture
async def bus(hub: Hub) -> Link:
    link = await hub.connect("aggregator")
    await ensure_streams(link)
    return link


async def test_a_second_writer_is_fenced_off(bus: Link) -> None:
    first = await LogWriter.open(bus, LOG_STREAM)
    second = await LogWriter.open(bus, LOG_STREAM)
    assert await first.append("a", an_event("a", 1)) == 1
    with pytest.raises(Fenced, match="another aggregator"):
        await second.append("a", an_event("a", 1))
    assert await first.append("b", an_event("b", 2)) == 2
    restarted = await LogWriter.open(bus, LOG_STREAM)
    assert await restarted.append("a", an_event("a", 3)) == 3
    with pytest.raises(Fenced):
        await first.append("a", an_event("a", 3))
    assert [sequence async for sequence, _ in log.read(bus, LOG_STREAM, subjects.log("a"))] == [
        1,
        3,
    ]


async def test_a_broker_that_lost_entries_stops_the_writer(
    bus: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.log_writer.BEHIND_S", 0.2)
    ahead = LogWriter(bus, LOG_STREAM, last=7)
    with pytest.raises(Fenced, match="the broker has lost entries"):
        await ahead.append("a", an_event("a", 1))
    with pytest.raises(Fenced, match="the broker has lost entries"):
        await ahead.check()


async def test_a_broker_that_answers_from_before_for_a_while_stops_nobody(
    memory_hub: MemoryHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a server does that was cut off from its cluster and does not know it yet."""
    bus = await memory_hub.connect("aggregator")
    await ensure_streams(bus)
    writer = await LogWriter.open(bus, LOG_STREAM)
    await writer.append("a", an_event("a", 1))
    append, last_sequence, times = bus.append, bus.last_sequence, 3

    async def behind(subject: str, data: bytes, **options: Any) -> Appended:
        nonlocal times
        times -= 1
        if times > 0:
            raise SequenceMismatch("wrong last sequence: 0", 0)
        return await append(subject, data, **options)

    async def from_before(stream: str, subject: str = "") -> int:
        nonlocal times
        times -= 1
        return 0 if times > 0 else await last_sequence(stream, subject)

    monkeypatch.setattr(bus, "append", behind)
    assert await writer.append("a", an_event("a", 2)) == 2
    assert not writer.problem
    times = 3
    monkeypatch.setattr(bus, "last_sequence", from_before)
    await writer.check()


async def test_an_append_whose_answer_was_lost_is_not_doubled(memory_hub: MemoryHub) -> None:
    bus = await memory_hub.connect("aggregator")
    await ensure_streams(bus)
    fates: list[Literal["stored", "lost", "unanswered"]] = ["lost", "unanswered", "stored"]
    memory_hub.broker.append_fate = lambda _subject, _data: fates.pop(0) if fates else "stored"
    writer = await LogWriter.open(bus, LOG_STREAM)
    assert await writer.append("a", an_event("a", 1)) == 1
    assert await writer.append("a", an_event("a", 2)) == 2
    assert await bus.last_sequence(LOG_STREAM) == 2


async def test_a_writer_whose_answer_was_lost_sees_that_it_was_another_who_wrote(
    memory_hub: MemoryHub,
) -> None:
    bus = await memory_hub.connect("aggregator")
    await ensure_streams(bus)
    writer, other = [await LogWriter.open(bus, LOG_STREAM) for _ in range(2)]
    memory_hub.broker.append_fate = lambda _subject, _data: "lost"
    async with asyncio.TaskGroup() as group:
        appending = group.create_task(refused(writer))
        await asyncio.sleep(0.02)
        memory_hub.broker.append_fate = lambda _subject, _data: "stored"
        await other.append("a", an_event("a", 9))
        await appending


async def refused(writer: LogWriter) -> None:
    with pytest.raises(Fenced):
        await writer.append("a", an_event("a", 1))


async def test_unknown_kinds_are_declined_and_counted(bus: Link) -> None:
    await bus.append(subjects.log("a"), b"\x81\xa4type\xa5Later", stream=LOG_STREAM)
    writer = await LogWriter.open(bus, LOG_STREAM)
    await writer.append("a", an_event("a", 1))
    before = log.declined[LOG_STREAM]
    async with aclosing(follow(bus, bus, "a")) as followed:
        assert await rounds(followed, 1) == [1]
    assert log.declined[LOG_STREAM] == before + 1


async def test_a_follower_sees_history_and_then_what_happens(hub: Hub, bus: Link) -> None:
    reader = await hub.connect("reader")
    public = await LogWriter.open(bus, LOG_STREAM)
    private = await LogWriter.open(bus, DETAIL_STREAM)
    for number in range(3):
        await public.append("a", an_event("a", number))
        await public.append("b", an_event("b", 100 + number))
        await private.append("a", a_report("a", number))
    async with (
        aclosing(follow(reader, reader, "a", after=1)) as one,
        aclosing(follow_all(reader, reader)) as everyone,
        aclosing(follow_detail(reader, reader)) as details,
    ):
        assert await rounds(one, 2) == [1, 2]
        assert await rounds(everyone, 6) == [0, 100, 1, 101, 2, 102]
        assert await rounds(details, 3) == [0, 1, 2]
        for number in range(3, 6):
            await public.append("b", an_event("b", 100 + number))
            await public.append("a", an_event("a", number))
            await private.append("a", a_report("a", number))
        assert await rounds(one, 3) == [3, 4, 5]
        assert await rounds(everyone, 6) == [103, 3, 104, 4, 105, 5]
        assert await rounds(details, 3) == [3, 4, 5]


async def test_a_lost_last_event_is_found_by_the_slow_check(memory_hub: MemoryHub) -> None:
    bus, reader = await memory_hub.connect("aggregator"), await memory_hub.connect("reader")
    await ensure_streams(bus)
    writer = await LogWriter.open(bus, LOG_STREAM)
    async with aclosing(follow(reader, reader, "a", check_s=0.05)) as followed:
        await writer.append("a", an_event("a", 0))
        assert await rounds(followed, 1) == [0]
        memory_hub.broker.fate = lambda _client, _delivery: ()
        await writer.append("a", an_event("a", 1))
        assert await rounds(followed, 1) == [1]


@pytest.mark.parametrize("seed", range(20))
async def test_followers_of_a_broken_link_miss_and_repeat_nothing(
    memory_hub: MemoryHub, seed: int
) -> None:
    chance = random.Random(seed)

    def fate(client: str, _delivery: Delivery) -> Sequence[float]:
        if client == "aggregator":
            return (0.0,)
        return chance.choice([(), (0.0,), (0.0, 0.0), (0.002,), (0.004, 0.0), (0.0,)])

    broker = memory_hub.broker
    bus, reader = await memory_hub.connect("aggregator"), await memory_hub.connect("reader")
    await ensure_streams(bus)
    public = await LogWriter.open(bus, LOG_STREAM)
    private = await LogWriter.open(bus, DETAIL_STREAM)
    fates: list[Literal["stored", "lost", "unanswered"]] = ["lost", "unanswered"]
    fates.extend("stored" for _ in range(38))
    broker.fate = fate
    broker.append_fate = lambda _subject, _data: chance.choice(fates)
    count = 60
    async with (
        aclosing(follow(reader, reader, "a", check_s=0.05)) as one,
        aclosing(follow_all(reader, reader, check_s=0.05)) as everyone,
        aclosing(follow_detail(reader, reader, check_s=0.05)) as details,
        asyncio.TaskGroup() as group,
    ):
        a = group.create_task(rounds(one, count))
        b = group.create_task(rounds(everyone, 2 * count))
        c = group.create_task(rounds(details, count))
        for number in range(count):
            await public.append("a", an_event("a", number))
            await public.append("b", an_event("b", number))
            await private.append("a", a_report("a", number))
            if chance.random() < 0.1:
                broker.partition("reader")
            if chance.random() < 0.3:
                broker.heal("reader")
            await asyncio.sleep(0)
        broker.heal("reader")
    assert a.result() == list(range(count))
    assert b.result() == [number for number in range(count) for _ in range(2)]
    assert c.result() == list(range(count))


async def test_neither_writer_nor_follower_minds_a_broker_killed_and_started(
    nats_hub: NatsHub,
) -> None:
    bus, reader = await nats_hub.connect("aggregator"), await nats_hub.connect("reader")
    await ensure_streams(bus)
    writer = await LogWriter.open(bus, LOG_STREAM)
    count, kills = 150, 3
    appended = 0

    async def write() -> None:
        nonlocal appended
        for number in range(count):
            await writer.append("a", an_event("a", number))
            appended += 1

    async with (
        aclosing(follow(reader, reader, "a")) as followed,
        asyncio.TaskGroup() as group,
    ):
        seen = group.create_task(rounds(followed, count))
        group.create_task(write())
        for kill in range(kills):
            at = count * (kill + 1) // (kills + 1)
            await wait_until(lambda at=at: appended >= at, timeout_s=30)
            await nats_hub.restart()
    assert seen.result() == list(range(count))
    assert writer.last == count
    stored = [sequence async for sequence, _ in log.read(bus, LOG_STREAM, subjects.log("a"))]
    assert stored == list(range(1, count + 1))


@pytest.mark.parametrize("stored", [True, False], ids=["acknowledgement lost", "never stored"])
async def test_an_append_in_flight_when_the_broker_dies_has_one_effect(
    nats_hub: NatsHub, stored: bool
) -> None:
    """Its writer cannot know which it was: the log tells it, and the next append goes on."""
    broker = nats_hub.broker
    watching = await nats_hub.connect("watching")
    async with start_proxy(broker.port) as link:
        address = f"nats://127.0.0.1:{link.port}"
        bus = await connect([address], name="aggregator", timeout_s=1.0)
        await ensure_streams(bus)
        writer = await LogWriter.open(bus, LOG_STREAM)
        await writer.append("a", an_event("a", 1))
        if stored:
            link.swallow_answers()
        else:
            os.kill(broker.process_id, signal.SIGSTOP)
        appending = asyncio.create_task(writer.append("a", an_event("a", 2)))
        if stored:
            await wait_until(lambda: is_at(watching, 2))
        else:
            await asyncio.sleep(0.2)  # until it is on its way
        assert not appending.done()
        await broker.kill()
        link.cut()
        await broker.start()
        async with asyncio.timeout(20):
            assert await appending == 2
            assert await writer.append("a", an_event("a", 3)) == 3
        async with aclosing(follow(watching, watching, "a")) as followed:
            assert await rounds(followed, 3) == [1, 2, 3]
        assert await watching.last_sequence(LOG_STREAM) == 3
        await bus.close()


async def is_at(bus: Link, sequence: int) -> bool:
    return await bus.last_sequence(LOG_STREAM) == sequence


async def test_a_process_without_the_right_to_make_streams_waits_for_them(hub: Hub) -> None:
    device, server = await hub.connect("device"), await hub.connect("aggregator")
    async with aclosing(follow(device, device, "a")) as followed, asyncio.TaskGroup() as group:
        seen = group.create_task(rounds(followed, 1))
        await asyncio.sleep(0.05)
        await ensure_streams(server)
        writer = await LogWriter.open(server, LOG_STREAM)
        await writer.append("a", an_event("a", 5))
    assert seen.result() == [5]


async def test_who_claims_a_stream_fences_off_whoever_wrote_before(hub: Hub, bus: Link) -> None:
    """And no reader of events takes a claim for one, nor for something unknown."""
    older = await LogWriter.open(bus, LOG_STREAM)
    await older.append("a", an_event("a", 1))
    declined = log.declined[LOG_STREAM]
    reader = await hub.connect("reader")
    async with aclosing(follow_all(reader, reader)) as events:
        assert await rounds(events, 1) == [1]
        newer = await LogWriter.open(bus, LOG_STREAM)
        await newer.claim()
        await newer.check()
        with pytest.raises(Fenced, match="another aggregator"):
            await older.check()
        with pytest.raises(Fenced, match="another aggregator"):
            await older.append("a", an_event("a", 2))
        await newer.append("a", an_event("a", 3))
        assert await rounds(events, 1) == [3]
    async with aclosing(follow(reader, reader, "a")) as events:
        assert await rounds(events, 2) == [1, 3]
    stored = [sequence async for sequence, _ in log.read(bus, LOG_STREAM, subjects.ALL_LOGS)]
    assert stored == [1, 3]
    assert log.declined[LOG_STREAM] == declined


async def test_a_claim_whose_answer_was_lost_is_not_doubled(memory_hub: MemoryHub) -> None:
    bus = await memory_hub.connect("aggregator")
    await ensure_streams(bus)
    fates: list[Literal["stored", "lost", "unanswered"]] = ["lost", "unanswered"]
    memory_hub.broker.append_fate = lambda _subject, _data: fates.pop(0) if fates else "stored"
    writer = await LogWriter.open(bus, LOG_STREAM)
    other = await LogWriter.open(bus, LOG_STREAM)
    await writer.claim()
    assert writer.last == 1
    await other.claim()  # it began behind, and is the newest all the same
    assert other.last == await bus.last_sequence(LOG_STREAM) == 2
