"""Build the demo's private text from the documentation strings of the running interpreter.

    python -m deploy.demo.build_data --out DIR [--labels shuffled] [--seed N]

writes DIR/devices/device-1.jsonl ... device-8.jsonl and DIR/heldout.jsonl with rows
`{"text": ..., "label": ...}`; the label is the family of modules a paragraph comes from. The
library is parsed with `ast` and never imported, and the same interpreter and arguments give the
same bytes. Only the standard library is needed.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from deploy.demo.families import DEVICES, FAMILIES, HELD_OUT

MIN_CHARS = 60
MAX_CHARS = 400
MIN_LETTER_SHARE = 0.8
HELD_OUT_PER_FAMILY = 100

_BLANK_LINE = re.compile(r"\n\s*\n")
_CODE_MARKS = (
    ">>>",
    "...  ",
    "def ",
    "import ",
    "==",
    "= {",
    "= [",
    "= <",
    "();",
    "# ",
    "---",
    "___",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One paragraph and the family of the module it documents."""

    text: str
    label: str


def paragraphs(docstring: str) -> Iterator[str]:
    """Yield the prose paragraphs of a documentation string, white space normalised, clipped."""
    for block in _BLANK_LINE.split(docstring):
        text = " ".join(block.split())
        if len(text) >= MIN_CHARS and _is_prose(text):
            yield _clipped(text)


def _is_prose(text: str) -> bool:
    if any(mark in text for mark in _CODE_MARKS):
        return False
    letters = sum(character.isalpha() or character == " " for character in text)
    small = sum(character.islower() for character in text)
    return letters >= MIN_LETTER_SHARE * len(text) and small >= len(text) / 2


def _clipped(text: str) -> str:
    if len(text) <= MAX_CHARS:
        return text
    return text[: MAX_CHARS + 1].rsplit(" ", 1)[0][:MAX_CHARS]


def docstrings(source: str) -> Iterator[str]:
    """Yield the documentation strings of a module, its classes and functions, outermost first."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def module_files(library: Path, name: str) -> list[Path]:
    """Return the source files of a module or of all of a package, sorted.

    A module this interpreter does not ship (later versions drop some) has none.
    """
    base = library.joinpath(*name.split("."))
    if base.is_dir():
        return sorted(base.rglob("*.py"))
    file = base.with_suffix(".py")
    return [file] if file.is_file() else []


class Collector:
    """Turns modules into rows; a paragraph that occurred before never occurs again."""

    def __init__(self, library: Path) -> None:
        self._library = library
        self._seen: set[str] = set()

    def rows(self, family: str, modules: Iterable[str]) -> list[Row]:
        """Return the new paragraphs of these modules in source order."""
        found: list[Row] = []
        for name in modules:
            for file in module_files(self._library, name):
                for docstring in docstrings(file.read_text(encoding="utf-8")):
                    for text in paragraphs(docstring):
                        key = "".join(filter(str.isalnum, text.lower()))
                        if key not in self._seen:
                            self._seen.add(key)
                            found.append(Row(text, family))
        return found


@dataclass(frozen=True, slots=True)
class Dataset:
    """The rows of every device, and the held-out rows, equally many of each family."""

    devices: tuple[tuple[Row, ...], ...]
    held_out: tuple[Row, ...]


def collect(library: Path, seed: int) -> Dataset:
    """Return the demo's rows, the order within each file drawn from `seed`.

    Raises:
        ValueError: this library has too little documentation, as in a stripped installation.
    """
    collector = Collector(library)
    devices = [
        [row for family, names in held.items() for row in collector.rows(family, names)]
        for held in DEVICES
    ]
    # Held-out modules come second, so what a device also holds is never judged on.
    families = [collector.rows(family, HELD_OUT[family]) for family in FAMILIES]
    fewest = min(len(rows) for rows in families)
    if fewest < HELD_OUT_PER_FAMILY or not all(devices):
        raise ValueError(f"too few documentation strings in {library}: {fewest} held-out rows")
    rng = random.Random(seed)  # noqa: S311 - a repeatable order, no secret
    held_out = [row for rows in families for row in rng.sample(rows, HELD_OUT_PER_FAMILY)]
    for rows in (*devices, held_out):
        rng.shuffle(rows)
    return Dataset(tuple(tuple(rows) for rows in devices), tuple(held_out))


def with_shuffled_labels(dataset: Dataset, seed: int) -> Dataset:
    """Return the dataset with labels permuted over all device rows; held-out rows stay true."""
    labels = [row.label for rows in dataset.devices for row in rows]
    random.Random(seed + 1).shuffle(labels)  # noqa: S311 - repeatable, no secret
    take = iter(labels)
    devices = tuple(
        tuple(replace(row, label=next(take)) for row in rows) for rows in dataset.devices
    )
    return replace(dataset, devices=devices)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Leave one JSON object a line in `path`, in the given order."""
    lines = (json.dumps({"text": row.text, "label": row.label}) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def write(dataset: Dataset, out: Path) -> None:
    """Leave the whole dataset below `out`."""
    for number, rows in enumerate(dataset.devices, start=1):
        write_rows(out / "devices" / f"device-{number}.jsonl", rows)
    write_rows(out / "heldout.jsonl", dataset.held_out)


def _counts(rows: Sequence[Row]) -> str:
    by_family = {family: sum(row.label == family for row in rows) for family in FAMILIES}
    return "  ".join(f"{family} {count:4}" for family, count in by_family.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Build the data and print what each file holds; 1 if the library has too little text."""
    parser = argparse.ArgumentParser(prog="deploy.demo.build_data", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--labels", choices=("true", "shuffled"), default="true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    try:
        dataset = collect(Path(sysconfig.get_paths()["stdlib"]), arguments.seed)
    except ValueError as error:
        print(f"build_data: {error}", file=sys.stderr)
        return 1
    if arguments.labels == "shuffled":
        dataset = with_shuffled_labels(dataset, arguments.seed)
    write(dataset, arguments.out)
    for number, rows in enumerate(dataset.devices, start=1):
        print(f"device-{number}  {len(rows):4}  {_counts(rows)}")
    print(f"heldout   {len(dataset.held_out):4}  {_counts(dataset.held_out)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
