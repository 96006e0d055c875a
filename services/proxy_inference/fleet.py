"""The fleet's log, read and followed: what it says of versions goes to `versions`."""

import asyncio
from contextlib import aclosing

from services.proxy_inference.swapping import Swapper
from services.proxy_inference.versions import Versions
from shared import log as job_log
from shared import nats_bus, subjects
from shared.bus import Link
from shared.clock import SystemClock
from shared.credentials import Credentials
from shared.logs import get
from shared.messages import AdapterEvaluated, LogEvent, ModelPublished
from shared.metrics import Counters
from shared.service import report_counters

NAME = "proxy_inference"
REPORT_S = 5.0

log = get("fleet")


async def follow(
    servers: list[str], credentials: Credentials, versions: Versions, swapper: Swapper
) -> None:
    """Take in history and then what happens, waiting for the broker if need be, until cancelled."""
    bus = await nats_bus.connect(servers, name=NAME, credentials=credentials)
    try:
        swapper.streams = bus
        async with asyncio.TaskGroup() as tasks:
            reporting = report_counters(bus, NAME, Counters(), SystemClock(), REPORT_S)
            tasks.create_task(reporting)
            tasks.create_task(_follow(bus, versions, swapper))
    finally:
        swapper.streams = None
        await bus.close()


async def _follow(bus: Link, versions: Versions, swapper: Swapper) -> None:
    """History is read whole before anything is fetched: most of its versions are overtaken."""
    after = 0
    history = job_log.read_patiently(bus, subjects.LOG_STREAM, subjects.ALL_LOGS)
    async with aclosing(history) as events:
        async for after, event in events:
            if isinstance(event, LogEvent):
                versions.see(after, event)
    versions.history_read()
    log.info("history_read", sequence=after)
    swapper.wake()
    async with aclosing(job_log.follow_all(bus, bus, after)) as events:
        async for sequence, event in events:
            versions.see(sequence, event)
            if isinstance(event, ModelPublished | AdapterEvaluated):
                swapper.wake()
