"""The rows of a file or directory, and how many records it holds."""

import contextlib
import os
from collections.abc import Iterator

from shared.dataset.growing import KINDS, Growing
from shared.dataset.records import Record
from shared.dataset.rows import CheckTurn, Meaning, Refusal, Row, Turn, label_of, parsed
from shared.errors import EngineError
from shared.messages import Task

REFUSED_SHOWN = 20
"""So many refusals are kept in words; the rest are counted."""


class _FileRows:
    """The usable rows of one file, and its first refusals as `<file>:<line>: why`."""

    def __init__(self, path: str, meaning: Meaning, *, waits: bool) -> None:
        self._path = path
        self._meaning = meaning
        self._waits = waits
        self.forget()

    def forget(self) -> None:
        self._rows: list[Row | Turn] = []
        self._refused: list[str] = []
        self._refused_count = 0
        self.go_on()

    def go_on(self) -> None:
        self._last: list[Row | Turn] = []
        self._last_refused = ""

    def take(self, record: Record) -> None:
        try:
            rows = self._meaning.rows(record)
        except Refusal as refusal:
            why = f"{self._path}:{record.line}: {refusal}"
            if not record.whole:
                self._last_refused = "" if self._waits else why
                return
            self._refused_count += 1
            if len(self._refused) < REFUSED_SHOWN:
                self._refused.append(why)
        else:
            if record.whole:
                self._rows.extend(rows)
            else:
                self._last = rows

    def rows(self) -> Iterator[Row | Turn]:
        yield from self._rows
        yield from self._last

    @property
    def refused(self) -> list[str]:
        return [*self._refused, *filter(None, [self._last_refused])]

    @property
    def refused_count(self) -> int:
        return self._refused_count + bool(self._last_refused)


class Dataset:
    """The usable rows in the order of files and lines, and the first refusals.

    `rows` is replaced, never changed, so whoever holds it keeps what was there.
    """

    def __init__(self, path: str, task: Task, check: CheckTurn | None = None) -> None:
        """The rows as `task` wants them. A directory may be empty still, a file may not.

        Raises:
            EngineError: it cannot be read or holds nothing but refused rows, or the task
                contradicts itself; names the file or the field.
        """
        meaning = Meaning(task, check)
        self._files = Growing(path, lambda file, waits: _FileRows(file, meaning, waits=waits))
        self._collect()
        if not self.rows and (self.refused or not self._files.is_directory):
            first = f"; first: {self.refused[0]}" if self.refused else "; it is empty"
            raise EngineError(f"{path}: no usable row among {self.refused_rows}{first}")

    def refresh(self) -> None:
        """What has come, gone or changed since is in `rows`."""
        if self._files.look():
            self._collect()

    def require(self) -> None:
        """Raises EngineError where there is no row."""
        if not self.rows:
            raise EngineError(no_row_yet(self._files.path))

    def _collect(self) -> None:
        kept = self._files.kept
        self.rows = [row for file in kept for row in file.rows()]
        self.refused = [why for file in kept for why in file.refused][:REFUSED_SHOWN]
        self.refused_rows = sum(file.refused_count for file in kept)


class _FileLabels:
    """The labels that the rows of one file have, whatever the job."""

    def __init__(self, labels: set[str], at_most: int) -> None:
        self._labels = labels
        self._at_most = at_most

    def forget(self) -> None: ...

    def go_on(self) -> None: ...

    def take(self, record: Record) -> None:
        if len(self._labels) < self._at_most:
            with contextlib.suppress(Refusal):
                self._labels.update(filter(None, [label_of(parsed(record))]))


def labels_in(path: str, *, at_most: int) -> set[str]:
    """The labels of all rows, or `at_most` of them.

    Raises:
        EngineError: `path` cannot be read.
    """
    labels: set[str] = set()
    Growing(path, lambda _, __: _FileLabels(labels, at_most))
    return labels


class _FileCount:
    """How many records one file holds, usable or not."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.count = self._last = 0

    def go_on(self) -> None:
        self.count -= self._last
        self._last = 0

    def take(self, record: Record) -> None:
        self.count += 1
        self._last = int(not record.whole)


class Counted:
    """How many records a file or directory holds, without looking into them."""

    def __init__(self, path: str) -> None:
        """Raises EngineError where it cannot be read."""
        self._files = Growing(path, lambda _, __: _FileCount())

    @property
    def is_directory(self) -> bool:
        return self._files.is_directory

    @property
    def records(self) -> int:
        return sum(file.count for file in self._files.kept)

    def look(self) -> bool:
        """Count what is new; whether anything has changed."""
        return self._files.look()


def no_row_yet(path: str) -> str:
    """What a device says that waits for its data."""
    mend = f"; put {KINDS} there (.gz as well)" if os.path.isdir(path) else ""
    return f"no usable row yet in {path}{mend}"
