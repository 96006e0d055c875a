"""The device's identity on its disk: made by `seedwire-edge enroll`, found by the daemon.

STATE_DIR/identity/access.toml    where the broker is, and which files let the device in
STATE_DIR/identity/device.creds   its token and its key (0600), which never leaves
STATE_DIR/identity/ca.pem         the one certificate that the broker may show
STATE_DIR/identity/*.seed         a key that waits for its token
"""

from pathlib import Path

import msgspec

from edge_client.config import DEFAULT_SERVERS, Settings
from shared.credentials import Credentials
from shared.identity import access, files
from shared.identity.access import Access

MEND = (
    "if the device was revoked, or belongs to another fleet, ask an operator for a ticket and run: "
    "seedwire-edge enroll TICKET; the daemon then goes on by itself"
)

NO_IDENTITY = (
    "this device has no identity; a fleet of `seedwire up` wants one: "
    "seedwire-edge enroll TICKET --device {device}"
)


def folder(state_dir: Path) -> Path:
    return state_dir / "identity"


def access_file(state_dir: Path) -> Path:
    return folder(state_dir) / "access.toml"


def enrolled(state_dir: Path) -> bool:
    return access_file(state_dir).exists()


def keep(state_dir: Path, servers: list[str], creds: str, ca: str, tls_name: str) -> None:
    """The identity is whole on disk; the daemon finds it when it connects next.

    Raises:
        ConfigError: the directory cannot be written.
    """
    home = folder(state_dir)
    if ca:
        files.write(home / "ca.pem", ca)
    # The token last: it alone matters where the device is enrolled again.
    Access(
        servers=servers,
        creds_file="device.creds",
        ca_file="ca.pem" if ca else "",
        tls_name=tls_name,
    ).save(access_file(state_dir))
    files.write(home / "device.creds", creds, mode=files.SECRET)


def completed_by_identity(settings: Settings) -> Settings:
    """`settings` with what the device's identity says, where they say nothing themselves.

    Raises:
        ConfigError: the identity cannot be read.
    """
    state_dir = Path(settings.state_dir)
    own = access.load(access_file(state_dir)) if enrolled(state_dir) else None
    servers = settings.servers or (tuple(own.servers) if own else DEFAULT_SERVERS)
    if own is None:
        return msgspec.structs.replace(settings, servers=servers)
    named = settings.creds_file or settings.user or settings.token
    trusts = settings.ca_file or settings.tls_name
    return msgspec.structs.replace(
        settings,
        servers=servers,
        creds_file=settings.creds_file if named else own.creds_file,
        ca_file=settings.ca_file if trusts else own.ca_file,
        tls_name=settings.tls_name if trusts else own.tls_name,
    )


def credentials(settings: Settings) -> Credentials:
    """How the daemon logs in."""
    known = settings.user or settings.token or settings.creds_file
    return Credentials(
        user=settings.user,
        password=settings.password,
        token=settings.token,
        creds_file=settings.creds_file,
        ca_file=settings.ca_file,
        tls_name=settings.tls_name,
        mend=MEND if known else NO_IDENTITY.format(device=settings.device or "NAME"),
    )
