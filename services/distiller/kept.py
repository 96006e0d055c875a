"""What models said of public rows, kept on disk: each is asked once.

A file is named after all that its content follows from, so there is nothing to invalidate.
"""

import hashlib
import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from services.distiller.buckets import Buckets

_VERSION = 1
"""Of what is in a file."""


class Kept:
    """The files of one folder; without a folder nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

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
        return found

    def _write(self, path: Path, buckets: Buckets) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".new", delete=False) as file:
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
