"""`python -m services.telemetry`: load the settings, open the port, observe."""

import asyncio
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from aiohttp import web

from services.telemetry.config import Settings
from services.telemetry.http import Pages
from services.telemetry.service import Observer
from shared.http import listening
from shared.runtime import Stop
from shared.service import main

SHUTDOWN_S = 2.0
"""How long an open page may take to end."""


async def serve(settings: Settings, stop: Stop) -> None:
    observer = Observer()
    async with serving(observer, settings.host, settings.port), asyncio.TaskGroup() as tasks:
        observing = tasks.create_task(observer.run(list(settings.servers), settings.credentials))
        await stop.wait()
        observing.cancel()


@asynccontextmanager
async def serving(observer: Observer, host: str, port: int) -> AsyncGenerator[int]:
    """The pages are served while this is open; yields the port.

    Raises:
        ConfigError: the address cannot be had.
    """
    application = Pages(observer).application()
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=SHUTDOWN_S)
    async with listening(runner, "telemetry", host, port) as taken:
        yield taken


if __name__ == "__main__":
    sys.exit(main(Settings, "telemetry", serve))
