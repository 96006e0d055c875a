"""`seedwire blob ...`: files into the fleet's store and out of it, apart from a job."""

import re
from pathlib import Path
from typing import Annotated

import typer

from services.console import options
from services.console.failure import Usage
from services.console.job_commands import LOCAL, talk
from services.console.printing import Printer
from services.console.transfer import download, upload
from shared.nats_bus import NatsBus

DIGEST = re.compile(r"^[0-9a-f]{64}$")

commands = typer.Typer(no_args_is_help=True, help="Files in the fleet's store.")


@commands.callback()
def only() -> None:
    """Files in the fleet's store."""


@commands.command("put")
def put_blob(
    file: Annotated[Path, typer.Argument(help="What to upload.")],
    servers: options.Servers = LOCAL,
    as_json: options.Json = False,
) -> None:
    """Upload a file, or what is missing of it, and print its digest."""
    printer = Printer(as_json=as_json)

    async def work(bus: NatsBus) -> None:
        if not file.is_file():
            raise Usage(f"there is no file {file}")
        ref = await upload(bus, file, printer.bars)
        printer.result(ref, ref.digest)

    talk(servers, work, as_json=as_json)


@commands.command("get")
def get_blob(
    digest: Annotated[str, typer.Argument(help="As `blob put` or a watched job's end names it.")],
    file: Annotated[Path, typer.Argument(help="Where to put it; is replaced if it is there.")],
    servers: options.Servers = LOCAL,
    as_json: options.Json = False,
) -> None:
    """Download a file, such as a job's snapshot; what an earlier attempt got is kept."""
    printer = Printer(as_json=as_json)

    async def work(bus: NatsBus) -> None:
        if not DIGEST.match(digest):
            raise Usage(f"{digest!r} is no digest: 64 of 0-9 a-f")
        if file.is_dir():
            raise Usage(f"{file} is a directory: name a file")
        ref = await download(bus, digest, file, printer.bars)
        printer.result(
            {"file": file, "digest": ref.digest, "size_bytes": ref.size_bytes},
            f"{file}: {ref.size_bytes:,} bytes",
        )

    talk(servers, work, as_json=as_json)
