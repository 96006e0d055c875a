"""Public rows as tokens: the fixed texts on which the teacher is heard.

A row is what a device's row is. Where the job tells labels apart, a row may also be a text without
one: the teacher is heard on it, and there is no right answer to learn.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.dataset import Refusal, Row, Turn, split_template
from shared.dataset.records import Place, Record, opened, records
from shared.dataset.rows import Meaning, parsed
from shared.engine.examples import choice_tokens, example
from shared.engine.model import Example, Tokenizer
from shared.errors import EngineError
from shared.messages import Task

UNKNOWN = -1
"""The target of a row without an answer."""


@dataclass(frozen=True)
class Public:
    """Examples, and the tokens that stand for the labels; none where all tokens are predicted."""

    examples: Sequence[Example]
    choices: tuple[int, ...] = ()

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """The first position of each example, and how many there are: (n + 1,)."""
        return np.cumsum([0, *(len(one.targets) for one in self.examples)])

    @cached_property
    def targets(self) -> NDArray[np.int64]:
        """(m,): what followed at each position that is read; an index of the choices, or a token"""
        found = np.concatenate([one.targets for one in self.examples])
        return found.astype(np.int64)

    @property
    def tokens(self) -> int:
        """How many are sent to read them all once."""
        return sum(len(one.tokens) for one in self.examples)

    @property
    def answered(self) -> bool:
        """Whether any of them has a right answer."""
        return bool((self.targets != UNKNOWN).any())

    @cached_property
    def digest(self) -> str:
        """Of the tokens themselves."""
        sha = hashlib.sha256(repr(self.choices).encode())
        for one in self.examples:
            sha.update(f"{len(one.tokens)} {len(one.targets)} ".encode())
            sha.update(one.tokens.astype("<i4").tobytes())
            sha.update(one.targets.astype("<i4").tobytes())
        return sha.hexdigest()

    def split(self, share: float, seed: int) -> tuple["Public", "Public"]:
        """All but a random `share` of them, and that share; one at least on each side."""
        order = np.random.default_rng([seed, 3]).permutation(len(self.examples)).tolist()
        held = min(max(round(share * len(order)), 1), len(order) - 1)
        return self._some(sorted(order[held:])), self._some(sorted(order[:held]))

    def _some(self, numbers: Sequence[int]) -> "Public":
        return Public([self.examples[number] for number in numbers], self.choices)


def read(path: Path, task: Task, tokenizer: Tokenizer, most: int) -> Public:
    """The first `most` usable rows of a file, as `tokenizer` and the job's task make them tokens.

    Raises:
        EngineError: it cannot be read, or a row cannot be used; names the line.
    """
    meaning = Meaning(task)
    found: list[Example] = []
    try:
        with opened(str(path)) as file:
            for record in records(str(path), file, Place(), closed=True):
                try:
                    rows = _rows(record, task, meaning)
                except Refusal as refusal:
                    raise EngineError(f"{path}:{record.line}: {refusal}") from refusal
                found.extend(example(row, task, tokenizer) for row in rows)
                if len(found) >= most:
                    break
    except OSError as error:
        raise EngineError(f"{path}: cannot be read: {error.strerror}") from error
    if len(found) < 2:
        raise EngineError(f"{path}: {len(found)} usable rows; at least two are needed")
    choices = choice_tokens(task, tokenizer) if task.loss == "choices" else []
    return Public(found[:most], tuple(choices))


def _rows(record: Record, task: Task, meaning: Meaning) -> list[Row | Turn]:
    fields = parsed(record)
    text = fields.get("text")
    if task.loss == "choices" and fields.get("label") is None and isinstance(text, str):
        if not text.strip():
            raise Refusal("field text is empty")
        head, tail = split_template(task.template)
        return [Row(head, text, tail, "", UNKNOWN)]
    return meaning.rows(record)
