"""What a shell may complete: names that only the services know.

It must never be in the way: a broker that does not answer at once completes nothing, and nothing
is said. Commands give it to typer: `typer.Argument(autocompletion=completion.job_names)`.
"""

import asyncio
from collections.abc import Awaitable, Callable

import typer

from services.console import access, listing
from services.console.client import ask, connected
from shared import logs, subjects
from shared.bus import Bus
from shared.errors import SeedwireError
from shared.messages import JobsListed, ListJobs

LOCAL = access.default_servers()
PATIENCE_S = 1.0

Names = Callable[[Bus], Awaitable[list[str]]]


def job_names(context: typer.Context, incomplete: str) -> list[str]:
    """Jobs whose names begin so."""
    return _found(context, incomplete, _jobs)


def device_names(context: typer.Context, incomplete: str) -> list[str]:
    """Devices whose names begin so."""
    return _found(context, incomplete, _devices)


async def _jobs(bus: Bus) -> list[str]:
    listed = await ask(bus, subjects.JOB_LIST, ListJobs(), JobsListed)
    return [job.job for job in listed.jobs]


async def _devices(bus: Bus) -> list[str]:
    return [device.device for device in await listing.devices(bus)]


def _found(context: typer.Context, incomplete: str, names: Names) -> list[str]:
    logs.configure("console", level="error")
    servers: object = context.params.get("servers")
    for name in ("creds", "ca", "tls_name"):  # nothing has set them: no command runs
        setattr(access.given, name, context.find_root().params.get(name) or "")

    async def asked() -> list[str]:
        async with asyncio.timeout(PATIENCE_S), connected(str(servers or LOCAL)) as bus:
            return await names(bus)

    try:
        found = asyncio.run(asked())
    except (SeedwireError, TimeoutError):
        return []
    return sorted(name for name in found if name.startswith(incomplete))
