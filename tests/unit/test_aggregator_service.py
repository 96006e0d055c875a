"""The aggregator over the in-memory broker: what it answers, refuses, settles and survives."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Literal

import pytest
from msgspec.structs import replace

from services.aggregator.config import Settings
from services.aggregator.service import Aggregator
from shared import subjects
from shared.bus import Link
from shared.clock import SystemClock
from shared.codec import MAX_PAYLOAD_BYTES, decode, encode
from shared.errors import Fenced
from shared.log import ensure_streams
from shared.log_writer import LogWriter
from shared.memory_bus import MemoryBroker
from shared.messages import (
    JobAccepted,
    JobOpened,
    JobsListed,
    ListJobs,
    Message,
    Refused,
    RoundOpened,
    StopJob,
    SubmitUpdate,
    UpdateSettled,
)
from shared.runtime import Stop
from tests.support.aggregators import an_aggregator, open_round, stored
from tests.support.jobs import a_job, a_probe
from tests.support.waiting import wait_until


class Served:
    """A running aggregator, and a client that hears what is settled."""

    def __init__(self, aggregator: Aggregator, client: Link) -> None:
        self.aggregator = aggregator
        self.client = client
        self.settled: list[UpdateSettled] = []

    async def ask(self, message: Message) -> Message:
        subject = {"StopJob": subjects.JOB_STOP, "ListJobs": subjects.JOB_LIST}.get(
            type(message).__name__, subjects.JOB_SUBMIT
        )
        return decode(await self.client.request(subject, encode(message), timeout_s=5), Message)

    def opened(self, job: str = "demo") -> RoundOpened:
        return open_round(self.aggregator, job)

    async def send(self, update: SubmitUpdate, data: bytes | None = None) -> UpdateSettled:
        """What becomes of one update; `data` instead of its own bytes."""
        before = len(self.settled)
        await self.client.publish(
            subjects.update(update.key.job, update.key.device),
            encode(update) if data is None else data,
            {subjects.KEY_HEADER: update.key.text()},
        )
        await wait_until(lambda: len(self.settled) > before)
        return self.settled[-1]


@asynccontextmanager
async def serving(
    broker: MemoryBroker, settings: Settings | None = None
) -> AsyncGenerator[Served, None]:
    bus, client = broker.connect("aggregator"), broker.connect("client")
    served = Served(Aggregator(bus, bus, settings or Settings(), SystemClock()), client)
    stop, ready = Stop(), asyncio.Event()

    async def hear() -> None:
        async with client.subscribe(subjects.ALL_SETTLED) as deliveries:
            async for delivery in deliveries:
                served.settled.append(decode(delivery.data, UpdateSettled))

    hearing = asyncio.create_task(hear())
    task = asyncio.create_task(served.aggregator.serve(stop, ready.set))
    await ready.wait()
    await asyncio.sleep(0)
    try:
        yield served
    finally:
        stop.set()
        await task
        hearing.cancel()
        await asyncio.gather(hearing, return_exceptions=True)


async def test_jobs_are_accepted_listed_refused_and_stopped() -> None:
    async with serving(MemoryBroker()) as served:
        assert isinstance(await served.ask(a_job()), JobAccepted)
        again = await served.ask(a_job())
        assert isinstance(again, Refused)
        assert "exists already" in again.reason
        listed = await served.ask(ListJobs())
        assert isinstance(listed, JobsListed)
        assert [(job.job, job.status) for job in listed.jobs] == [("demo", "running")]
        assert isinstance(await served.ask(StopJob(job="demo")), JobAccepted)
        listed = await served.ask(ListJobs())
        assert isinstance(listed, JobsListed)
        assert [(job.status, job.reason) for job in listed.jobs] == [("ended", "stopped")]
        assert isinstance(await served.ask(StopJob(job="demo")), Refused)


async def test_every_update_is_settled_whatever_it_is() -> None:
    async with serving(MemoryBroker()) as served:
        await served.ask(a_job(enough_devices=9))
        update = a_probe(served.opened(), "a")
        assert (await served.send(update)).outcome == "folded"
        assert (await served.send(update)).outcome == "duplicate"
        torn = await served.send(a_probe(served.opened(), "b"), data=b"\xc1 not MessagePack")
        assert (torn.outcome, torn.key) == ("rejected", "demo.0.1.b.0")
        stranger = await served.send(a_probe(served.opened(), "a"), data=encode(a_job()))
        assert "a SubmitJob where it has no meaning" in stranger.reason
        forged = a_probe(served.opened(), "c")
        claimed = await served.send(a_probe(served.opened(), "d"), data=encode(forged))
        assert "was sent on" in claimed.reason
        unknown = replace(forged, key=replace(forged.key, job="nobody"))
        assert "unknown" in (await served.send(unknown)).reason
        assert served.aggregator.counters.get("messages_malformed") == 3


async def test_no_batch_becomes_an_event_that_the_broker_would_refuse() -> None:
    """A thousand rows beside the sums of the largest pool: more than 1 MB."""
    broker, directions, count = MemoryBroker(), 22_500, 1024
    link = broker.connect("first")
    first = await an_aggregator(link)
    job = a_job(directions=directions, enough_devices=count + 2)
    pacing = replace(job.spec.pacing, lateness_rounds=0)
    await first.answer(replace(job, spec=replace(job.spec, pacing=pacing)))
    opened = open_round(first)
    for number in range(count):
        name = f"{number:04}".rjust(64, "d")
        update = a_probe(
            opened, name, first=min(number * 22, directions - 22), count=22, weight=number + 1
        )
        one = stored(update)
        await link.append(one.subject, one.data, stream=subjects.UPDATES_STREAM)
    async with serving(broker, Settings(batch=count)) as served:
        await wait_until(lambda: len(served.settled) >= count, timeout_s=60)
        assert {one.outcome for one in served.settled} == {"folded"}
        assert served.aggregator.jobs["demo"].progress.probes == 22 * count
        events = [
            one.data
            for sequence in range(1, await link.last_sequence(subjects.DETAIL_STREAM) + 1)
            if (one := await link.get(subjects.DETAIL_STREAM, sequence)) is not None
        ]
    assert max(map(len, events)) < MAX_PAYLOAD_BYTES
    assert len(events) < 10


async def test_one_update_that_cannot_be_handled_holds_up_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving(MemoryBroker()) as served:
        await served.ask(a_job(enough_devices=9))
        state = served.aggregator.jobs["demo"]
        decide = state.decide_updates

        def fails_on_poison(updates: list[SubmitUpdate]) -> object:
            if any(update.key.device == "poison" for update in updates):
                raise ZeroDivisionError
            return decide(updates)

        monkeypatch.setattr(state, "decide_updates", fails_on_poison)
        opened = served.opened()
        for name in ("poison", "a", "b"):
            update = a_probe(opened, name)
            await served.client.publish(subjects.update("demo", name), encode(update))
        await wait_until(lambda: len(served.settled) >= 2)
        assert {settled.key for settled in served.settled} == {"demo.0.1.a.0", "demo.0.1.b.0"}
        assert served.aggregator.counters.get("messages_failed") >= 1


async def test_a_second_aggregator_fences_the_first_off() -> None:
    broker = MemoryBroker()
    first = await an_aggregator(broker.connect("one"))
    second = await an_aggregator(broker.connect("two"))
    assert isinstance(await second.answer(a_job("theirs")), JobAccepted)
    with pytest.raises(Fenced, match="another aggregator writes to stream LOG"):
        await first.answer(a_job("ours"))


async def test_the_newest_aggregator_has_both_streams_before_it_reads_either() -> None:
    """Else one goes on in LOG and another in DETAIL, and a close misses what was settled."""
    broker = MemoryBroker()
    first = await an_aggregator(broker.connect("one"))
    await first.answer(a_job(enough_devices=9))
    update = stored(a_probe(open_round(first), "a"))
    second = await an_aggregator(broker.connect("two"))
    with pytest.raises(Fenced, match="stream DETAIL"):
        await first.fold([update])
    with pytest.raises(Fenced, match="stream LOG"):
        await first.answer(StopJob(job="demo"))
    await second.fold([update])
    assert second.jobs["demo"].progress.updates == 1


async def test_who_is_fenced_off_has_no_last_word_on_an_update() -> None:
    """It does not know the job or the round, and an update that is rejected is gone."""
    broker = MemoryBroker()
    one = broker.connect("one")
    first = await an_aggregator(one)
    second = await an_aggregator(broker.connect("two"))
    await second.answer(a_job(enough_devices=9))
    update = stored(a_probe(open_round(second), "a"))
    async with one.subscribe(subjects.ALL_SETTLED) as words:
        with pytest.raises(Fenced):
            await first.fold([update])
        await second.fold([update])
        word = decode((await anext(words)).data, UpdateSettled)
    assert word.outcome == "folded"


async def test_a_stop_without_a_broker_is_no_failure() -> None:
    broker = MemoryBroker(timeout_s=0.01)
    async with serving(broker):
        broker.partition("aggregator")


async def test_a_kill_between_the_two_events_that_open_a_job_harms_no_restart() -> None:
    broker = MemoryBroker()
    bus = broker.connect("killed")
    await ensure_streams(bus)
    half = a_job("half")
    writer = await LogWriter.open(bus, subjects.LOG_STREAM)
    await writer.append("half", JobOpened(job="half", spec=half.spec))
    async with serving(broker) as served:
        listed = await served.ask(ListJobs())
        assert isinstance(listed, JobsListed)
        assert listed.jobs == []
        assert isinstance(await served.ask(StopJob(job="half")), Refused)
        assert isinstance(await served.ask(half), JobAccepted)
        assert served.opened("half").round == 1


async def test_a_snapshot_that_the_broker_refuses_for_now_delays_the_job_and_no_more() -> None:
    broker = MemoryBroker()
    refusals = 3

    def fails_for_blobs(subject: str, _: bytes) -> Literal["stored", "lost", "unanswered"]:
        nonlocal refusals
        if ".blob." in subject and refusals:
            refusals -= 1
            return "lost"
        return "stored"

    broker.append_fate = fails_for_blobs
    async with serving(broker) as served:
        await served.ask(a_job(rounds=2, snapshot_every=1))
        while not served.aggregator.jobs["demo"].ended:
            opened = served.aggregator.jobs["demo"].open
            if opened is not None:
                await served.send(a_probe(opened, "a"))
                await served.send(a_probe(opened, "b", first=8))
            await asyncio.sleep(0.05)
        assert refusals == 0


async def test_updates_and_stops_that_come_while_a_round_closes_find_the_next_one() -> None:
    broker = MemoryBroker()
    async with serving(broker) as served:
        await served.ask(a_job(rounds=30))
        for _ in range(12):
            opened = served.opened()
            closing = asyncio.gather(
                served.send(a_probe(opened, "a")), served.send(a_probe(opened, "b", first=8))
            )
            late = asyncio.ensure_future(served.send(a_probe(opened, "c", first=16)))
            await asyncio.gather(closing, late)
        assert {settled.outcome for settled in served.settled} <= {"folded", "late"}
        assert isinstance(await served.ask(StopJob(job="demo")), JobAccepted)
        assert served.aggregator.jobs["demo"].ended
