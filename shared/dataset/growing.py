"""A file, or a directory of files that come, grow, are replaced and go, read as far as it is new.

A file that has grown is read on from where it was complete. One that was cut or replaced is read
anew: another inode, fewer bytes, or other bytes where reading stopped. A file that is rewritten in
place to the same first and last 4 KiB and a greater length would go unnoticed.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from shared.dataset.records import SUFFIXES, Place, Record, is_compressed, opened, records
from shared.errors import EngineError

SETTLED_S = 30.0
"""After so long without a change, a last CSV record in a directory is taken without its newline."""
KINDS = ", ".join(f"*{suffix}" for suffix in SUFFIXES)

_SAMPLE_BYTES = 4096


class Keeper(Protocol):
    """What is kept of one file."""

    def forget(self) -> None:
        """Nothing of it holds any more."""
        ...

    def take(self, record: Record) -> None:
        """One more. One that is not `whole` is taken back by the next `go_on`."""
        ...

    def go_on(self) -> None:
        """The file is read on; a record that was not whole comes again."""
        ...


Kept = TypeVar("Kept", bound=Keeper)


@dataclass(slots=True)
class _File(Generic[Kept]):
    kept: Kept
    place: Place = field(default_factory=Place)
    stamp: tuple[int, ...] = ()
    first: bytes = b""
    last: bytes = b""
    """Samples of what was read: its beginning, and what stood before the place."""
    unfinished: bool = False


class Growing(Generic[Kept]):
    """`kept` has one keeper for each file, in the order of their names."""

    def __init__(self, path: str, keeper: Callable[[str, bool], Kept]) -> None:
        """`keeper` makes one for a path; told whether more may be written to it at any time.

        Raises:
            EngineError: `path` cannot be read.
        """
        self.path = path
        self.is_directory = os.path.isdir(path)
        self._keeper = keeper
        self._files: dict[str, _File[Kept]] = {}
        if not os.access(path, os.R_OK):
            why = "no such file" if not os.path.exists(path) else "permission denied"
            raise EngineError(f"{path}: cannot be read: {why}; give a file of rows, or a directory")
        self.look()

    @property
    def kept(self) -> list[Kept]:
        return [file.kept for file in self._files.values()]

    def look(self) -> bool:
        """All that can be read now has been; whether anything has changed."""
        names = self._names()
        changed = names != list(self._files)
        files = {name: self._files.get(name) or self._new(name) for name in names}
        self._files = files
        for name, file in files.items():
            changed |= self._read(name, file)
        return changed

    def _new(self, name: str) -> _File[Kept]:
        return _File(self._keeper(name, self.is_directory))

    def _names(self) -> list[str]:
        if not self.is_directory:
            return [self.path]
        try:
            found = sorted(os.listdir(self.path))
        except OSError:
            return []
        paths = [os.path.join(self.path, name) for name in found if _holds_rows(name)]
        return [path for path in paths if os.path.isfile(path)]

    def _read(self, path: str, file: _File[Kept]) -> bool:
        try:
            status = os.stat(path)
            stamp = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            closed = not self.is_directory or time.time() - status.st_mtime > SETTLED_S
            if stamp == file.stamp and not (file.unfinished and closed):
                return False
            with opened(path) as source:
                if not _is_longer(path, file, stamp):
                    file.kept.forget()
                    file.place = Place()
                file.kept.go_on()
                for record in records(path, source, file.place, closed=closed):
                    file.kept.take(record)
            file.first, file.last = _samples(path, file.place.offset)
            file.stamp = stamp
            rest = is_compressed(path) or file.place.offset < status.st_size
            file.unfinished = rest and not closed
        except OSError as error:
            known, file.stamp = file.stamp, ()
            file.kept.forget()
            file.place = Place()
            if not isinstance(error, FileNotFoundError):
                file.kept.take(Record(1, None, f"cannot be read: {error.strerror}"))
            return bool(known)
        return True


def _holds_rows(name: str) -> bool:
    return not name.startswith((".", "~")) and name.lower().removesuffix(".gz").endswith(SUFFIXES)


def _is_longer(path: str, file: _File[Kept], stamp: tuple[int, ...]) -> bool:
    """Whether what was read of it still stands there."""
    if not file.stamp or is_compressed(path) or stamp[:2] != file.stamp[:2]:
        return False
    if stamp[2] < file.stamp[2] or (stamp[2] == file.stamp[2] and stamp[3] != file.stamp[3]):
        return False
    return _samples(path, file.place.offset) == (file.first, file.last)


def _samples(path: str, offset: int) -> tuple[bytes, bytes]:
    if is_compressed(path):
        return b"", b""
    with open(path, "rb") as file:
        first = file.read(min(offset, _SAMPLE_BYTES))
        file.seek(max(0, offset - _SAMPLE_BYTES))
        return first, file.read(min(offset, _SAMPLE_BYTES))
