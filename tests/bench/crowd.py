"""100,000 virtual devices' updates through one aggregator process and a real broker.

Each device sends one update of 32 probes; the rate is from the first publish to the last word that
a device is told, two in a hundred of the updates sent twice. Memory is what the aggregator's
process holds at several sizes of the crowd, all of it in one open round; a line is fitted.
"""

import asyncio
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from deploy.demo.processes import Child
from shared import nats_bus, subjects
from shared.broker import BrokerProcess, start_broker
from shared.codec import decode, encode
from shared.errors import TransientError
from shared.messages import Message, RoundOpened, SubmitJob
from tests.bench.figure import Figure
from tests.bench.updates import DIRECTIONS, updates_of
from tests.support.jobs import a_job
from tests.support.light_nats import LightClient
from tests.support.waiting import wait_until

DEVICES = 100_000
SIZES = (10_000, 20_000, 40_000, 60_000, 80_000, 100_000)
TWICE_EVERY = 50
WAITING = 20_000
"""So many updates are under way at most."""
CHUNK = 250
PATIENCE_S = 300.0


@dataclass
class Words:
    """How many updates were sent, and how many words devices were told."""

    sent: int = 0
    told: int = 0

    def heard(self, subject: str, reply: str, data: bytes) -> None:
        self.told += 1

    async def until_waiting(self, most: int) -> None:
        """Return when at most so many updates wait for their word."""
        await wait_until(
            lambda: self.sent - self.told <= most,
            timeout_s=PATIENCE_S,
            what=f"{self.sent} words of the aggregator",
        )


async def figures() -> list[Figure]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        async with start_broker(folder / "nats") as broker:
            child = Child(
                "aggregator",
                "services.aggregator",
                ["--servers", broker.url, "--log-level", "warning"],
                folder / "aggregator.log",
            )
            await child.start()
            try:
                opened = await _opened(broker)
                rate, sizes, held = await _crowd(broker, child, opened)
            finally:
                await child.stop()
    slope, base = np.polyfit(sizes, held, 1)
    return [
        Figure("crowd.updates_per_s", rate, "1/s", target=1000),
        Figure("crowd.rss_slope_bytes_per_device", float(slope), "B/device", target=256),
        Figure("crowd.devices", sizes[-1], "devices"),
        Figure("crowd.rss_mb", held[-1] / 2**20, "MB"),
        Figure("crowd.rss_base_mb", float(base) / 2**20, "MB"),
    ]


async def _opened(broker: BrokerProcess) -> RoundOpened:
    """The open round of a job that waits for one device more than there are."""
    job = a_job("crowd", directions=DIRECTIONS, rounds=1, d=1000)
    pacing = replace(
        job.spec.pacing, enough_devices=DEVICES + 1, enough_probes=2**40, deadline_s=3600.0
    )
    bus = await nats_bus.connect([broker.url], name="bench")
    try:
        await submitted(bus, replace(job, spec=replace(job.spec, pacing=pacing)))
        stored = await bus.get_last(subjects.LOG_STREAM, subjects.log("crowd"))
    finally:
        await bus.close()
    assert stored is not None
    opened = decode(stored.data, Message)
    assert isinstance(opened, RoundOpened)
    return opened


async def submitted(bus: nats_bus.NatsBus, job: SubmitJob) -> None:
    """The aggregator has taken the job; waits while it starts."""
    while True:
        try:
            await bus.request(subjects.JOB_SUBMIT, encode(job), timeout_s=5)
        except TransientError:
            await asyncio.sleep(0.05)
        else:
            return


async def _crowd(
    broker: BrokerProcess, child: Child, opened: RoundOpened
) -> tuple[float, list[int], list[int]]:
    """Updates a second over all, the sizes measured at, and the bytes held at each."""
    words = Words()
    client = await LightClient.connect(broker.host, broker.port, words.heard)
    client.subscribe(subjects.ALL_SETTLED)
    held: list[int] = []
    seconds, first = 0.0, 0
    for size in SIZES:
        updates = list(updates_of(opened, range(first, size)))
        began = time.perf_counter()
        for number, (subject, data) in enumerate(updates):
            for _ in range(2 if number % TWICE_EVERY == 0 else 1):
                client.publish(subject, data)
                words.sent += 1
            if number % CHUNK == 0:
                await client.drain()
                await words.until_waiting(WAITING)
        await words.until_waiting(0)
        seconds += time.perf_counter() - began
        first = size
        assert child.process is not None
        held.append(resident_bytes(child.process.pid))
    client.abort()
    return words.sent / seconds, list(SIZES), held


def resident_bytes(pid: int) -> int:
    """What the process holds in memory now (Linux)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096
