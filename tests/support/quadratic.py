"""An engine whose loss is a quadratic of theta: what is best for each row is known.

A row's loss is |theta - c|^2 / 2 + 1, its c the sum of its words' random vectors; so the mean loss
of a batch is least at the mean of its c, and its slope along z is exactly <theta - mean, z>.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from shared.engine.block_sites import BlockSites
from shared.engine.fake import Words
from shared.engine.last_block import LastBlock
from shared.engine.model import Adaptation, Example, Losses, Sites
from shared.engine.protocol import Facts
from shared.errors import EngineError

VOCABULARY = 256


def centre(example: Example, d: int) -> NDArray[np.float64]:
    """What theta a row wants: (d,)."""
    return _table(d)[example.tokens].sum(axis=0)


@cache
def _table(d: int) -> NDArray[np.float64]:
    return np.random.default_rng(5).normal(0, 0.2, (VOCABULARY, d))


class QuadraticModel(Words):
    def __init__(self, blocks: Adaptation) -> None:
        super().__init__(VOCABULARY)
        self._d = blocks.offsets[-1]
        self._values = np.zeros(self._d)
        self.forwarded = 0

    def choose_among(self, tokens: list[int]) -> None:
        """The loss has no choices."""

    def stand(self, values: NDArray[np.float32]) -> None:
        self._values = values.astype(np.float64)

    def parts(self, examples: Sequence[Example]) -> list[slice]:
        return [slice(0, len(examples))]

    def measure(self, examples: Sequence[Example]) -> Losses:
        self.forwarded += len(examples)
        away = [self._values - centre(example, self._d) for example in examples]
        loss = np.array([float(each @ each) / 2 + 1 for each in away])
        ones = np.ones(len(examples), np.int64)
        return Losses(loss, ones, ones > 0)

    def sites(self, examples: Sequence[Example]) -> list[Sites]:
        raise NotImplementedError

    def last_block(self) -> LastBlock:
        raise EngineError("this model has no blocks; use how: probe")

    def block_sites(self, examples: Sequence[Example], block: LastBlock) -> list[BlockSites]:
        raise NotImplementedError

    def close(self) -> None:
        """Nothing is held."""


class QuadraticEngine:
    """Opens the same model whatever the path."""

    def inspect(self, path: str, words: list[str], template: str, prompt: str = "") -> Facts:
        raise NotImplementedError

    def open(self, path: str, blocks: Adaptation, threads: int, max_tokens: int) -> QuadraticModel:
        return QuadraticModel(blocks)
