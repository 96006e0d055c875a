"""Files that must be whole, and for one pair of eyes."""

import os
from pathlib import Path

from shared.errors import ConfigError

SECRET, PUBLIC = 0o600, 0o644


def write(path: Path, text: str, *, mode: int = PUBLIC) -> None:
    """`path` holds `text`, also after a power cut: never half of it, never nothing.

    Raises:
        ConfigError: it cannot be written; names it.
    """
    new = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.unlink(missing_ok=True)
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(descriptor, mode)
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        new.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def write_once(path: Path, text: str, *, mode: int = PUBLIC) -> None:
    """As `write`, unless there is such a file already: that one stays."""
    if not path.exists():
        write(path, text, mode=mode)


def read(path: Path) -> str:
    """
    Raises:
        ConfigError: it cannot be read; names it.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text") from error


def sync_folder(folder: Path) -> None:
    """What was made or renamed in `folder` is on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
