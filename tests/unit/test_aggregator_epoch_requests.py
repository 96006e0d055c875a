"""OpenEpoch over the in-memory broker: what is refused, and what a restart finds."""

import asyncio

import pytest
from msgspec.structs import replace

from services.aggregator.service import Aggregator
from shared import blobs, subjects
from shared.adapter import Adapter, next_epoch
from shared.bus import Link
from shared.codec import encode_manifest
from shared.errors import RejectError
from shared.memory_bus import MemoryBroker
from shared.messages import JobAccepted, OpenEpoch, StopJob, SubmitJob
from tests.support.aggregators import an_aggregator, open_round, stored
from tests.support.jobs import a_job, a_probe


def two_epochs() -> SubmitJob:
    submit = a_job(rounds=1)
    return replace(submit, spec=replace(submit.spec, epochs=2))


async def do_a_round(aggregator: Aggregator) -> None:
    opened = open_round(aggregator)
    for device, first in (("a", 0), ("b", 8)):
        await aggregator.fold([stored(a_probe(opened, device, first=first))])


async def a_request(link: Link, aggregator: Aggregator) -> OpenEpoch:
    before = aggregator.jobs["demo"].adapter
    manifest = encode_manifest(next_epoch(before.manifest))
    start = Adapter.placed(manifest, before.round, before.theta // 2)
    return OpenEpoch(job="demo", manifest=manifest, start=await blobs.put(link, start.to_bytes()))


async def test_a_restart_while_it_waits_and_one_after_lose_nothing() -> None:
    broker = MemoryBroker()
    link = broker.connect("aggregator")
    first = await an_aggregator(link)
    await first.answer(two_epochs())
    await do_a_round(first)
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
    for version in (request.start, *third.jobs["demo"].snapshots):  # all epochs can be replayed
        await blobs.load(link, version)


async def test_a_start_that_is_not_in_the_store_is_refused_and_the_job_waits_on() -> None:
    link = MemoryBroker().connect("aggregator")
    aggregator = await an_aggregator(link)
    await aggregator.answer(two_epochs())
    await do_a_round(aggregator)
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
    aggregator = await an_aggregator(link)
    await aggregator.answer(two_epochs())
    await do_a_round(aggregator)
    await aggregator.answer(StopJob(job="demo"))
    ended = aggregator.jobs["demo"].ended
    assert ended is not None
    assert ended.reason == "stopped"
