"""Ports of this host, and how others reach it."""

import errno
import socket

from shared.errors import ConfigError

HOST = "127.0.0.1"
EVERYWHERE = "0.0.0.0"  # noqa: S104 - only where the operator says so
ELSEWHERE = ("192.0.2.1", 9)
"""An address that belongs to nobody (TEST-NET-1); nothing is sent to it."""


def free_port() -> int:
    """A port of this host that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def check_free(host: str, port: int, option: str) -> None:
    """Something can listen on `port` of `host`; port 0 always can.

    Raises:
        ConfigError: it cannot; names `option`.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} is in use (by an earlier `seedwire up`?): stop it or choose {option}"
            ) from error
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error


def outward_address() -> str:
    """This machine's address as others in its network see it, or else its name."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(ELSEWHERE)
        except OSError:
            return socket.gethostname()
        address: str = probe.getsockname()[0]
        return address
