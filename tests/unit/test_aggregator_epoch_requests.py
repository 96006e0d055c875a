"""OpenEpoch over the in-memory broker: what is refused, and what a restart finds."""

import asyncio

import pytest
from msgspec.structs import replace

from services.aggregator.service import Aggregator
from shared import blobs, subjects
from shared.adapter import Adapter, next_epoch
from shared.bus import Link
from shared.codec import encode_manifest
from shared.errors import RejectError, TransientError
from shared.log import read
from shared.memory_bus import MemoryBroker
from shared.messages import (
    JobAccepted,
    JobsListed,
    ListJobs,
    OpenEpoch,
    RoundClosed,
    StopJob,
    SubmitJob,
)
from tests.support.aggregators import an_aggregator, open_round, stored
from tests.support.jobs import a_job, a_probe


def two_epochs() -> SubmitJob:
    submit = a_job(rounds=1)
    return replace(submit, spec=replace(submit.spec, epochs=2))


class HandMoved:
    """A clock that stands still unless it is moved."""

    time = 0.0

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.time += seconds


async def do_a_round(aggregator: Aggregator, job: str = "demo") -> None:
    opened = open_round(aggregator, job)
    for device, first in (("a", 0), ("b", 8)):
        await aggregator.fold([stored(a_probe(opened, device, first=first))])


async def one_that_waits(link: Link) -> Aggregator:
    """An aggregator whose job `demo` has done its first epoch."""
    aggregator = await an_aggregator(link)
    await aggregator.answer(two_epochs())
    await do_a_round(aggregator)
    return aggregator


