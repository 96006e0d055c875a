"""Records of a JSONL or CSV file, with their real lines, and where to go on when it has grown.

Knows no meaning: a record is the bytes of one JSON line, or the cells of one CSV record by column.
"""

import csv
import gzip
import zlib
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import IO, cast

COLUMNS = (frozenset({"text", "label"}), frozenset({"prompt", "completion"}))
"""A CSV file's header names all of one of these."""
SUFFIXES = (".jsonl", ".csv", ".tsv")
"""Of files in a directory; each may be followed by .gz."""

_KNOWN_COLUMNS = frozenset[str]().union(*COLUMNS)
_BOM = b"\xef\xbb\xbf"
_DELIMITERS = ",;\t"
_LARGEST_FIELD = 1 << 20
_LONGEST_LINE = 1 << 22
"""Bytes of a line, and of a CSV record of several; the rest of a longer one is passed over."""
_ENDLESS_LINE = 1 << 30
"""A line of more bytes has no end worth looking for: the rest of the file is passed over."""
_PASSED_AT_ONCE = 1 << 16
_MOST_LINES = 1 << 17
"""Of one CSV record."""
_CHANCES = 4
"""So many records that are too long are taken for a quote too many: the lines after their first are
read again, as rows of their own."""

csv.field_size_limit(_LARGEST_FIELD)


@dataclass(frozen=True, slots=True)
class Record:
    """What begins in `line`, counted from 1: a JSON line, cells by column, or why it is neither."""

    line: int
    content: bytes | dict[str, str] | None
    refusal: str = ""
    whole: bool = True
    """False for a last one without its newline: more of it may come."""


@dataclass(slots=True)
class Place:
    """Everything before byte `offset`, where `line` begins, has been read."""

    offset: int = 0
    line: int = 1
    header: tuple[str, ...] = ()
    delimiter: str = ""


def kind_of(path: str) -> str:
    """`.jsonl`, `.csv` or `.tsv`; a name that says nothing is read as JSONL."""
    suffix = PurePath(_plain_name(path)).suffix
    return suffix if suffix in SUFFIXES else ".jsonl"


def is_compressed(path: str) -> bool:
    return path.lower().endswith(".gz")


def opened(path: str) -> IO[bytes]:
    """The file's text as bytes, decompressed. A .gz can only be read from its beginning.

    Raises:
        OSError: it cannot be read.
    """
    if is_compressed(path):
        return cast("IO[bytes]", gzip.open(path, "rb"))
    return open(path, "rb")


def records(path: str, file: IO[bytes], place: Place, *, closed: bool) -> Iterator[Record]:
    """The records of `file` after `place`, which moves on with every record that is complete.

    A last record without its newline is yielded too, and `place` stays before it, so that it comes
    again. Where more may be written (not `closed`), that holds for a line of JSON only: half a CSV
    record cannot be told from a whole one.
    """
    if place.offset:
        file.seek(place.offset)
    lines = _lines(file)
    is_json = kind_of(path) == ".jsonl"
    found = _json(lines, place) if is_json else _csv(path, lines, place, closed)
    try:
        yield from found
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        if closed:
            yield Record(place.line, None, f"the rest is no gzip data: {error}")


@dataclass(frozen=True, slots=True)
class _Line:
    """`raw` is as much of a line of `size` bytes as is held; its newline is there if it has one."""

    raw: bytes
    size: int

    @property
    def whole(self) -> bool:
        return self.raw.endswith(b"\n")


def _lines(file: IO[bytes]) -> Iterator[_Line]:
    """The lines of a file; of one without an end no more is held than of the longest."""
    while raw := file.readline(_LONGEST_LINE):
        size = len(raw)
        if size == _LONGEST_LINE and not raw.endswith(b"\n"):
            rest = b"?"
            while rest and not rest.endswith(b"\n") and size <= _ENDLESS_LINE:
                rest = file.readline(_PASSED_AT_ONCE)
                size += len(rest)
            if size > len(raw):
                raw = raw[:-1] + (b"\n" if rest.endswith(b"\n") else b"?")
        yield _Line(raw, size)
        if size > _ENDLESS_LINE:
            return


def _json(lines: Iterator[_Line], place: Place) -> Iterator[Record]:
    for one in lines:
        line = place.line
        content = one.raw.removeprefix(_BOM) if not place.offset else one.raw
        if one.whole:
            place.offset += one.size
            place.line += 1
        if one.size > len(one.raw):
            yield Record(line, None, _too_long(one.size), one.whole)
        elif content.strip():
            yield Record(line, content, whole=one.whole)


