"""What became of each update, a JSON line per fact, for an independent witness to read.

    {"key": K, "what": "spooled", "sum": sum of the int32 differences or null, "weight": W}
    {"key": K, "what": "settled", "outcome": O}
    {"key": K, "what": "superseded"}      it left a full spool unsettled

The whole history, unless it is trimmed to what is still held. A settled line may come more than
once for a key (the first word may be lost between its line and the update's removal); the first is
the word that counts.
"""

import array
import sys
from collections.abc import Container, Iterable

import msgspec

from edge_client.disk import Disk
from shared.messages import EvaluateResult, SubmitUpdate

NAME = "ledger.jsonl"
BESIDE = "ledger.tmp"


class Fact(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line. `sum` is UNSET but for spooled updates, null for those without differences."""

    key: str
    what: str
    sum: int | msgspec.UnsetType | None = msgspec.UNSET
    weight: int | msgspec.UnsetType = msgspec.UNSET
    outcome: str | msgspec.UnsetType = msgspec.UNSET


class Ledger:
    """Append-only; a torn last line is cut off when it is opened."""

    def __init__(self, disk: Disk) -> None:
        """Open or begin the file.

        Raises:
            OSError: it cannot be written.
        """
        self._disk = disk
        self.size_bytes = 0
        self.last_spooled = ""
        """Key of the newest spooled line: the last work that came to anything."""
        disk.append(NAME, b"")
        whole = torn = 0
        for line in disk.lines(NAME):
            if line.endswith(b"\n"):
                whole += len(line)
            else:
                torn = len(line)
        if torn:
            disk.truncate(NAME, whole)
        self.size_bytes = whole

    def facts_of(self, keys: Iterable[str]) -> dict[str, set[str]]:
        """What the ledger says of each of `keys`, in the order in which they were spooled.

        Keys without such a line come last: they are the newest. Finds `last_spooled` on the way.
        """
        unknown = {key: set[str]() for key in keys}
        known: dict[str, set[str]] = {}
        for line in self._disk.lines(NAME):
            try:
                fact = msgspec.json.decode(line, type=Fact)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                continue
            if fact.what == "spooled":
                self.last_spooled = fact.key
                if fact.key in unknown:
                    known[fact.key] = unknown.pop(fact.key)
            if (facts := known.get(fact.key, unknown.get(fact.key))) is not None:
                facts.add(fact.what)
        return {**known, **unknown}

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

    def sync(self) -> None:
        """What was written outlives a power cut."""
        self._disk.sync(NAME)

    def trim(self, held: Container[str]) -> None:
        """What is said of keys that are not `held` is gone, but for the newest spooled line.

        Raises:
            OSError: the disk is in the way; the ledger is as it was.
        """
        kept: list[bytes] = []
        newest = b""
        for line in self._disk.lines(NAME):
            try:
                fact = msgspec.json.decode(line, type=Fact)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                continue
            if fact.key in held:
                kept.append(line)
            elif fact.what == "spooled" and fact.key == self.last_spooled:
                newest = line
        data = b"".join([*kept, newest])  # last: that is how it is found
        self._disk.write(BESIDE, data)
        self._disk.sync(BESIDE)
        self._disk.rename(BESIDE, NAME)
        self._disk.sync()
        self.size_bytes = len(data)

    def _append(self, fact: Fact) -> None:
        line = msgspec.json.encode(fact) + b"\n"
        self._disk.append(NAME, line)
        self.size_bytes += len(line)


def _sum(update: SubmitUpdate) -> int | None:
    """Sum of an update's int32 differences; None where it has none."""
    if isinstance(update.result, EvaluateResult):
        return None
    numbers = array.array("i", update.result.differences)
    if sys.byteorder == "big":
        numbers.byteswap()
    return sum(numbers)
