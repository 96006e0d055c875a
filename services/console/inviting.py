"""Tickets: made of what the registrar answers and of where this fleet's broker is."""

from pathlib import Path

from services.console.client import ask
from services.console.failure import Failure
from shared import subjects
from shared.bus import Bus
from shared.identity import access, files
from shared.identity.access import Access
from shared.identity.ticket import Ticket
from shared.messages import DevicesInvited, InviteDevices


async def invited(bus: Bus, fleet: Access, request: InviteDevices) -> Ticket:
    """A ticket that the registrar will honour.

    Raises:
        Failure: nobody makes any, or the fleet has no identities.
    """
    if not fleet.creds_file:
        raise Failure(
            "this fleet knows no identities: its broker lets in whoever comes, so devices need no "
            "ticket"
        )
    answer = await ask(bus, subjects.IDENTITY_INVITE, request, DevicesInvited)
    return ticket(fleet, answer.secret, request.device or "")


def ticket(fleet: Access, secret: str, device: str = "") -> Ticket:
    """
    Raises:
        ConfigError: the fleet's certificate cannot be read.
    """
    pinned = bool(fleet.ca_file and fleet.tls_name)
    pin = access.pin_of(files.read(Path(fleet.ca_file))) if pinned else b""
    return Ticket(
        servers=fleet.invite_servers or fleet.servers,
        secret=secret,
        pin=pin,
        tls_name=fleet.tls_name,
        device=device,
    )
