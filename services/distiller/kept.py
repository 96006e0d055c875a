"""What models said of public rows, kept on disk: each is asked once.

A file is named after all that its content follows from, so there is nothing to invalidate; when
there is too much of them, those go that were not used for longest.
"""

import contextlib
import hashlib
import os
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from services.distiller.buckets import Buckets

_VERSION = 1
"""Of what is in a file."""
_NEW = ".new"
_ABANDONED_S = 24 * 3600.0
"""A file that has been in the making for longer is one that nobody makes any more."""


class Kept:
    """The files of one folder, at most `max_bytes` of them; without a folder nothing is kept."""

    def __init__(self, folder: Path | None, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes

    def get(self, parts: tuple[object, ...], ask: Callable[[], Buckets]) -> Buckets:
        """What `ask` says, which follows from `parts` (digests and settings) alone.

        Raises:
            OSError: it could not be kept.
        """
        if self._folder is None:
            return ask()
        name = hashlib.sha256(repr((_VERSION, *parts)).encode()).hexdigest()
        path = self._folder / f"{name}.npz"
        found = _read(path)
        if found is None:
            found = ask()
            self._write(path, found)
            self._make_room(path.parent)
        else:
            with contextlib.suppress(OSError):
                os.utime(path)
        return found

    def _make_room(self, folder: Path) -> None:
        """No more than `max_bytes` are kept; others may be at work in the folder as well."""
        found: list[tuple[float, int, Path]] = []
        for path in folder.iterdir():
            with contextlib.suppress(OSError):
                status = path.stat()
                if path.suffix == ".npz":
                    found.append((status.st_mtime, status.st_size, path))
                elif path.suffix == _NEW and status.st_mtime < time.time() - _ABANDONED_S:
                    path.unlink()
        left = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if left <= self._max_bytes:
                break
            path.unlink(missing_ok=True)
            left -= size

    def _write(self, path: Path, buckets: Buckets) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=_NEW, delete=False) as file:
            try:
                np.savez(
                    file,
                    ids=buckets.ids,
                    logits=buckets.logits,
                    rest=buckets.rest,
                    target=buckets.target,
                )
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                os.unlink(file.name)
                raise
        os.replace(file.name, path)


def file_digest(path: Path) -> str:
    """SHA-256 of a file; 64 hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoint_digest(folder: Path) -> str:
    """Of a checkpoint's weights and configuration.

    Raises:
        OSError: they cannot be read.
    """
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), folder / "config.json"])
    return hashlib.sha256(" ".join(file_digest(file) for file in files).encode()).hexdigest()


def _read(path: Path) -> Buckets | None:
    """What is kept there; None if nothing that can be read is."""
    try:
        with np.load(path) as arrays:
            return Buckets(*(arrays[name] for name in ("ids", "logits", "rest", "target")))
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None
