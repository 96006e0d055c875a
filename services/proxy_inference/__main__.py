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
from services.proxy_inference.remote.host import RemoteHost, hosted
from services.proxy_inference.service import Proxy
from services.proxy_inference.shelf import ModelFile, Shelf
from services.proxy_inference.speaking import Room
from services.proxy_inference.swapping import Swapper
from services.proxy_inference.validating import Validator, check_readable
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
    await asyncio.to_thread(check_readable, settings.validation)
    async with _large(settings, shelf, models) as large:
        await _serve(settings, stop, shelf, models, large)


async def _serve(
    settings: Settings,
    stop: Stop,
    shelf: Shelf,
    models: Models,
    large: Large | RemoteHost | None,
) -> None:
    served = shelf.served()
    versions = Versions(settings.job, pin=shelf.pin(), prefer=settings.prefer, served=served)
    worker = Worker()
    waiter = Worker() if isinstance(large, RemoteHost) else worker
    pool = Pool(worker, _room(settings), large, waiter)
    swapper = Swapper(versions, shelf, models, pool, settings.keep_versions)
    await swapper.restore()
    proxy = Proxy(settings, worker, pool, versions, swapper, shelf)
    async with asyncio.TaskGroup() as tasks:
        working = [tasks.create_task(_alive(one)) for one in {worker, waiter}]
        attendants = [
            tasks.create_task(pool.run()),
            tasks.create_task(swapper.run()),
            tasks.create_task(
                follow(list(settings.servers), settings.credentials, versions, swapper)
            ),
        ]
        if settings.validation:
            attendants.append(tasks.create_task(Validator(proxy, settings.validation).run()))
        async with serving(proxy):
            await stop.wait()
            await proxy.drained(settings.drain_s)
        for attendant in attendants:
            attendant.cancel()
        if isinstance(large, RemoteHost):
            large.stop()
        for one in (worker, waiter):
            one.stop()
        await asyncio.wait(working)
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


@asynccontextmanager
async def _large(
    settings: Settings, shelf: Shelf, models: Models
) -> AsyncGenerator[Large | RemoteHost | None]:
    """Raises ConfigError where the large model cannot be had, or not go with --model."""
    if settings.large.startswith(("http://", "https://")):
        at_once = max(settings.sequences, 16)
        name, key = settings.large_name, settings.large_key
        async with hosted(settings.large, name=name, key=key, at_once=at_once) as host:
            if models.own is not None:
                await asyncio.to_thread(_compared, host, models.own)
            yield host
        return
    yield await _loaded(settings, shelf, models) if settings.large else None


async def _loaded(settings: Settings, shelf: Shelf, models: Models) -> Large:
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


def _compared(host: RemoteHost, file: ModelFile) -> None:
    """Raises ConfigError where the server's model cannot be steered by the small one."""
    weights = Weights(file)
    try:
        host.check(weights)
    except EngineError as error:
        raise ConfigError(str(error)) from error
    finally:
        weights.close()


async def _alive(worker: Worker) -> None:
    """Return when the worker was stopped; fails if it ended by a bug, and the process with it."""
    await worker.ended


def _room(settings: Settings) -> Room:
    threads = settings.threads or os.cpu_count() or 1
    return Room(settings.context_tokens, settings.sequences, threads)


if __name__ == "__main__":
    sys.exit(main(Settings, NAME, serve))
