"""Where the broker is and who we are: what a process is told, as nats-py wants to hear it."""

import ssl
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from shared.errors import ConfigError
from shared.identity.claims import MADE_HERE, RESERVED_EARS, Claims, decode_unverified, token_of
from shared.identity.roles import inbox_prefix

CONNECT_TIMEOUT_S = 5
OUTGOING_BYTES = 2 * 1024 * 1024
"""How much may wait for a connection, or for a slow one."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """How a process proves who it is, and what it takes as proof of the broker.

    `ca_file` is what it trusts, if not the system's authorities; `tls_name` is what the broker's
    certificate must be made out to, if not its address.
    """

    user: str = ""
    password: str = ""
    token: str = ""
    creds_file: str = ""
    ca_file: str = ""
    tls_name: str = ""
    inbox_prefix: str = ""
    """Where its answers arrive; if not set, where its identity may listen."""
    mend: str = ""
    """What to do if the broker refuses it, for the log."""

    @property
    def wants_tls(self) -> bool:
        return bool(self.ca_file or self.tls_name)

    def inbox(self) -> str:
        """The prefix of the subjects its answers arrive on.

        Raises:
            ConfigError: the credentials file cannot be read.
        """
        if self.inbox_prefix or not self.creds_file:
            return self.inbox_prefix or "_INBOX"
        return inbox_of(Path(self.creds_file))

    def has_reserved_ears(self) -> bool:
        """Whether it hears the fleet under `roles.heard_as` names.

        Raises:
            ConfigError: the credentials file cannot be read.
        """
        return bool(self.creds_file) and RESERVED_EARS in _said(Path(self.creds_file)).nats.tags


def inbox_of(creds: Path) -> str:
    """Where the bearer of a credentials file may listen for answers.

    Raises:
        ConfigError: the file cannot be read, or holds no token.
    """
    said = _said(creds)
    return inbox_prefix(said.name) if MADE_HERE in said.nats.tags else "_INBOX"


def _said(creds: Path) -> Claims:
    try:
        text = creds.read_text(encoding="utf-8")
        return decode_unverified(token_of(text, str(creds)))
    except OSError as error:
        raise ConfigError(f"creds_file {creds} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"creds_file {creds}: {error}") from error


def needs_tls(servers: list[str], credentials: Credentials) -> bool:
    """Whether nothing may be said to the broker but under TLS."""
    return credentials.wants_tls or any(one.startswith(("tls://", "wss://")) for one in servers)


def client_options(
    servers: list[str], name: str, credentials: Credentials, ping_interval_s: int
) -> dict[str, Any]:
    """What nats-py is told; anything but one quick attempt is this module's affair."""
    if not servers:
        raise ConfigError("no broker given: set `servers`, for example nats://127.0.0.1:4222")
    options: dict[str, Any] = {
        "servers": servers,
        "name": name,
        "allow_reconnect": False,
        "max_reconnect_attempts": 1,
        "reconnect_time_wait": 0,
        "connect_timeout": CONNECT_TIMEOUT_S,
        "ping_interval": ping_interval_s,
        "max_outstanding_pings": 2,
        "pending_size": 2 * OUTGOING_BYTES,
        "flush_timeout": float(CONNECT_TIMEOUT_S),
        "inbox_prefix": credentials.inbox(),
    }
    for server in servers:
        _check_address(server)
    if credentials.creds_file:
        if not Path(credentials.creds_file).is_file():
            raise ConfigError(f"creds_file {credentials.creds_file} is not a file")
        if find_spec("nkeys") is None:
            raise ConfigError("creds_file needs the package nkeys: pip install nkeys")
        options["user_credentials"] = credentials.creds_file
    if credentials.user:
        options["user"] = credentials.user
        options["password"] = credentials.password
    if credentials.token:
        options["token"] = credentials.token
    if needs_tls(servers, credentials):
        try:
            context = ssl.create_default_context(cafile=credentials.ca_file or None)
        except OSError as error:
            raise ConfigError(f"ca_file {credentials.ca_file}: {error}") from error
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        options["tls"] = context
    if credentials.tls_name:
        options["tls_hostname"] = credentials.tls_name
    return options


def _check_address(server: str) -> None:
    try:
        parts = urlsplit(server if "://" in server else f"nats://{server}")
        usable = parts.scheme in ("nats", "tls", "ws", "wss") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(f"{server} is no broker's address: write nats://host:4222")
