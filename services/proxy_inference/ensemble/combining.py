"""Three models' logits as one: what proxy-tuning adds to a large model. Pure."""

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]


def steer(large: Rows, tuned: Rows, base: Rows, alpha: float) -> None:
    """Add alpha (tuned - base) to `large`, in place: rows (m, n_vocab).

    Raw logits (proxy-tuning, Liu et al. 2024, eq. 1): what is constant over the vocabulary cancels
    in the softmax. A tokenizer's padding beyond the narrowest model is left as it is.
    """
    width = min(large.shape[1], tuned.shape[1], base.shape[1])
    moved = tuned[:, :width] - base[:, :width]
    if alpha != 1.0:
        moved *= np.float32(alpha)
    part = large[:, :width]
    np.add(part, moved, out=part)


def divergence(logits: Rows, other: Rows) -> float:
    """KL(p || q) in nats of the softmax of two rows (n_vocab,)."""
    width = min(len(logits), len(other))
    p, q = _logs(logits[:width]), _logs(other[:width])
    return max(float((np.exp(p) * (p - q)).sum()), 0.0)


def _logs(row: Rows) -> NDArray[np.float64]:
    shifted = row.astype(np.float64) - float(row.max())
    return shifted - np.log(np.exp(shifted).sum())
