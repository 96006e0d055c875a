"""Updates on disk until they are settled: the device's spool is what makes them durable.

One file an update, `<key>.update`, the encoded SubmitUpdate: written beside, synced, renamed, the
directory synced. The ledger next to them gets a line after the rename and a line before the unlink,
so a kill at any instruction leaves either a line too few, mended at the next start, or a file too
many, which is sent once more and settled as a duplicate.
"""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from edge_client.ledger import Ledger
from shared.codec import decode, encode
from shared.errors import ConfigError, MalformedMessage, TransientError
from shared.messages import SubmitUpdate

SUFFIX = ".update"


class SpoolFull(TransientError):
    """An update could not be made durable; the text says where to make room."""


@dataclass(frozen=True, slots=True)
class Held:
    """One unsettled update; its bytes stay on disk."""

    key: str
    job: str
    size_bytes: int


class Spool:
    """Unsettled updates of one device, oldest first. Blocks on the disk: call it in a thread."""

    def __init__(self, directory: Path, *, max_bytes: int) -> None:
        """Take up what an earlier run left; undecodable files are set aside as `.bad`.

        Raises:
            ConfigError: the directory cannot be used.
        """
        self._directory = directory
        self._max_bytes = max_bytes
        self._held: dict[str, Held] = {}
        self.bad: list[str] = []
        """Files that were set aside."""
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self.ledger = Ledger(directory / "ledger.jsonl")
            self._take_up()
        except OSError as error:
            raise ConfigError(f"spool {directory}: {error.strerror}; set state_dir") from error

    @property
    def keys(self) -> list[str]:
        return list(self._held)

    def __contains__(self, key: object) -> bool:
        return key in self._held

    def __len__(self) -> int:
        return len(self._held)

    def job(self, key: str) -> str:
        return self._held[key].job

    def put(self, update: SubmitUpdate) -> list[str]:
        """Make `update` durable; returns the keys dropped to make room, oldest first.

        A key that is held already stays as it is: its first measurement counts.

        Raises:
            SpoolFull: the disk would not take it; nothing is left of it.
        """
        key = update.key.text()
        if key in self._held:
            return []
        data = encode(update)
        path = self._path(key)
        try:
            self._write(path, data)
            try:
                self.ledger.spooled(update)
            except OSError:
                path.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise SpoolFull(
                f"spool full: free space at {self._directory} ({error.strerror})", delay_s=5.0
            ) from error
        self._held[key] = Held(key, update.key.job, len(data))
        return self._make_room(key)

    def read(self, key: str) -> bytes | None:
        """The encoded update, as it is sent; None where it was settled meanwhile."""
        try:
            return self._path(key).read_bytes()
        except OSError:
            return None

    def settle(self, key: str, outcome: str) -> bool:
        """Forget `key`; False where it was not held.

        Raises:
            OSError: the disk is in the way; the update is gone if it could be removed.
        """
        if key not in self._held:
            return False
        try:
            self.ledger.settled(key, outcome)
        except OSError:
            self._remove(key)  # makes the room that the line may need
            self.ledger.settled(key, outcome)
        else:
            self._remove(key)
        return True

    def _path(self, key: str) -> Path:
        return self._directory / f"{key}{SUFFIX}"

    def _write(self, path: Path, data: bytes) -> None:
        beside = path.with_suffix(".tmp")
        try:
            with beside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            beside.rename(path)
        except OSError:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            raise
        _sync(self._directory)

    def _make_room(self, newest: str) -> list[str]:
        """Drop the oldest but `newest`, which is safe by now, until the rest fit."""
        dropped: list[str] = []
        total = sum(held.size_bytes for held in self._held.values())
        for key, held in list(self._held.items()):
            if total <= self._max_bytes or key == newest:
                break
            try:
                self.ledger.superseded(key)
            except OSError:
                break
            self._remove(key)
            total -= held.size_bytes
            dropped.append(key)
        return dropped

    def _remove(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)
        self._held.pop(key)

    def _take_up(self) -> None:
        paths = sorted(self._directory.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime_ns)
        for path in paths:
            try:
                update = decode(path.read_bytes(), SubmitUpdate)
            except (MalformedMessage, OSError):
                update = None
            if update is None or update.key.text() + SUFFIX != path.name:
                path.rename(path.with_suffix(".bad"))
                self.bad.append(path.name)
                continue
            key = update.key.text()
            self._held[key] = Held(key, update.key.job, path.stat().st_size)
        for path in self._directory.glob("*.tmp"):
            path.unlink()
        for key, facts in self.ledger.facts_of(self._held).items():
            if "settled" in facts or "superseded" in facts:
                self._remove(key)
            elif "spooled" not in facts:
                self.ledger.spooled(decode(self._path(key).read_bytes(), SubmitUpdate))


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
