"""Updates folded, deduplicated and logged per second of the aggregator's CPU.

A real nats-server whose UPDATES stream is loaded beforehand with updates of 32 probes, one in
twenty of them sent twice; one synced append a batch. Baseline: the same, one update a batch.
"""

import asyncio
import tempfile
import time
from pathlib import Path

from services.aggregator.config import Settings
from services.aggregator.service import Aggregator
from shared import nats_bus, subjects
from shared.broker import start_broker
from shared.clock import SystemClock
from shared.codec import encode
from shared.runtime import Stop
from tests.bench.figure import Figure
from tests.bench.updates import DIRECTIONS, updates_of
from tests.support.jobs import a_job


async def figures() -> list[Figure]:
    batched = await _updates_per_cpu_s(updates=20_000, batch=256)
    single = await _updates_per_cpu_s(updates=2_000, batch=1)
    return [Figure("fold.updates_per_s", batched, "1/s", single, target=5000)]


async def _updates_per_cpu_s(*, updates: int, batch: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        async with start_broker(Path(folder)) as broker:
            bus = await nats_bus.connect([broker.url], name="bench")
            try:
                return await _run(bus, updates, batch)
            finally:
                await bus.close()


async def _run(bus: nats_bus.NatsBus, updates: int, batch: int) -> float:
    aggregator = Aggregator(bus, bus, Settings(batch=batch), SystemClock())
    job = a_job(
        directions=DIRECTIONS, enough_devices=updates + 1, enough_probes=2**40, rounds=1, d=1000
    )
    opening = Stop()
    async with asyncio.TaskGroup() as tasks:
        serving = tasks.create_task(aggregator.serve(opening))
        while not await _submitted(bus, encode(job)):
            await asyncio.sleep(0.05)
        opening.set()
        await serving
    await _load(bus, aggregator, updates)
    twin = Aggregator(bus, bus, Settings(batch=batch), SystemClock())
    stop = Stop()
    async with asyncio.TaskGroup() as tasks:
        began = time.process_time()
        tasks.create_task(twin.serve(stop))
        while twin.counters.get("updates_folded") < updates:
            await asyncio.sleep(0.05)
        seconds = time.process_time() - began
        stop.set()
    return updates / seconds


async def _submitted(bus: nats_bus.NatsBus, data: bytes) -> bool:
    try:
        await bus.request(subjects.JOB_SUBMIT, data, timeout_s=5)
    except Exception:  # noqa: BLE001 - the aggregator is not listening yet
        return False
    return True


async def _load(bus: nats_bus.NatsBus, aggregator: Aggregator, updates: int) -> None:
    opened = aggregator.jobs["demo"].open
    assert opened is not None
    for number, (subject, data) in enumerate(updates_of(opened, range(updates))):
        for _ in range(2 if number % 20 == 0 else 1):
            await bus.publish(subject, data)
        if number % 500 == 0:
            await bus.flush()
    await bus.flush()
