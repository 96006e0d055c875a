"""Examples side by side in batches, each a sequence of its own.

The layout is a function of the examples alone. That matters: the same batch is bit-identical from
pass to pass, another place in the batch is not.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

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
    tokens = [len(example.tokens) for example in examples]
    reads = [len(example.targets) for example in examples]
    runs = packed([(tokens, max_tokens), (reads, max_read)], max_sequences)
    return [_batch(examples, first, end) for first, end in runs]


def packed(limits: list[tuple[list[int], int]], most: int) -> Iterator[tuple[int, int]]:
    """Runs [first, end) of at most `most`, whose sizes come to no more than each limit.

    One that alone is larger has a run of its own.
    """
    sums = [list(accumulate(sizes, initial=0)) for sizes, _ in limits]
    count = len(sums[0]) - 1
    first = 0
    for number in range(1, count + 1):
        full = number == count or number + 1 - first > most
        if full or any(
            upto[number + 1] - upto[first] > limit
            for upto, (_, limit) in zip(sums, limits, strict=True)
        ):
            yield first, number
            first = number


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
