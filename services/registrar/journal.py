"""The registrar's facts on disk, one a line: appended and synced before they take effect."""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from services.registrar.state import Fact
from shared.errors import ConfigError
from shared.identity.files import SECRET, sync_folder
from shared.logs import get

log = get("registrar")


class Journal:
    """One process's, until it ends."""

    def __init__(self, state_dir: Path) -> None:
        """
        Raises:
            ConfigError: the directory cannot be written, or another registrar uses it.
        """
        self._path = state_dir / "identities.jsonl"
        try:
            state_dir.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, SECRET)
            self._file = os.fdopen(descriptor, "ab+", buffering=0)
            sync_folder(state_dir)
        except OSError as error:
            raise ConfigError(f"state_dir {state_dir}: {error.strerror}; set another") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"state_dir {state_dir} is in use by another registrar") from error

    def facts(self) -> Iterator[Fact]:
        """All there are; what a power cut left of a last line is dropped: it took no effect.

        Raises:
            ConfigError: a line in the middle cannot be read.
        """
        self._file.seek(0)
        good = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                log.warning("journal_mended", file=str(self._path), line=number)
                self._file.truncate(good)
                return
            try:
                yield msgspec.json.decode(line, type=Fact)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise ConfigError(
                    f"{self._path}, line {number}: {error}; put back a copy of the file"
                ) from error
            good += len(line)

    def append(self, fact: Fact) -> None:
        """The fact is on disk.

        Raises:
            OSError: it is not.
        """
        line = msgspec.json.encode(fact) + b"\n"
        before = os.fstat(self._file.fileno()).st_size
        try:
            if os.write(self._file.fileno(), line) != len(line):
                raise OSError(28, "no space left for a whole line")
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(before)
            raise

    def close(self) -> None:
        self._file.close()
