"""Loss and gradient of the output rows in closed form, from one forward pass.

A site is a position where a token is predicted: with h its hidden state, u its base logits of the
adapted rows and D the rows' deltas, the adapted logits are u + D h, all others stay, and
loss = log-sum-exp - target logit; its gradient with respect to D is (softmax - one-hot) h^T.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shared.engine.model import Losses, Sites


def losses(examples: Sequence[Sites], deltas: NDArray[np.float64]) -> Losses:
    """Losses of the examples with their output rows moved by `deltas` (r, n_embd) float64."""
    _, normaliser, target_logit, largest = _at(examples, deltas)
    owner = _owners(examples)
    count = len(examples)
    loss = np.bincount(owner, normaliser - target_logit, count).astype(np.float64)
    wrong = np.bincount(owner, target_logit < largest, count)
    return Losses(loss, np.bincount(owner, minlength=count).astype(np.int64), wrong == 0)


def gradient(examples: Sequence[Sites], deltas: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gradient of the examples' summed loss with respect to `deltas`: (r, n_embd) float64."""
    logits, normaliser, _, _ = _at(examples, deltas)
    slopes = np.exp(logits - normaliser[:, None])
    target = np.concatenate([sites.target for sites in examples])
    adapted = np.flatnonzero(target >= 0)
    slopes[adapted, target[adapted]] -= 1.0
    return slopes.T @ _hidden(examples)


def _at(
    examples: Sequence[Sites], deltas: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Adapted logits (m, r), log-sum-exp, target logit and largest logit (m,), over all sites."""
    logits = np.concatenate([sites.rows for sites in examples]) + _hidden(examples) @ deltas.T
    rest = np.concatenate([sites.rest for sites in examples])
    rest_max = np.concatenate([sites.rest_max for sites in examples])
    target = np.concatenate([sites.target for sites in examples])
    target_logit = np.concatenate([sites.target_logit for sites in examples])
    adapted = np.flatnonzero(target >= 0)
    target_logit[adapted] = logits[adapted, target[adapted]]
    largest = np.maximum(rest_max, logits.max(axis=1))
    inside = np.exp(logits - largest[:, None]).sum(axis=1) + np.exp(rest - largest)
    return logits, largest + np.log(inside), target_logit, largest


def _hidden(examples: Sequence[Sites]) -> NDArray[np.float64]:
    return np.concatenate([sites.hidden for sites in examples]).astype(np.float64)


def _owners(examples: Sequence[Sites]) -> NDArray[np.int64]:
    counts = [len(sites.target) for sites in examples]
    return np.repeat(np.arange(len(examples)), counts)
