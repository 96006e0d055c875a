"""Where the broker is and who we are: what a process is told, as nats-py wants to hear it."""

import ssl
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from shared.errors import ConfigError

CONNECT_TIMEOUT_S = 5
OUTGOING_BYTES = 2 * 1024 * 1024
"""How much may wait for a connection, or for a slow one."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """How a process proves who it is; `ca_file` is what it trusts, if not the system's."""

    user: str = ""
    password: str = ""
    token: str = ""
    creds_file: str = ""
    ca_file: str = ""
    inbox_prefix: str = "_INBOX"
    """Where its answers arrive: permissions of a device name it."""


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
        "inbox_prefix": credentials.inbox_prefix,
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
    if credentials.ca_file:
        try:
            options["tls"] = ssl.create_default_context(cafile=credentials.ca_file)
        except OSError as error:
            raise ConfigError(f"ca_file {credentials.ca_file}: {error}") from error
    return options


def _check_address(server: str) -> None:
    try:
        parts = urlsplit(server if "://" in server else f"nats://{server}")
        usable = parts.scheme in ("nats", "tls", "ws", "wss") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(f"{server} is no broker's address: write nats://host:4222")
