"""`seedwire device ...`: invite, list, revoke."""

from datetime import UTC, datetime
from typing import Annotated
from urllib.parse import urlsplit

import msgspec
import typer
from rich.table import Table

from services.console import access, completion, options
from services.console.addresses import HOST
from services.console.client import ask
from services.console.completion import LOCAL
from services.console.durations import seconds
from services.console.failure import EXIT_USAGE, Usage, told
from services.console.inviting import invited
from services.console.job_commands import talk
from services.console.printing import Printer
from shared import subjects
from shared.messages import (
    DeviceRevoked,
    IdentitiesListed,
    Identity,
    InviteDevices,
    ListIdentities,
    RevokeDevice,
)
from shared.nats_bus import NatsBus

commands = typer.Typer(
    no_args_is_help=True, help="Invite devices, list their identities, put one out."
)
KEY_SHOWN = 12

Device = Annotated[
    str,
    typer.Argument(
        metavar="DEVICE", help="The device's name.", autocompletion=completion.device_names
    ),
]


@commands.command("invite")
def invite(
    device: Annotated[
        str | None, typer.Option(help="The one name that the ticket is good for.")
    ] = None,
    uses: Annotated[
        int, typer.Option(min=0, help="How many devices may come by it; 0: any number.")
    ] = 1,
    expires: Annotated[
        str, typer.Option(metavar="24h", help="Until when: 90s, 30m, 24h, 7d.")
    ] = "24h",
    address: Annotated[
        list[str] | None,
        typer.Option(help="Where devices find the broker, if not where it is known to be."),
    ] = None,
    servers: options.Servers = LOCAL,
    as_json: options.Json = False,
) -> None:
    """Make a ticket, and print the command that enrols a device with it."""
    printer = Printer(as_json=as_json)
    try:
        request = InviteDevices(uses=uses, expires_s=_expiry(expires), device=_name(device))
    except Usage as error:
        raise typer.Exit(told(error, EXIT_USAGE, as_json=as_json)) from error

    async def work(bus: NatsBus) -> None:
        fleet = access.resolved([one.strip() for one in servers.split(",")])
        if address:
            fleet = msgspec.structs.replace(fleet, invite_servers=address)
        ticket = await invited(bus, fleet, request)
        command = f"seedwire-edge enroll {ticket.text()}"
        if all(urlsplit(one).hostname in (HOST, "localhost") for one in ticket.servers):
            printer.remark(
                "this ticket is for devices on this machine: for others, `seedwire up --host "
                "0.0.0.0`, or name the broker's address with --address"
            )
        result = {"ticket": ticket.text(), "command": command, "servers": ticket.servers}
        printer.result(result | {"uses": uses, "expires_s": request.expires_s}, command)

    talk(servers, work, as_json=as_json)


@commands.command("list")
def list_identities(servers: options.Servers = LOCAL, as_json: options.Json = False) -> None:
    """Show every device that has or had an identity; `seedwire devices` shows what they do."""
    printer = Printer(as_json=as_json)

    async def work(bus: NatsBus) -> None:
        listed = await ask(bus, subjects.IDENTITY_LIST, ListIdentities(), IdentitiesListed)
        value = msgspec.to_builtins(listed)
        del value["type"], value["v"]
        printer.result(value, _table(listed.identities))

    talk(servers, work, as_json=as_json)


@commands.command("revoke")
def revoke(device: Device, servers: options.Servers = LOCAL, as_json: options.Json = False) -> None:
    """Put a device out at once; its ticket is closed too, and the name is free for a new one."""
    printer = Printer(as_json=as_json)
    try:
        request = RevokeDevice(device=_name(device) or "")
    except Usage as error:
        raise typer.Exit(told(error, EXIT_USAGE, as_json=as_json)) from error

    async def work(bus: NatsBus) -> None:
        answer = await ask(bus, subjects.IDENTITY_REVOKE, request, DeviceRevoked)
        again = f"seedwire device invite --device {device}"
        value = {"device": answer.device, "public_key": answer.public_key, "revoked": True}
        printer.result(
            value,
            f"{device} is revoked; to let it in again: {again}\n"
            "the ticket it came by is closed, for others too if it had uses left; a new one: "
            "seedwire device invite",
        )

    talk(servers, work, as_json=as_json)


def _table(identities: list[Identity]) -> Table:
    table = Table("device", "state", "since", "key", "refused")
    for one in identities:
        since = datetime.fromtimestamp(one.revoked_at or one.enrolled_at, UTC)
        table.add_row(
            one.device,
            one.state,
            f"{since:%Y-%m-%d %H:%M} UTC",
            one.public_key[:KEY_SHOWN],
            str(one.refused) if one.refused else "-",
            style="dim" if one.state == "revoked" else None,
        )
    return table


def _expiry(text: str) -> float:
    expires_s = seconds(text, "--expires")
    if not 1.0 <= expires_s <= 366 * 86400.0:
        raise Usage(f"--expires {text}: from 1s to 366d")
    return expires_s


def _name(device: str | None) -> str | None:
    if device is not None and not subjects.NAME.match(device):
        raise Usage(f"{device!r} is no device's name: use 1 to 64 of A-Z a-z 0-9 _ -")
    return device