async def a_request(link: Link, aggregator: Aggregator) -> OpenEpoch:
    before = aggregator.jobs["demo"].adapter
    manifest = encode_manifest(next_epoch(before.manifest))
    start = Adapter.placed(manifest, before.round, before.theta // 2)
    return OpenEpoch(job="demo", manifest=manifest, start=await blobs.put(link, start.to_bytes()))


async def test_a_restart_while_it_waits_and_one_after_lose_nothing() -> None:
    broker = MemoryBroker()
    link = broker.connect("aggregator")
    first = await one_that_waits(link)
    assert first.jobs["demo"].summary().status == "waiting"

    second = await an_aggregator(link)
    assert second.jobs["demo"].summary() == first.jobs["demo"].summary()
    request = await a_request(link, second)
    assert isinstance(await second.answer(request), JobAccepted)

    third = await an_aggregator(link)
    assert open_round(third) == open_round(second)
    assert third.jobs["demo"].adapter.digest() == open_round(second).digest
    late = a_probe(open_round(third), "late", first=16)
    await do_a_round(third)
    assert third.jobs["demo"].ended
    fourth = await an_aggregator(link)  # which has no use for an ended job's start
    await fourth.fold([stored(late)])
    assert fourth.counters.snapshot()["updates_too_late"] == 1
    listed = third.jobs["demo"].snapshots.listed
    for version in (request.start, *listed):  # all epochs can be replayed
        await blobs.load(link, version)


async def test_a_start_that_is_not_in_the_store_is_refused_and_the_job_waits_on() -> None:
    link = MemoryBroker().connect("aggregator")
    aggregator = await one_that_waits(link)
    request = await a_request(link, aggregator)
    missing = replace(request.start, digest="f" * 64)
    with pytest.raises(RejectError, match=r"start: chunk 0 .* is not in the store"):
        await aggregator.answer(replace(request, start=missing))
    with pytest.raises(RejectError, match=r"anchor: chunk 0 .* is not in the store"):
        await aggregator.answer(replace(request, anchor=missing))
    assert aggregator.jobs["demo"].waiting
    first, *others = await asyncio.gather(
        *(aggregator.answer(request) for _ in range(3)), return_exceptions=True
    )
    assert isinstance(first, JobAccepted)
    assert [type(other) for other in others] == [RejectError, RejectError]
    log = await link.last_sequence(subjects.LOG_STREAM)
    assert isinstance(await aggregator.answer(StopJob(job="demo")), JobAccepted)
    assert await link.last_sequence(subjects.LOG_STREAM) > log


async def test_a_job_that_waits_ends_when_it_is_stopped() -> None:
    link = MemoryBroker().connect("aggregator")
    aggregator = await one_that_waits(link)
    await aggregator.answer(StopJob(job="demo"))
    ended = aggregator.jobs["demo"].ended
    assert ended is not None
    assert ended.reason == "stopped"


async def test_a_job_whose_start_is_lost_for_good_can_be_stopped() -> None:
    link = MemoryBroker().connect("aggregator")
    first = await one_that_waits(link)
    request = await a_request(link, first)
    await first.answer(request)
    opened = open_round(first)
    await blobs.delete(link, request.start)

    second = await an_aggregator(link)
    assert isinstance(await second.answer(StopJob(job="demo")), JobAccepted)
    ended = second.jobs["demo"].ended
    assert ended is not None
    assert (ended.reason, ended.round, ended.digest) == ("stopped", opened.round - 1, opened.digest)
    await second.fold([stored(a_probe(opened, "late"))])
    assert second.jobs["demo"].summary().status == "ended"
    third = await an_aggregator(link)
    assert third.jobs["demo"].summary() == second.jobs["demo"].summary()


async def test_a_start_that_is_lost_holds_up_its_own_job_and_no_other() -> None:
    link = MemoryBroker().connect("aggregator")
    first = await one_that_waits(link)
    request = await a_request(link, first)
    await first.answer(request)
    await first.answer(a_job("other", rounds=1))
    start = await blobs.load(link, request.start)
    await blobs.delete(link, request.start)

    clock = HandMoved()
    second = await an_aggregator(link, clock)
    listed = await second.answer(ListJobs())
    assert isinstance(listed, JobsListed)
    assert listed.jobs[0] == first.jobs["demo"].summary()
    await do_a_round(second, "other")
    assert second.jobs["other"].ended
    opened = open_round(second)
    await do_a_round(second)  # its updates are counted; it cannot close without its adapter
    assert open_round(second) is opened

    await blobs.put(link, start)
    clock.time += 20.0
    await second.fold([stored(a_probe(opened, "a"))])
    ended = second.jobs["demo"].ended
    assert ended is not None
    closed = [fact async for _, fact in read(link, subjects.LOG_STREAM, subjects.log("demo"))]
    adapter = Adapter.from_bytes(request.manifest, start)
    for close in closed:
        if isinstance(close, RoundClosed) and close.epoch == 1:
            assert close.devices == 2
            adapter.apply(close.round, close.commit)
    assert adapter.digest() == ended.digest


async def test_what_an_epoch_begins_with_outlives_the_job_that_published_it() -> None:
    link = MemoryBroker().connect("aggregator")
    aggregator = await an_aggregator(link)
    for name, rounds, epochs in (("demo", 1, 6), ("other", 2, 2)):
        submit = a_job(name, rounds=rounds)
        await aggregator.answer(replace(submit, spec=replace(submit.spec, epochs=epochs)))
    for _ in range(2):
        await do_a_round(aggregator, "other")
    await do_a_round(aggregator)
    await aggregator.answer(await a_request(link, aggregator))
    await do_a_round(aggregator)
    taken = aggregator.jobs["demo"]
    assert taken.adapter.round == aggregator.jobs["other"].adapter.round
    manifest, start = encode_manifest(taken.adapter.manifest), taken.snapshots.listed[-1]
    await aggregator.answer(OpenEpoch(job="other", manifest=manifest, start=start))
    for _ in range(3):
        await aggregator.answer(await a_request(link, aggregator))
        await do_a_round(aggregator)
    assert len(taken.snapshots.listed) == 4
    assert start not in taken.snapshots.listed[-2:]
    await blobs.load(link, start)
    with pytest.raises(TransientError):  # nobody needs the one after it
        await blobs.load(link, taken.snapshots.listed[-3])


async def test_a_start_of_an_absurd_size_is_refused_before_it_is_asked_for() -> None:
    link = MemoryBroker().connect("aggregator")
    aggregator = await one_that_waits(link)
    request = await a_request(link, aggregator)
    absurd = replace(request.start, size_bytes=2**53)
    async with asyncio.timeout(5):
        for wrong in (replace(request, start=absurd), replace(request, anchor=absurd)):
            with pytest.raises(RejectError, match=r"has 9007199254740992 bytes"):
                await aggregator.answer(wrong)
        with pytest.raises(RejectError, match="not a manifest"):
            await aggregator.answer(replace(request, manifest=b"\x80"))
    assert aggregator.jobs["demo"].waiting
