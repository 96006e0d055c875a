"""What the last block sees of examples: kept one by one, and worked on side by side.

Shapes: B examples, n positions, m sites an example, E the model's width, H heads over K pairs of
key and value, of width D.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.engine.block_weights import BlockWeights
from shared.engine.model import Losses

Floats = NDArray[np.float32]

_AT_ONCE = 1 << 18
"""Entries of a batch's largest arrays inside the block: 1 MB each."""


@dataclass(frozen=True, slots=True)
class BlockSites:
    """One example as the last block sees it, theta's part in the block aside."""

    entering: NDArray[np.float16]
    """(n, E): what keys and values are made of, after the norm."""
    keys: NDArray[np.float16]
    """(n, K D): before norm and rotation."""
    values: NDArray[np.float16]
    """(n, K D)"""
    queries: NDArray[np.float16]
    """(m, H D): before norm and rotation."""
    stream: Floats
    """(m, E): the residual stream that enters."""
    beside: NDArray[np.float16]
    """(m, E): what the engine's final state has beside ours at theta = 0: kernels' rounding."""
    targets: NDArray[np.int32]
    """(m,): as in Example."""

    @property
    def size_bytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in self.__slots__)


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples of similar length, padded at their ends; sites are the last m true positions."""

    entering: Floats
    keys: Floats
    values: Floats
    queries: Floats
    stream: Floats
    beside: Floats
    at: NDArray[np.int64]
    """(B, m): each site's position; -1 where there is none."""
    targets: NDArray[np.int64]
    """(B, m)"""

    @property
    def real(self) -> NDArray[np.bool_]:
        """(B, m): which sites there are."""
        return self.at >= 0


def groups(sites: Sequence[BlockSites], weights: BlockWeights) -> list[NDArray[np.int64]]:
    """Which examples go together: of similar length, and so many that memory bears them."""
    lengths = np.array([len(one.keys) for one in sites])
    counts = np.array([len(one.targets) for one in sites])
    entries = lengths * (weights.width + weights.pairs * counts * weights.group)
    entries += counts * weights.inner_width
    order = np.lexsort((counts, lengths))
    groups: list[NDArray[np.int64]] = []
    first, most = 0, 0
    for last, number in enumerate(order.tolist()):
        most = max(most, int(entries[number]))
        if most * (last - first + 1) > _AT_ONCE and last > first:
            groups.append(order[first:last])
            first, most = last, int(entries[number])
    return [*groups, order[first:]] if len(order) else []


def batch(sites: Sequence[BlockSites]) -> Batch:
    """The examples side by side."""
    lengths = np.array([len(one.keys) for one in sites])
    counts = np.array([len(one.targets) for one in sites])
    n, m = int(lengths.max()), int(counts.max())
    steps = np.arange(m)
    at = np.where(steps < counts[:, None], (lengths - counts)[:, None] + steps, -1)
    targets = np.zeros((len(sites), m), np.int64)
    for row, one in zip(targets, sites, strict=True):
        row[: len(one.targets)] = one.targets
    return Batch(
        *(
            _padded([getattr(one, name) for one in sites], n)
            for name in ("entering", "keys", "values")
        ),
        *(
            _padded([getattr(one, name) for one in sites], m)
            for name in ("queries", "stream", "beside")
        ),
        at=at,
        targets=targets,
    )


@dataclass(frozen=True, slots=True)
class Told:
    """Losses of examples as they are found, a group at a time."""

    loss: NDArray[np.float64]
    weight: NDArray[np.int64]
    right: NDArray[np.bool_]

    @classmethod
    def of(cls, sites: Sequence[BlockSites]) -> "Told":
        weight = np.array([len(one.targets) for one in sites], np.int64)
        return cls(np.zeros(len(sites)), weight, np.ones(len(sites), np.bool_))

    def take(
        self,
        chosen: NDArray[np.int64],
        batch: Batch,
        losses: NDArray[np.float64],
        right: NDArray[np.bool_],
    ) -> None:
        owners = chosen[np.nonzero(batch.real)[0]]
        np.add.at(self.loss, owners, losses)
        np.logical_and.at(self.right, owners, right)

    def losses(self) -> Losses:
        return Losses(self.loss, self.weight, self.right)


def _padded(parts: Sequence[NDArray[np.floating]], size: int) -> Floats:
    """(B, size, d) float32, zero beyond each part's (n, d)."""
    found = np.zeros((len(parts), size, parts[0].shape[1]), np.float32)
    for row, part in zip(found, parts, strict=True):
        row[: len(part)] = part
    return found
