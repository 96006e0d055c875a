"""The one directory a device keeps its updates in, step by step: every write boundary has a name.

A kill may come between any two steps, a power cut may lose whatever no `sync` has followed. Whoever
tests what then happens puts another Disk in this one's place.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path


class Disk:
    """Files by their names. Every call blocks, and raises OSError where the disk is in the way."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def prepare(self) -> None:
        """The directory is there."""
        self.directory.mkdir(parents=True, exist_ok=True)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.directory.iterdir())

    def read(self, name: str) -> bytes:
        return self._path(name).read_bytes()

    def lines(self, name: str) -> Iterator[bytes]:
        """The lines of a file, each with its end; a torn last one has none."""
        with self._path(name).open("rb") as file:
            yield from file

    def write(self, name: str, data: bytes) -> None:
        """The file holds `data`, as far as anyone knows who has no power cut."""
        with self._path(name).open("wb") as file:
            file.write(data)

    def append(self, name: str, data: bytes) -> None:
        """The file ends with `data`; where only a part fits, nothing of it is left."""
        with self._path(name).open("ab", buffering=0) as file:
            size = file.tell()
            try:
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path(name)))
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(file.fileno(), size)
                raise

    def truncate(self, name: str, size_bytes: int) -> None:
        os.truncate(self._path(name), size_bytes)

    def sync(self, name: str = "") -> None:
        """What the file holds outlives a power cut; without a name, which files there are."""
        descriptor = os.open(self._path(name) if name else self.directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, name: str, to: str) -> None:
        self._path(name).rename(self._path(to))

    def remove(self, name: str) -> None:
        """There is no such file, whether there was or not."""
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.directory / name
