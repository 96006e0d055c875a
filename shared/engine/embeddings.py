"""A model's token embeddings, read from its file: what the first layer sees of each token.

llama.cpp takes embeddings in place of tokens, and gives the same logits bit for bit; only Gemma's
scale, which it applies to tokens alone, is ours to apply.
"""

import numpy as np
from numpy.typing import NDArray

from shared.engine.gguf_file import Header
from shared.engine.weights import Weights

TABLE = "token_embd.weight"
_SCALED = ("gemma3",)
"""Architectures that multiply a token's embedding by the root of its width."""


class Embeddings:
    """Looks tokens up; the file's pages come into memory as they are asked for."""

    def __init__(self, path: str, header: Header) -> None:
        self._weights = Weights(path, header)
        self.width = header.tensors[TABLE][0]
        scaled = header.architecture in _SCALED
        self._scale = np.sqrt(np.float32(self.width)) if scaled else np.float32(1.0)

    def rows(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """(n,) -> (n, n_embd) float32."""
        return self._weights.chosen(TABLE, tokens) * self._scale


def rms(rows: NDArray[np.float32]) -> float:
    """Root mean square of all entries."""
    return float(np.sqrt(np.square(rows, dtype=np.float64).mean()))
