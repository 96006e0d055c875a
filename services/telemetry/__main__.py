"""`python -m services.telemetry`: load the settings, open the port, observe."""

import asyncio
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from aiohttp import web

from services.telemetry.config import Settings
from services.telemetry.http import Pages
from services.telemetry.service import Observer
from shared import config, logs
from shared.errors import ConfigError
from shared.runtime import EXIT_CONFIG, Stop, run


def main() -> int:
    """Run until told to stop; the exit code."""
    try:
        settings = config.load(
            Settings,
            program="seedwire-telemetry",
            prefix="SEEDWIRE_TELEMETRY",
            argv=sys.argv[1:],
        )
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - the log is not configured yet
        return EXIT_CONFIG
    logs.configure("telemetry", level=settings.log_level)
    logs.get("telemetry").info("settings", **config.shown(settings))

    async def serve(stop: Stop) -> None:
        observer = Observer()
        async with serving(observer, settings.host, settings.port), asyncio.TaskGroup() as tasks:
            observing = tasks.create_task(observer.run(list(settings.servers)))
            await stop.wait()
            observing.cancel()

    return run(serve)


@asynccontextmanager
async def serving(observer: Observer, host: str, port: int) -> AsyncGenerator[int]:
    """The pages are served while this is open; yields the port.

    Raises:
        ConfigError: the address cannot be had.
    """
    runner = web.AppRunner(Pages(observer).application(), access_log=None)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another --port"
            ) from error
        listening: int = runner.addresses[0][1]
        logs.get("telemetry").info("listening", host=host, port=listening)
        yield listening
    finally:
        await runner.cleanup()


if __name__ == "__main__":
    sys.exit(main())
