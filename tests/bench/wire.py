"""What a fleet puts on its links, counted by a proxy before each device, and a round's overhead.

Real processes and a real broker; the fake engine, since only bytes and waiting are measured. A
device and round: everything a device sends or gets from one close to the next, with 32 probes of
a pool of 512 over 1e5 parameters, snapshots announced every 50 rounds. Baseline: the same adapter
as float32, sent whole once each way, as federated averaging does. Overhead: a round's duration
less the longest time any one device computed in it.
"""

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from deploy.demo.link import CLEAR, Link
from shared.codec import encode
from shared.engine.fake import MIXER, OUTPUT
from shared.log import follow_detail
from shared.messages import (
    Block,
    DeviceReport,
    Evaluation,
    JobSpec,
    Pacing,
    RoundClosed,
    RoundReport,
    Tuning,
)
from shared.messages.jobs import How
from tests.bench.figure import Figure
from tests.support.fleet import Fleet, a_fleet, a_task

DIRECTIONS, PROBES, WIDTH = 512, 32, 1024
WARM_UP, ROUNDS = 10, 60
IDLE_S = 150.0
REPORTS_A_MINUTE = 1 / 15
SETTLE_S = 20.0


async def figures() -> list[Figure]:
    up, down, dense = await _bytes(devices=DIRECTIONS // PROBES)
    idle = await _idle_bytes_a_minute(devices=4)
    overhead = await _overhead_ms(devices=8)
    return [
        Figure("wire.up_bytes", up, "B", dense, target=1000),
        Figure("wire.down_bytes", down, "B", dense, target=4000),
        Figure("wire.idle_bytes_per_minute", idle, "B/min", target=50_000 / 1440),
        Figure("wire.round_overhead_ms", overhead, "ms", target=100),
    ]


def _spec(devices: int, how: How, rounds: int) -> JobSpec:
    probes = DIRECTIONS if how == "probe" else DIRECTIONS * devices
    return JobSpec(
        task=a_task(),
        tuning=Tuning(
            how=how, rounds=rounds, directions=DIRECTIONS, batch_rows=2, step=1e-3, eps=1e-2
        ),
        pacing=Pacing(
            enough_devices=devices, enough_probes=probes, deadline_s=30.0, over_selection=1.0
        ),
        evaluation=Evaluation(every_rounds=0),
        snapshot_every=50,
    )


def _deep_blocks() -> list[Block]:
    """98 rank slots of a LoRA on a square matrix: d = 100,352."""
    slots = range(98)
    return [Block("lora_b", MIXER, [WIDTH], slot=slot, d_in=WIDTH) for slot in slots]


async def _bytes(devices: int) -> tuple[float, float, float]:
    """Bytes up and down a device and round, and of the adapter as float32."""
    with tempfile.TemporaryDirectory() as folder:
        async with _linked_fleet(Path(folder), devices) as (fleet, links):
            blocks = _deep_blocks()
            await fleet.submit(fleet.job("wire", _spec(devices, "probe", ROUNDS), blocks))
            before = (0, 0)
            closes = 0
            last = None
            async for event in fleet.facts("wire"):
                last = event
                if isinstance(event, RoundClosed) and event.commit:
                    closes += 1
                    if closes == WARM_UP:
                        before = _counted(links)
                    if closes == ROUNDS:
                        break
            assert last is not None
            up, down = _counted(links)
    rounds = (ROUNDS - WARM_UP) * devices
    return (up - before[0]) / rounds, (down - before[1]) / rounds, 4.0 * WIDTH * len(blocks)


async def _idle_bytes_a_minute(devices: int) -> float:
    """What pings cost, measured, plus a fifteenth of a report."""
    with tempfile.TemporaryDirectory() as folder:
        async with _linked_fleet(Path(folder), devices) as (_, links):
            await asyncio.sleep(SETTLE_S)
            before = sum(_counted(links))
            began = time.monotonic()
            await asyncio.sleep(IDLE_S)
            minutes = (time.monotonic() - began) / 60
            pings = (sum(_counted(links)) - before) / minutes / devices
    report = DeviceReport(
        device="device-123",
        version="0.1.0",
        cores=4,
        memory_mb=4096,
        rows=1000,
        heldout_rows=0,
        trusted=False,
        models=["a" * 64],
        counters={"updates_folded": 1000, "tokens_forward": 10**9, "reconnects": 10},
    )
    return pings + REPORTS_A_MINUTE * (
        len(encode(report)) + len("PUB seedwire.v1.report. 0000\r\n")
    )


async def _overhead_ms(devices: int) -> float:
    """Median over rounds of duration less the longest computing, with an adapter of 1e5 numbers."""
    rounds = 40
    with tempfile.TemporaryDirectory() as folder:
        async with a_fleet(Path(folder), devices=devices, model={"n_embd": WIDTH}) as fleet:
            rows = list(range(2, 100))
            block = Block("output_rows", OUTPUT, [len(rows), WIDTH], rows=rows)
            spec = _spec(devices, "exact", rounds)
            ends: dict[int, float] = {}
            await fleet.submit(fleet.job("quick", spec, [block]))
            async for event in fleet.facts("quick"):
                if isinstance(event, RoundClosed):
                    ends[event.round] = time.monotonic()
                    if event.round == rounds:
                        break
            computed: dict[int, float] = {}
            async for _, detail in follow_detail(fleet.bus, fleet.bus, check_s=0.5):
                if isinstance(detail, RoundReport):
                    works = [one.work_s for one in detail.contributions]
                    computed[detail.round] = max(works, default=0.0)
                    if detail.round >= rounds - 1:
                        break
    overheads = [
        ends[number] - ends[number - 1] - computed[number]
        for number in range(WARM_UP, rounds)
        if number in computed
    ]
    return 1000 * statistics.median(overheads)


def _counted(links: list[Link]) -> tuple[int, int]:
    return sum(link.bytes_up for link in links), sum(link.bytes_down for link in links)


@asynccontextmanager
async def _linked_fleet(
    folder: Path, devices: int
) -> AsyncGenerator[tuple[Fleet, list[Link]], None]:
    """A fleet each of whose devices has a counting link of its own."""
    links: list[Link] = []
    async with a_fleet(folder, devices=0, model={"n_embd": WIDTH}) as fleet:
        for number in range(devices):
            link = Link(fleet.broker.port, CLEAR, random.Random(number))
            await link.start()
            links.append(link)
            await fleet.start_device(f"d{number}", url=f"nats://127.0.0.1:{link.port}")
        yield fleet, links
    for link in links:
        await link.stop()
