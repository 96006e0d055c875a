"""Rows as the tensors of torch: the very tokens that the engine sends, padded at the right.

Nothing attends to what comes after it, so padding needs no mask: its own states are never read.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shared.dataset import Row
from shared.dataset.records import Record
from shared.dataset.rows import Meaning
from shared.engine.examples import choice_tokens, example
from shared.engine.llama import Vocabulary
from shared.engine.model import Example
from shared.engine.native import load, native, start
from tests.bench.learn.tasks import LearnTask


@dataclass(frozen=True, slots=True)
class Tokens:
    """A task as tokens."""

    devices: dict[str, list[Example]]
    heldout: list[Example]
    choices: list[int]
    """The token of each label; empty where the whole vocabulary is predicted."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples side by side: n rows of up to t tokens, m positions that are read."""

    tokens: Tensor
    """(n, t) int64."""
    rows: Tensor
    """(m,) int64: the row of each position."""
    positions: Tensor
    """(m,) int64"""
    targets: Tensor
    """(m,) int64: an index of the choices, or a token."""
    forward_tokens: int
    """Without the padding."""


def tokens_of(task: LearnTask) -> Tokens:
    """All rows of `task`, by the engine's own tokenizer and the device's own rules."""
    start()
    model = load(str(task.model()), vocabulary_only=True)
    vocabulary = Vocabulary(model)
    meaning = Meaning(task.task)

    def of(rows: Sequence[dict[str, str]]) -> list[Example]:
        return [
            example(found, task.task, vocabulary)
            for row in rows
            for found in meaning.rows(Record(1, json.dumps(row).encode()))
            if isinstance(found, Row)
        ]

    tokens = Tokens(
        devices={name: of(rows) for name, rows in task.devices.items()},
        heldout=of(task.heldout),
        choices=choice_tokens(task.task, vocabulary) if task.task.loss == "choices" else [],
    )
    native.llama_model_free(model)
    return tokens


def batch(examples: Sequence[Example]) -> Batch:
    """`examples` in order."""
    lengths = [len(one.tokens) for one in examples]
    tokens = np.zeros((len(examples), max(lengths)), np.int64)
    for row, one in enumerate(examples):
        tokens[row, : len(one.tokens)] = one.tokens
    reads = [len(one.targets) for one in examples]
    positions = [np.arange(n - m, n) for n, m in zip(lengths, reads, strict=True)]
    return Batch(
        tokens=torch.from_numpy(tokens),
        rows=torch.from_numpy(np.repeat(np.arange(len(examples)), reads)),
        positions=torch.from_numpy(np.concatenate(positions)),
        targets=torch.from_numpy(
            np.concatenate([one.targets for one in examples]).astype(np.int64)
        ),
        forward_tokens=sum(lengths),
    )


def in_order(examples: Sequence[Example], size: int) -> list[Batch]:
    """All `examples` in batches of `size`, the shortest first."""
    ranked = sorted(examples, key=lambda one: len(one.tokens))
    return [batch(ranked[low : low + size]) for low in range(0, len(ranked), size)]


def side_by_side(
    devices: Sequence[Sequence[Example]], size: int, steps: int, random: np.random.Generator
) -> list[Batch]:
    """`steps` batches, each of `size` random rows of every device, one device after the other.

    No row comes twice unless its device has too few. Rows of like length come together.
    """
    drawn: list[list[Example]] = []
    for examples in devices:
        chosen = np.resize(random.permutation(len(examples)), size * steps).tolist()
        drawn.append(sorted((examples[n] for n in chosen), key=lambda one: len(one.tokens)))
    return [
        batch([one for examples in drawn for one in examples[step * size : (step + 1) * size]])
        for step in random.permutation(steps).tolist()
    ]
