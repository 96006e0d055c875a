"""A ticket: what an operator hands to a device so that it finds the fleet, trusts it and is let in.

Text to paste, with a checksum. It holds a secret until it is used up or expired.
"""

import base64
import binascii
import hashlib
import zlib
from typing import Annotated

import msgspec
from msgspec import Meta

from shared.errors import ConfigError

PREFIX = "swj1-"
_TRIM = " \t\r\n\"'`"


class Ticket(msgspec.Struct, frozen=True, array_like=True):
    """Where the broker is, which certificate it must show, and the invitation's secret.

    `pin`: SHA-256 of the certificate (DER); empty: any that the system's authorities vouch for.
    `device`: the one name it is good for; empty: any.
    """

    servers: Annotated[list[str], Meta(min_length=1, max_length=16)]
    secret: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{22}$")]
    pin: bytes = b""
    tls_name: str = ""
    device: str = ""

    def text(self) -> str:
        """The ticket as one word."""
        body = msgspec.msgpack.encode(self)
        sealed = body + zlib.crc32(body).to_bytes(4, "big")
        return PREFIX + base64.urlsafe_b64encode(sealed).rstrip(b"=").decode()

    @property
    def digest(self) -> str:
        """Tells tickets apart without giving one away."""
        return hashlib.sha256(self.text().encode()).hexdigest()[:16]


def parse(text: str) -> Ticket:
    """The ticket that was pasted.

    Raises:
        ConfigError: it is none, or was damaged on the way.
    """
    word = text.strip(_TRIM)
    if not word.startswith(PREFIX):
        raise ConfigError(
            f"that is no ticket: one begins with {PREFIX}; get one by `seedwire device invite`"
        )
    if any(letter.isspace() for letter in word):
        word = "".join(word.split())
    encoded = word.removeprefix(PREFIX)
    damaged = ConfigError("the ticket is damaged or cut short: paste all of it again")
    try:
        sealed = base64.b64decode(
            encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True
        )
    except (binascii.Error, ValueError) as error:
        raise damaged from error
    body, seal = sealed[:-4], sealed[-4:]
    if zlib.crc32(body).to_bytes(4, "big") != seal:
        raise damaged
    try:
        return msgspec.msgpack.decode(body, type=Ticket)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ConfigError(f"a ticket of another version of Seedwire: {error}") from error
