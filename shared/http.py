"""A service's HTTP port: opened, closed, and answering in JSON; for services that have one."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import msgspec
from aiohttp import web

from shared.errors import ConfigError
from shared.logs import get


def json_response(value: object, *, status: int = 200) -> web.Response:
    body = msgspec.json.encode(value)
    return web.Response(body=body, status=status, content_type="application/json")


@asynccontextmanager
async def listening(
    runner: web.AppRunner, name: str, host: str, port: int, *, closing_s: float | None = None
) -> AsyncGenerator[int]:
    """`runner` serves at the address while this is open; yields the port, also one that was 0.

    Past `closing_s`, where given, the port is left to the end of the process; `name` says whose log
    tells of it.

    Raises:
        ConfigError: the address cannot be had.
    """
    log = get(name)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another --port"
            ) from error
        taken: int = runner.addresses[0][1]
        log.info("listening", host=host, port=taken)
        yield taken
    finally:
        try:
            async with asyncio.timeout(closing_s):
                await runner.cleanup()
        except TimeoutError:
            log.error("port_not_closed_in_time", seconds=closing_s)
