"""What became of each update, a JSON line per fact, for an independent witness to read.

    {"key": K, "what": "spooled", "sum": sum of the int32 differences or null, "weight": W}
    {"key": K, "what": "settled", "outcome": O}
    {"key": K, "what": "superseded"}      it left a full spool unsettled

A settled line may come more than once for a key (the first word may be lost between its line and
the update's removal); the first is the word that counts.
"""

import array
import errno
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import msgspec

from shared.messages import ProbeResult, SubmitUpdate


class Fact(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line. `sum` is UNSET but for spooled updates, null for those without differences."""

    key: str
    what: str
    sum: int | msgspec.UnsetType | None = msgspec.UNSET
    weight: int | msgspec.UnsetType = msgspec.UNSET
    outcome: str | msgspec.UnsetType = msgspec.UNSET


class Ledger:
    """Append-only; a torn last line is cut off when it is opened."""

    def __init__(self, path: Path) -> None:
        """Open or begin the file at `path`.

        Raises:
            OSError: it cannot be written.
        """
        self._path = path
        self.last_spooled = ""
        """Key of the newest spooled line: the last work that came to anything."""
        with path.open("ab") as file:
            size = file.tell()
        with path.open("rb+") as file:
            whole = 0
            for line in file:
                if line.endswith(b"\n"):
                    whole += len(line)
            if whole < size:
                file.truncate(whole)

    def facts_of(self, keys: Iterable[str]) -> dict[str, set[str]]:
        """What the ledger says of each of `keys`; finds `last_spooled` on the way."""
        known: dict[str, set[str]] = {key: set() for key in keys}
        with self._path.open("rb") as file:
            for line in file:
                try:
                    fact = msgspec.json.decode(line, type=Fact)
                except (msgspec.MsgspecError, UnicodeDecodeError):
                    continue
                if fact.key in known:
                    known[fact.key].add(fact.what)
                if fact.what == "spooled":
                    self.last_spooled = fact.key
        return known

    def spooled(self, update: SubmitUpdate) -> None:
        """Write that `update` is in the spool. Raises OSError, and then has written nothing."""
        key = update.key.text()
        total = _sum(update)
        self._append(Fact(key, "spooled", sum=total, weight=update.result.weight))
        self.last_spooled = key

    def settled(self, key: str, outcome: str) -> None:
        self._append(Fact(key, "settled", outcome=outcome))

    def superseded(self, key: str) -> None:
        self._append(Fact(key, "superseded"))

    def _append(self, fact: Fact) -> None:
        with self._path.open("ab", buffering=0) as file:
            size = file.tell()
            line = msgspec.json.encode(fact) + b"\n"
            try:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, "only a part was written", str(self._path))
            except OSError:
                os.ftruncate(file.fileno(), size)
                raise


def _sum(update: SubmitUpdate) -> int | None:
    """Sum of an update's int32 differences; None where it has none."""
    if not isinstance(update.result, ProbeResult):
        return None
    numbers = array.array("i", update.result.differences)
    if sys.byteorder == "big":
        numbers.byteswap()
    return sum(numbers)
