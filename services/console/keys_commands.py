"""`seedwire keys init`: a fleet's keys, for a broker that `seedwire up` does not run."""

from pathlib import Path
from typing import Annotated

import typer

from services.console import options
from services.console.failure import outcome
from services.console.printing import Printer
from shared.identity.authority import Authority

commands = typer.Typer(no_args_is_help=True, help="Make a fleet's keys and certificate.")


@commands.command("init")
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where they should lie.")],
    hosts: Annotated[
        list[str] | None,
        typer.Option("--host", help="A name or address of the broker, for its certificate."),
    ] = None,
    tls: Annotated[
        bool, typer.Option(help="Make a certificate; without, set `tls` of nats-server yourself.")
    ] = True,
    seen_at: Annotated[
        str, typer.Option(metavar="PATH", help="Where nats-server sees DIR, if not where it is.")
    ] = "",
    as_json: options.Json = False,
) -> None:
    """Make what is missing: keys, credentials, certificate, nats-server configuration.

    What is there already stays. Keep DIR/keys/operator.seed in a safe place: no running
    service needs it; it can make a new operator signing key.
    """
    printer = Printer(as_json=as_json)
    authority = Authority(folder)

    async def command() -> None:
        made = authority.make(hosts=hosts or [], tls=tls, seen_at=seen_at)
        value = {"folder": str(folder.resolve()), "made": made}
        said = "made" if made else "complete already"
        printer.result(
            value,
            f"{folder}: {said}\n"
            f"  for nats-server     {authority.server_conf} to include, tls/, accounts/ to write\n"
            f"  for the services    creds/NAME.creds as --creds-file, {authority.ca_file} as "
            "--ca-file, --tls-name seedwire\n"
            f"  for the registrar   {authority.registrar_file.name} and "
            f"creds/{authority.system_creds.name} besides\n"
            f"  put in a safe       {folder / 'keys'}",
        )

    raise typer.Exit(outcome(command(), as_json=as_json))
