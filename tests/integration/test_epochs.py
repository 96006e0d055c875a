"""A job of two epochs on a real fleet: kills between them, and devices that come to the second."""

import asyncio
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from services.distiller.waiting import open_epoch, waiting
from shared import subjects
from shared.adapter import Adapter
from shared.codec import decode_answer, decode_manifest, encode
from shared.errors import TransientError
from shared.messages import (
    Block,
    Distilled,
    EpochOpened,
    JobEnded,
    JobsListed,
    JobSummary,
    ListJobs,
    ModelPublished,
    RoundClosed,
)
from tests.support.fleet import Fleet, a_fleet, a_spec
from tests.support.waiting import wait_until

ROUNDS, VERSION_EVERY = 30, 10
BLOCKS = [
    Block("lora_b", "blk.0.mix.weight", [32], d_in=32),
    Block("control", "", [32], layer=1),
]
FIGURES = Distilled(1.0, 10, 5, 100, 3, 0.5, 0.4, 0.3, 0.2)


async def listed(fleet: Fleet) -> JobSummary | None:
    """The one job, as the aggregator knows it."""
    request = ListJobs()
    try:
        answer = await fleet.bus.request(subjects.JOB_LIST, encode(request), timeout_s=2)
    except TransientError:
        return None
    jobs = decode_answer(answer, request, JobsListed).jobs
    return jobs[0] if jobs else None


async def waits(fleet: Fleet) -> bool:
    summary = await listed(fleet)
    return summary is not None and summary.status == "waiting"


async def test_a_fleet_goes_on_from_where_the_next_epoch_starts(tmp_path: Path) -> None:
    spec = replace(a_spec(ROUNDS, how="probe", deadline_s=20.0), epochs=2)
    spec = replace(spec, snapshot_every=VERSION_EVERY)
    async with a_fleet(tmp_path, devices=2) as fleet:
        await fleet.submit(fleet.job("two", spec, BLOCKS))
        await wait_until(lambda: waits(fleet), timeout_s=30, what="waits")
        await fleet.services["aggregator"].kill()
        await fleet.services["aggregator"].start()
        await wait_until(lambda: waits(fleet), timeout_s=10, what="waits after a kill")
        await fleet.devices["d1"].kill()

        job = await waiting(fleet.bus, "two")
        theta = job.adapter.theta // 2
        assert theta.any()
        assert await open_epoch(fleet.bus, job, theta, theta // 3, FIGURES) == 1
        await fleet.services["aggregator"].kill()
        await fleet.services["aggregator"].start()
        await fleet.start_device("late")  # d0 goes on by itself, this one joins in the second
        async with asyncio.timeout(60):
            before = await fleet.events_until(
                "two", lambda event: isinstance(event, ModelPublished) and event.epoch == 1
            )
            await fleet.devices["late"].kill()  # every round wants two
            await fleet.devices["d1"].start()  # its snapshot is of the second epoch
            events = await fleet.events_until("two")
        assert len(before) < len(events)
        ended = events[-1]
        assert isinstance(ended, JobEnded), fleet.logs()

        first, second = (event for event in events if isinstance(event, EpochOpened))
        manifest = decode_manifest(second.manifest)
        assert (manifest.epoch, manifest.epoch_of_a) == (1, 0)
        assert manifest.blocks == decode_manifest(first.manifest).blocks
        assert second.distilled == FIGURES
        adapter = Adapter.placed(second.manifest, job.round, theta)
        assert adapter.digest() == second.digest
        closes = [event for event in events if isinstance(event, RoundClosed)]
        assert sum(close.commit is not None for close in closes) == 2 * ROUNDS
        for close in closes:
            if close.epoch == 1:
                adapter.apply(close.round, close.commit)
        assert adapter.digest() == ended.digest
        assert not np.array_equal(adapter.theta, theta)
        at_the_end = f"{ended.round}:{ended.digest}"
        await wait_until(
            lambda: {fleet.positions.get(f"two/{name}") for name in ("d0", "d1")} == {at_the_end},
            timeout_s=20,
            what="every device stands at the end",
        )
