"""The text the demo's model is pretrained on, never any of the demo's own.

Sources: documentation strings and comments of the running interpreter's standard library and its
language reference (`pydoc_data.topics`), and a corpus of public-domain children's books. Left out:
every module of the demo, its tests (`families.is_demo_path`), and any other paragraph that shares
`OVERLAP_WORDS` words in a row with a documentation string of a demo module.

Some paragraphs are repeated as topic rows, `<paragraph>\\nTopic: <module>`, so that the model
learns to gather what a paragraph is about in the state of the last prompt token.
"""

from __future__ import annotations

import ast
import gzip
import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from deploy.demo.build_data import MIN_CHARS, docstrings, module_files, paragraphs
from deploy.demo.families import demo_modules, is_demo_path

OVERLAP_WORDS = 8
END = "<|endoftext|>"

_NOT_PROSE = frozenset({"site-packages", "encodings", "lib2to3"})
_WORDS = re.compile(r"[a-z0-9]+")
_BLANK_LINE = re.compile(r"\n\s*\n")


@dataclass(frozen=True, slots=True)
class TopicRow:
    """A paragraph and the words that name where it comes from, e.g. `asyncio`, `locks`."""

    text: str
    topics: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LibraryText:
    """What the standard library says outside the demo's modules."""

    documents: list[str]
    rows: list[TopicRow]


def read_library(library: Path) -> LibraryText:
    """Return the library's documents, one a file or reference topic, and its topic rows."""
    demo_text = DemoText(library)
    documents: list[str] = []
    rows: dict[str, TopicRow] = {}
    for topics, blocks in _sources(library):
        kept = [block for block in blocks if not demo_text.overlaps(block)]
        if kept:
            documents.append("\n\n".join(kept))
        for block in kept:
            for text in paragraphs(block):
                rows.setdefault(text, TopicRow(text, topics))
    return LibraryText(documents, list(rows.values()))


def read_books(corpus: Path) -> list[str]:
    """Return the documents of `train.txt.gz` in a corpus folder."""
    with gzip.open(corpus / "train.txt.gz", "rt", encoding="utf-8") as file:
        return [text for document in file.read().split(END) if (text := document.strip())]


class DemoText:
    """Every run of `OVERLAP_WORDS` words in the demo modules' documentation."""

    def __init__(self, library: Path) -> None:
        files = (file for name in demo_modules() for file in module_files(library, name))
        sources = (file.read_text(encoding="utf-8") for file in files)
        self._runs = {run for source in sources for doc in docstrings(source) for run in _runs(doc)}

    def overlaps(self, text: str) -> bool:
        """Tell whether a text shares such a run."""
        return not self._runs.isdisjoint(_runs(text))


def _runs(text: str) -> Iterator[str]:
    words = _WORDS.findall(text.lower())
    for start in range(len(words) - OVERLAP_WORDS + 1):
        yield " ".join(words[start : start + OVERLAP_WORDS])


def _sources(library: Path) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Yield the topics and the text blocks of every file and reference topic outside the demo."""
    for file in sorted(library.rglob("*.py")):
        path = PurePosixPath(file.relative_to(library).as_posix())
        if is_demo_path(path) or not _NOT_PROSE.isdisjoint(path.parts):
            continue
        if path.match("pydoc_data/topics.py"):
            yield from _reference(file)
            continue
        try:
            source = file.read_text(encoding="utf-8")
            blocks = [*docstrings(source), *comments(source)]
        except (SyntaxError, UnicodeDecodeError, tokenize.TokenError):
            continue  # the tests contain files that are wrong on purpose
        yield _topics(path), [part for block in blocks for part in _BLANK_LINE.split(block)]


def _topics(path: PurePosixPath) -> tuple[str, ...]:
    """Return the words that name a file: its package and its module, without `test`."""
    names = [part.removesuffix(".py").removeprefix("test_").strip("_") for part in path.parts]
    words = [name for name in names if name not in {"test", "tests", "init", ""}]
    return (words[0], words[-1]) if words else ("test",)


def _reference(file: Path) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Yield the entries of the language reference, whose file is one literal dictionary."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if key is not None:
                    name, text = ast.literal_eval(key), ast.literal_eval(value)
                    if not is_demo_path(PurePosixPath(name)):
                        yield (name,), _BLANK_LINE.split(text)


def comments(source: str) -> Iterator[str]:
    """Yield the comments of a module, lines that follow each other joined."""
    block: list[str] = []
    last_line = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        if token.start[0] != last_line + 1:
            yield from _joined(block)
            block = []
        block.append(token.string.lstrip("#! ").rstrip())
        last_line = token.start[0]
    yield from _joined(block)


def _joined(lines: Iterable[str]) -> Iterator[str]:
    text = "\n".join(lines).strip()
    if len(text) >= MIN_CHARS:
        yield text
