"""`seedwire blob ...`: put a model into the blob store apart from a job."""

from pathlib import Path
from typing import Annotated

import typer

from services.console import options
from services.console.failure import Usage
from services.console.job_commands import LOCAL, console, talk
from services.console.submit import upload
from shared.nats_bus import NatsBus

commands = typer.Typer(no_args_is_help=True, help="Files in the fleet's store.")


@commands.callback()
def only() -> None:
    """Files in the fleet's store."""


@commands.command("put")
def put_blob(
    file: Annotated[Path, typer.Argument(help="What to upload.")], servers: options.Servers = LOCAL
) -> None:
    """Upload a file, or what is missing of it, and print its digest."""

    async def work(bus: NatsBus) -> None:
        if not file.is_file():
            raise Usage(f"there is no file {file}")
        ref = await upload(bus, file, console)
        console.print(ref.digest)

    talk(servers, work)