def _too_long(size: int) -> str:
    endless = "; the rest of the file is not read" if size > _ENDLESS_LINE else ""
    return f"longer than {_LONGEST_LINE} bytes{endless}"


class _TooLong(Exception):
    """Why a CSV record is not waited for."""


class _Feed:
    """Raw lines for csv.reader: those of the record in hand are kept, to be given again."""

    def __init__(self, lines: Iterator[_Line]) -> None:
        self._lines = lines
        self._again: deque[_Line] = deque()
        self.taken: list[_Line] = []
        self.size = 0
        self.ended = False
        self.chances = _CHANCES

    def __iter__(self) -> Generator[str, None, None]:
        while one := self._again.popleft() if self._again else next(self._lines, None):
            self.taken.append(one)
            self.size += one.size
            if self.size > _LONGEST_LINE:
                raise _TooLong(_too_long(self.size))
            if len(self.taken) > _MOST_LINES:
                raise _TooLong(f"longer than {_MOST_LINES} lines; is there a quote too many?")
            yield one.raw.decode("utf-8", "surrogateescape")
        self.ended = True

    def begin(self) -> None:
        """The record in hand is done with."""
        self.taken.clear()
        self.size = 0

    def give_again(self) -> None:
        """All lines of the record in hand but its first come again."""
        self._again.extendleft(reversed(self.taken[1:]))
        del self.taken[1:]
        self.ended = False


def _csv(path: str, lines: Iterator[_Line], place: Place, closed: bool) -> Iterator[Record]:
    if not place.header:
        first = next(lines, None)
        if first is not None and first.size > len(first.raw):
            yield Record(1, None, f"its header is {_too_long(first.size)}", whole=False)
            return
        if first is None or not first.whole:
            return
        place.delimiter, place.header = _header(path, first.raw)
        place.offset, place.line = first.size, 2
    if not any(columns <= set(place.header) for columns in COLUMNS):
        if place.line == 2:
            yield Record(
                1, None, "its header names neither text and label nor prompt and completion"
            )
            place.line += 1
        return
    feed = _Feed(lines)
    reader = csv.reader(feed, delimiter=place.delimiter, strict=True)
    while True:
        feed.begin()
        try:
            cells, refusal = next(reader), ""
        except StopIteration:
            return
        except _TooLong as error:
            if feed.chances:  # each of its lines may begin another that is as long
                feed.chances -= 1
                feed.give_again()
            reader = csv.reader(feed, delimiter=place.delimiter, strict=True)
            cells, refusal = [], str(error)
        except csv.Error as error:
            if feed.ended and not closed:
                return
            feed.give_again()
            reader = csv.reader(feed, delimiter=place.delimiter, strict=True)
            cells, refusal = [], f"not CSV: {error}"
        line, whole = place.line, feed.taken[-1].whole
        if not whole and not closed:
            return
        if whole:
            place.offset += sum(one.size for one in feed.taken)
            place.line += len(feed.taken)
        if refusal:
            yield Record(line, None, refusal, whole)
        elif cells:
            content, refusal = _by_column(cells, place.header)
            yield Record(line, content, refusal, whole)


def _by_column(cells: list[str], header: tuple[str, ...]) -> tuple[dict[str, str] | None, str]:
    """The cells of the columns that we know, or why there are none."""
    if len(cells) != len(header):
        return None, f"it has {len(cells)} cells, the header {len(header)}"
    known = {name: cell for name, cell in zip(header, cells, strict=True) if name in _KNOWN_COLUMNS}
    try:
        "".join(known.values()).encode()
    except UnicodeEncodeError:
        return None, "it holds bytes that are not UTF-8"
    return known, ""


def _header(path: str, first: bytes) -> tuple[str, tuple[str, ...]]:
    """The delimiter and the columns' names: whichever delimiter yields columns that we know."""
    text = first.removeprefix(_BOM).decode("utf-8", "surrogateescape")
    tried = ("",)
    for delimiter in "\t" if kind_of(path) == ".tsv" else _DELIMITERS:
        try:
            cells = next(csv.reader([text], delimiter=delimiter), [])
        except csv.Error:
            continue
        names = tuple(name.strip().lower() for name in cells)
        if any(columns <= set(names) for columns in COLUMNS):
            return delimiter, names
        tried = max(tried, names, key=len)
    return ",", tried


def _plain_name(path: str) -> str:
    return path.lower().removesuffix(".gz")
