"""Updates on disk until they are settled: the device's spool is what makes them durable.

One file an update, `<key>.update`, the encoded SubmitUpdate: written beside, synced, renamed, the
directory synced. The ledger next to them gets a line after the rename and a line before the unlink,
so a kill at any instruction leaves either a line too few, mended at the next start, or a file too
many, which is sent once more and settled as a duplicate.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from edge_client.disk import Disk
from edge_client.ledger import Ledger
from shared.codec import decode, encode
from shared.errors import ConfigError, MalformedMessage, TransientError
from shared.messages import SubmitUpdate

SUFFIX = ".update"
BESIDE = ".tmp"
SETTLED = ".settled"


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

    def __init__(
        self,
        directory: Path,
        *,
        max_bytes: int,
        max_ledger_bytes: int = 0,
        disk: Disk | None = None,
    ) -> None:
        """Take up what an earlier run left; undecodable files are set aside as `.bad`.

        Past `max_ledger_bytes` the ledger forgets what is not held any more; 0: never.

        Raises:
            ConfigError: the directory cannot be used.
        """
        self._directory = directory
        self._max_bytes = max_bytes
        self._max_ledger_bytes = self._trim_at = max_ledger_bytes
        self._held: dict[str, Held] = {}
        self._marked: list[str] = []
        self._unlisted: dict[str, None] = {}
        """Held, but not in the ledger as spooled."""
        self.bad: list[str] = []
        """Files that were set aside."""
        self._disk = disk or Disk(directory)
        try:
            self._disk.prepare()
            self.ledger = Ledger(self._disk)
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
        """The job of a key; empty where it is not held."""
        held = self._held.get(key)
        return held.job if held else ""

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
        try:
            for older in list(self._unlisted):  # the newest is to be the ledger's last
                self._list(older)
            self._write(key, data)
            try:
                self.ledger.spooled(update)
            except OSError:
                self._disk.remove(key + SUFFIX)
                raise
        except OSError as error:
            raise SpoolFull(
                f"spool full: free space at {self._directory} ({error.strerror})", delay_s=5.0
            ) from error
        self._held[key] = Held(key, update.key.job, len(data))
        dropped = self._make_room(key)
        self._trim()
        return dropped

    def read(self, key: str) -> bytes | None:
        """The encoded update, as it is sent; None where it was settled meanwhile."""
        try:
            return self._disk.read(key + SUFFIX)
        except OSError:
            return None

    def settle(self, key: str, outcome: str) -> bool:
        """Forget `key`; False where it was not held.

        Raises:
            OSError: the disk is in the way. The update is gone all the same, and the ledger told
                when there is room, or it is held as before.
        """
        if key not in self._held:
            return False
        try:
            self._list(key)
            self._told(key, outcome)
        except OSError:
            if key in self._unlisted:
                raise
            self._mark(key, outcome)  # makes the room that the line may need
        else:
            self._remove(key)
        self.tell()
        self._trim()
        return True

    def _told(self, key: str, outcome: str) -> None:
        """The ledger has the word, and no power cut takes the line and leaves the update gone."""
        self.ledger.settled(key, outcome)
        self.ledger.sync()

    def _list(self, key: str) -> None:
        """The ledger knows that `key` is in the spool; a kill may have come before it did."""
        if key in self._unlisted:
            self.ledger.spooled(decode(self._disk.read(key + SUFFIX), SubmitUpdate))
            del self._unlisted[key]

    def _mark(self, key: str, outcome: str) -> None:
        """An empty file says by its name what the ledger has no room for."""
        with contextlib.suppress(OSError):
            self.ledger.sync()  # its spooled line could not be made again from an empty file
        name = f"{key}.{outcome}{SETTLED}"
        self._disk.rename(key + SUFFIX, name)
        self._held.pop(key)
        self._marked.append(name)
        self._disk.truncate(name, 0)
        self._disk.sync()

    @property
    def untold(self) -> bool:
        """Whether the ledger lacks a line that it had no room for."""
        return bool(self._marked or self._unlisted)

    def tell(self) -> None:
        """The ledger has what it had no room for before.

        Raises:
            OSError: there is still none.
        """
        for key in list(self._unlisted):
            self._list(key)
        while self._marked:
            key, _, outcome = self._marked[0].removesuffix(SETTLED).rpartition(".")
            self._told(key, outcome)
            self._disk.remove(self._marked.pop(0))

    def _write(self, key: str, data: bytes) -> None:
        beside = key + BESIDE
        try:
            self._disk.write(beside, data)
            self._disk.sync(beside)
            self._disk.rename(beside, key + SUFFIX)
        except OSError:
            with contextlib.suppress(OSError):
                self._disk.remove(beside)
            raise
        self._disk.sync()

    def _make_room(self, newest: str) -> list[str]:
        """Drop the oldest but `newest`, which is safe by now, until the rest fit."""
        dropped: list[str] = []
        total = sum(held.size_bytes for held in self._held.values())
        for key, held in list(self._held.items()):
            if total <= self._max_bytes or key == newest:
                break
            try:
                self._list(key)
                self.ledger.superseded(key)
                self.ledger.sync()
            except OSError:
                break
            self._remove(key)
            total -= held.size_bytes
            dropped.append(key)
        return dropped

    def _trim(self) -> None:
        """Keep the ledger within its bound, or within twice what it must hold."""
        if not self._max_ledger_bytes or self.ledger.size_bytes <= self._trim_at:
            return
        with contextlib.suppress(OSError):  # a longer ledger harms nobody
            self.ledger.trim(self._held)
        self._trim_at = max(self._max_ledger_bytes, 2 * self.ledger.size_bytes)

    def _remove(self, key: str) -> None:
        self._disk.remove(key + SUFFIX)
        self._held.pop(key)
        self._unlisted.pop(key, None)

    def _take_up(self) -> None:
        found: dict[str, SubmitUpdate] = {}
        for name in self._disk.names():
            if name.endswith(BESIDE):
                self._disk.remove(name)
            elif name.endswith(SETTLED):
                self._marked.append(name)
            elif name.endswith(SUFFIX):
                try:
                    update = decode(data := self._disk.read(name), SubmitUpdate)
                except (MalformedMessage, OSError):
                    update, data = None, b""
                if update is None or update.key.text() + SUFFIX != name:
                    self._disk.rename(name, name.removesuffix(SUFFIX) + ".bad")
                    self.bad.append(name)
                    continue
                key = update.key.text()
                found[key] = update
                self._held[key] = Held(key, update.key.job, len(data))
        self._disk.sync()  # a kill may have come between a rename and this
        # By the ledger, which no clock that was set back can put out of order.
        for key, facts in self.ledger.facts_of(found).items():
            self._held[key] = self._held.pop(key)
            if "settled" in facts or "superseded" in facts:
                self._remove(key)
            elif "spooled" not in facts:
                self._unlisted[key] = None
        with contextlib.suppress(OSError):
            self.tell()
