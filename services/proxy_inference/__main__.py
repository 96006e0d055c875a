"""`python -m services.proxy_inference`: load the settings, open the port, follow the fleet."""

import asyncio
import os
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from aiohttp import web

from services.proxy_inference.config import Settings
from services.proxy_inference.ensemble.counts import Counts
from services.proxy_inference.ensemble.large import Large
from services.proxy_inference.fleet import NAME, follow
from services.proxy_inference.generation import Weights
from services.proxy_inference.http import Server
from services.proxy_inference.models import Models
from services.proxy_inference.pool import Pool
from services.proxy_inference.service import Proxy
from services.proxy_inference.shelf import ModelFile, Shelf
from services.proxy_inference.speaking import Room
from services.proxy_inference.swapping import Swapper
from services.proxy_inference.versions import Versions
from services.proxy_inference.worker import Worker
from shared.errors import ConfigError, EngineError
from shared.http import listening
from shared.runtime import Stop
from shared.service import main

SHUTDOWN_S = 1.0
"""After the drain: how long what is left may take to be cancelled."""

CLOSING_S = 4.0
"""Beyond this the port is left to the end of the process."""


async def serve(settings: Settings, stop: Stop) -> None:
    shelf = Shelf(settings.state_dir)
    models = await Models.at(shelf, settings.model)
    versions = Versions(settings.job, pin=shelf.pin())
    large = await _large(settings, shelf, models)
    worker = Worker()
    pool = Pool(worker, _room(settings), large)
    swapper = Swapper(versions, shelf, models, pool, settings.keep_versions)
    await swapper.restore()
    proxy = Proxy(settings, worker, pool, versions, swapper, shelf)
    async with asyncio.TaskGroup() as tasks:
        working = tasks.create_task(_alive(worker))
        attendants = [
            tasks.create_task(pool.run()),
            tasks.create_task(swapper.run()),
            tasks.create_task(
                follow(list(settings.servers), settings.credentials, versions, swapper)
            ),
        ]
        async with serving(proxy):
            await stop.wait()
            await proxy.drained(settings.drain_s)
        for attendant in attendants:
            attendant.cancel()
        worker.stop()
        await working
    await pool.close()


@asynccontextmanager
async def serving(proxy: Proxy) -> AsyncGenerator[int]:
    """The port answers while this is open; yields its number.

    Raises:
        ConfigError: the address cannot be had.
    """
    settings = proxy.settings
    runner = web.AppRunner(
        Server(proxy).application(),
        access_log=None,
        handler_cancellation=True,
        shutdown_timeout=SHUTDOWN_S,
    )
    address = settings.host, settings.port
    async with listening(runner, NAME, *address, closing_s=CLOSING_S) as taken:
        yield taken


async def _large(settings: Settings, shelf: Shelf, models: Models) -> Large | None:
    """Raises ConfigError where the large model cannot be had, or not go with --model."""
    if not settings.large:
        return None
    try:
        file = await asyncio.to_thread(shelf.file, settings.large)
    except OSError as error:
        raise ConfigError(
            f"--large {settings.large}: cannot be read: {error.strerror}; name a GGUF file"
        ) from error
    try:
        return await asyncio.to_thread(_opened, file, models.own, settings.speculate)
    except EngineError as error:
        raise ConfigError(f"--large: {error}") from error


def _opened(file: ModelFile, small: ModelFile | None, speculates: bool) -> Large:
    large = Large(file, Counts(), speculates=speculates)
    if small is not None:
        weights = Weights(small)
        try:
            large.check(weights)
        finally:
            weights.close()
    return large


async def _alive(worker: Worker) -> None:
    """Return when the worker was stopped; fails if it ended by a bug, and the process with it."""
    await worker.ended


def _room(settings: Settings) -> Room:
    threads = settings.threads or os.cpu_count() or 1
    return Room(settings.context_tokens, settings.sequences, threads)


if __name__ == "__main__":
    sys.exit(main(Settings, NAME, serve))
