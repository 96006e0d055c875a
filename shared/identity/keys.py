"""Ed25519 keys as NATS writes them (nkeys): a seed that stays where it was made, a public key."""

import os
from typing import Any, Literal, cast

import nkeys

from shared.errors import ConfigError

Kind = Literal["operator", "account", "user"]

_PREFIX: dict[Kind, int] = {
    "operator": nkeys.PREFIX_BYTE_OPERATOR,
    "account": nkeys.PREFIX_BYTE_ACCOUNT,
    "user": nkeys.PREFIX_BYTE_USER,
}


class Key:
    """A key pair; its text never shows the seed."""

    def __init__(self, seed: str) -> None:
        """
        Raises:
            ConfigError: it is no seed.
        """
        try:
            self._pair: Any = nkeys.from_seed(bytearray(seed.strip().encode()))
            self.public = cast("bytes", self._pair.public_key).decode()
        except (nkeys.NkeysError, ValueError, IndexError) as error:
            raise ConfigError(
                "not the seed of a key: it begins with S and has 58 letters"
            ) from error
        self.seed = seed.strip()

    def sign(self, data: bytes) -> bytes:
        return cast("bytes", self._pair.sign(data))

    def __repr__(self) -> str:
        return f"Key({self.public})"


def make(kind: Kind) -> Key:
    """A new key."""
    return from_bytes(kind, os.urandom(32))


def from_bytes(kind: Kind, secret: bytes) -> Key:
    """The key of 32 secret bytes."""
    return Key(nkeys.encode_seed(secret, _PREFIX[kind]).decode())
