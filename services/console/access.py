"""Which fleet a command is for, and what lets it in.

Where several say so, the first wins: --servers, --creds, --ca and --tls-name or their variables
(SEEDWIRE_SERVERS, SEEDWIRE_CREDS, ...); the access file that SEEDWIRE_FLEET names; the one that
`seedwire up` has left in ./seedwire-state; the one of the last `seedwire up` of this user; and
else a broker on this machine that asks for nothing.
"""

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from shared.credentials import Credentials
from shared.errors import ConfigError
from shared.identity import access
from shared.identity.access import Access

HOST, PORT = "127.0.0.1", 4222
PLAIN = f"nats://{HOST}:{PORT}"
FILE = "access.toml"
STATE_DIR = Path("seedwire-state")
LOOK_S = 0.5
CLOSE_AS_PROBE = (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
"""Closes with a reset, lest the broker take a look at its port for a failed TLS handshake."""


@dataclass(slots=True)
class Given:
    """What the command line or the environment says of how to log in."""

    creds: str = ""
    ca: str = ""
    tls_name: str = ""

    @property
    def anything(self) -> bool:
        return bool(self.creds or self.ca or self.tls_name)


given = Given()
"""Set once, before any command runs."""


def registered() -> Path:
    """Where the last `seedwire up` of this user is written down."""
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home) / "seedwire" / "fleet.toml"


def register(fleet: Access) -> str:
    """`fleet` is this user's from now on, unless another one still runs; then that one's address.

    A home that cannot be written is no reason to complain: --servers and ./seedwire-state remain.
    """
    path = registered()
    with contextlib.suppress(ConfigError):
        if path.is_file():
            other = access.load(path).servers
            if not _places(other) & _places(fleet.servers) and any(map(_listens, _places(other))):
                return ", ".join(other)
        fleet.save(path)
    return ""


def _listens(place: tuple[str, int]) -> bool:
    try:
        with socket.create_connection(place, timeout=LOOK_S) as probe:
            probe.setsockopt(*CLOSE_AS_PROBE)
            return True
    except OSError:
        return False


def default_servers() -> str:
    """The addresses that a command goes to unless it is told otherwise."""
    try:
        found = next(_fleets(), None)
    except ConfigError:
        return PLAIN  # a command that connects says what is wrong with the file
    return ",".join(found.servers) if found else PLAIN


def resolved(servers: list[str]) -> Access:
    """How to get in at `servers`.

    Raises:
        ConfigError: an access file cannot be read.
    """
    if given.anything:
        return Access(servers, given.creds, given.ca, given.tls_name)
    for fleet in _fleets():
        if os.environ.get("SEEDWIRE_FLEET") or _places(servers) & _places(fleet.servers):
            return Access(
                servers, fleet.creds_file, fleet.ca_file, fleet.tls_name, fleet.invite_servers
            )
    return Access(servers)


def credentials(servers: list[str]) -> Credentials:
    """What the console logs in with at `servers`.

    Raises:
        ConfigError: an access file cannot be read.
    """
    return resolved(servers).credentials()


def _places(servers: list[str]) -> set[tuple[str, int]]:
    """Hosts and ports, however their addresses are written."""
    found: set[tuple[str, int]] = set()
    for server in servers:
        with contextlib.suppress(ValueError):  # connecting says what is wrong with it
            parts = urlsplit(server if "://" in server else f"nats://{server}")
            host = (parts.hostname or "").replace("localhost", HOST)
            found.add((host, parts.port or PORT))
    return found


def _fleets() -> Iterator[Access]:
    """The access files there are, the first choice first."""
    named = os.environ.get("SEEDWIRE_FLEET")
    if named:
        yield access.load(Path(named))
        return
    for path in (STATE_DIR / FILE, registered()):
        if path.is_file():
            yield access.load(path)
