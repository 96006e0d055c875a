"""The proxy's state directory: versions as files of their own, the pin, fetched models' digests.

A version's file has everything but the base model: it can be served without a broker.
"""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from services.proxy_inference.versions import Pin, Version
from shared.errors import ConfigError
from shared.logs import get
from shared.messages import JobSpec

log = get("shelf")
Kind = TypeVar("Kind")


class Kept(msgspec.Struct, frozen=True):
    """A version as it lies on disk."""

    version: Version
    spec: JobSpec
    manifest: bytes
    snapshot: bytes
    anchor: bytes = b""
    """A snapshot as well: what takes the base model's place where a large one is steered."""


class ModelFile(NamedTuple):
    """A GGUF file and its SHA-256."""

    path: Path
    digest: str


class _Hashed(msgspec.Struct, frozen=True):
    size_bytes: int
    changed_ns: int
    digest: str


class Shelf:
    """Files below one directory; every write is whole or not at all. Blocking."""

    def __init__(self, place: str) -> None:
        """Raises ConfigError where the directory cannot be made."""
        folder = Path(place).expanduser()
        self.models = folder / "models"
        self._versions = folder / "versions"
        self._pin = folder / "pin"
        self._served = folder / "served"
        self._digests = folder / "digests"
        try:
            for each in (self.models, self._versions):
                each.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--state-dir {folder} cannot be used: {error.strerror}; name another"
            ) from error

    def versions(self) -> list[Kept]:
        """Everything on the shelf, oldest first; a file that cannot be read is left out."""
        found: list[Kept] = []
        for path in self._versions.glob("*.version"):
            kept = _read(path, Kept)
            if kept is not None:
                found.append(kept)
        return sorted(found, key=lambda kept: kept.version.sequence)

    def load(self, version: Version) -> Kept | None:
        kept = _read(self._path(version), Kept)
        return kept if kept is not None and kept.version.digest == version.digest else None

    def put(self, kept: Kept) -> None:
        """Raises OSError where the disk would not take it."""
        _write(self._path(kept.version), msgspec.msgpack.encode(kept))

    def drop(self, version: Version) -> None:
        self._path(version).unlink(missing_ok=True)

    def pin(self) -> Pin | None:
        return _read(self._pin, Pin)

    def set_pin(self, pin: Pin | None) -> None:
        if pin is None:
            self._pin.unlink(missing_ok=True)
        else:
            _write(self._pin, msgspec.msgpack.encode(pin))

    def served(self) -> str:
        """The digest of the version that served last; empty: none did."""
        return _read(self._served, str) or ""

    def set_served(self, digest: str) -> None:
        try:
            _write(self._served, msgspec.msgpack.encode(digest))
        except OSError as error:  # it is for the time after a restart alone
            log.warning("not_noted", path=str(self._served), error=str(error))

    def file(self, named: str) -> ModelFile:
        """The file that `named` names. Raises OSError where it cannot be read."""
        path = Path(named).expanduser()
        return ModelFile(path, self.digest(path))

    def digest(self, path: Path) -> str:
        """A file's SHA-256, read again only when size or time of change are others.

        Raises OSError where the file cannot be read.
        """
        known = _read(self._digests, dict[str, _Hashed]) or {}
        status = path.stat()
        seen = (status.st_size, status.st_mtime_ns)
        entry = known.get(str(path.resolve()))
        if entry is not None and (entry.size_bytes, entry.changed_ns) == seen:
            return entry.digest
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        known[str(path.resolve())] = _Hashed(*seen, digest)
        _write(self._digests, msgspec.msgpack.encode(known))
        return digest

    def _path(self, version: Version) -> Path:
        return self._versions / f"{version.name}.version"


def _read(path: Path, kind: type[Kind]) -> Kind | None:
    try:
        return msgspec.msgpack.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        log.warning("file_unreadable", path=str(path), error=str(error))
        return None


def _write(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
