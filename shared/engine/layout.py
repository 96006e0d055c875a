"""Examples side by side in batches, each a sequence of its own.

The layout is a function of the examples alone. That matters: the same batch is bit-identical from
pass to pass, another place in the batch is not.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.engine.model import Example


@dataclass(frozen=True, slots=True)
class Batch:
    """What one decode is sent: n tokens, m of them to be read."""

    tokens: NDArray[np.int32]
    """(n,)"""
    positions: NDArray[np.int32]
    """(n,): within the token's sequence."""
    sequences: NDArray[np.int32]
    """(n,): which sequence the token belongs to."""
    read: NDArray[np.int8]
    """(n,): 1 where logits are wanted."""
    owners: NDArray[np.int64]
    """(m,): the example, counted over all batches, that each read position belongs to."""
    targets: NDArray[np.int64]
    """(m,)"""


def batches(
    examples: Sequence[Example], max_tokens: int, max_sequences: int, max_read: int
) -> list[Batch]:
    """`examples` in order, as many to a batch as fit.

    None may exceed `max_tokens`; one that alone is read at more than `max_read` positions gets a
    batch of its own.
    """
    packed: list[Batch] = []
    first = used = read = 0
    for number, example in enumerate(examples):
        used += len(example.tokens)
        read += len(example.targets)
        full = used > max_tokens or read > max_read or number - first == max_sequences
        if full and number > first:
            packed.append(_batch(examples, first, number))
            first, used, read = number, len(example.tokens), len(example.targets)
    if len(examples) > first:
        packed.append(_batch(examples, first, len(examples)))
    return packed


def _batch(examples: Sequence[Example], first: int, end: int) -> Batch:
    chosen = examples[first:end]
    lengths = np.array([len(example.tokens) for example in chosen])
    answers = np.array([len(example.targets) for example in chosen])
    positions = np.concatenate([np.arange(length) for length in lengths]).astype(np.int32)
    sequences = np.repeat(np.arange(len(chosen)), lengths).astype(np.int32)
    read = (positions >= (lengths - answers)[sequences]).astype(np.int8)
    return Batch(
        tokens=np.concatenate([example.tokens for example in chosen]),
        positions=positions,
        sequences=sequences,
        read=read,
        owners=first + np.repeat(np.arange(len(chosen)), answers),
        targets=np.concatenate([example.targets for example in chosen]).astype(np.int64),
    )
