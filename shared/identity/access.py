"""Access to one fleet: where its broker is and which files let us in, as a small TOML file."""

import hashlib
import json
import ssl
import tomllib
from pathlib import Path

import msgspec

from shared.credentials import Credentials
from shared.errors import ConfigError
from shared.identity import files

TLS_NAME = "seedwire"
"""What a fleet's own certificate is made out to, wherever its broker runs."""


class Access(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is empty is not needed. In the file, paths may be relative to its folder."""

    servers: list[str]
    creds_file: str = ""
    ca_file: str = ""
    tls_name: str = ""
    invite_servers: list[str] = []
    """Where devices find the broker, if that is another address."""

    def credentials(self) -> Credentials:
        return Credentials(creds_file=self.creds_file, ca_file=self.ca_file, tls_name=self.tls_name)

    def save(self, path: Path) -> None:
        """
        Raises:
            ConfigError: the file cannot be written.
        """
        # A JSON string or list of strings is one of TOML too.
        lines = [f"{key} = {json.dumps(value)}" for key, value in _given(self)]
        files.write(path, "\n".join(lines) + "\n")


def _given(access: Access) -> list[tuple[str, object]]:
    return [(key, value) for key, value in msgspec.structs.asdict(access).items() if value]


def load(path: Path) -> Access:
    """
    Raises:
        ConfigError: the file cannot be read, or is none of ours; names it.
    """
    try:
        access = msgspec.convert(tomllib.loads(files.read(path)), Access)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}") from error
    return msgspec.structs.replace(
        access,
        creds_file=_beside(path, access.creds_file),
        ca_file=_beside(path, access.ca_file),
    )


def _beside(path: Path, name: str) -> str:
    return str(path.resolve().parent / name) if name else ""


def pin_of(pem: str) -> bytes:
    """SHA-256 of the first certificate in a PEM file's text.

    Raises:
        ValueError: it holds none.
    """
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    start = pem.index(begin)
    return hashlib.sha256(
        ssl.PEM_cert_to_DER_cert(pem[start : pem.index(end, start) + len(end)])
    ).digest()
