"""From one position's logits to the next token, in numpy. Pure.

The order: logit bias and penalties, temperature, top-k, top-p, min-p. A request has its own
generator, Philox keyed by its seed, and draws once a token: what else is computed beside it changes
nothing but, through the kernels' batch layout, the last bits of the logits. Penalties count what
has been written, not the prompt.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]

_CANDIDATES = 1024
"""Top-p sorts only so many tokens where they are enough."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a request wants its tokens chosen; temperature 0 takes the likeliest."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: all."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict[int, float])


class Sampler:
    """One answer's choices."""

    def __init__(self, sampling: Sampling, seed: int, stream: int = 0) -> None:
        """`stream` tells the answers to one request apart."""
        self._sampling = sampling
        key = np.array([seed % 2**64, stream], np.uint64)
        self._random = np.random.Generator(np.random.Philox(key=key))
        self._written: Counter[int] = Counter()

    def choose(self, logits: Logits) -> int:
        """The next token, given finite logits (n_vocab,)."""
        adjusted = self._adjusted(logits)
        if self._sampling.temperature == 0.0:
            token = int(adjusted.argmax())
        else:
            tokens, weights = candidates(adjusted, self._sampling)
            sums = np.cumsum(weights)
            place = int(np.searchsorted(sums, self._random.random() * sums[-1], side="right"))
            token = int(tokens[min(place, len(tokens) - 1)])
        self._written[token] += 1
        return token

    def _adjusted(self, logits: Logits) -> Logits:
        sampling = self._sampling
        penalised = (sampling.presence_penalty or sampling.frequency_penalty) and self._written
        if not sampling.bias and not penalised:
            return logits
        adjusted = logits.copy()
        for token, bias in sampling.bias.items():
            if 0 <= token < len(adjusted):
                adjusted[token] += np.float32(bias)
        if penalised:
            tokens = np.fromiter(self._written.keys(), np.int64)
            counts = np.fromiter(self._written.values(), np.float32)
            drop = sampling.presence_penalty + sampling.frequency_penalty * counts
            adjusted[tokens] -= drop.astype(np.float32)
        return adjusted


def candidates(logits: Logits, sampling: Sampling) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The tokens that may come next and their weights: (k,) each; weights need not sum to one.

    `temperature` is above 0. Of equal logits the smaller token is kept. They are in the order of
    the tokens: in that of their weights the last bit of a logit would deal the draws out anew.
    """
    largest = logits.max()
    weights = np.exp((logits - largest).astype(np.float64) / sampling.temperature)
    tokens = np.arange(len(logits))
    if 0 < sampling.top_k < len(tokens):
        tokens = _largest(logits, sampling.top_k)
        weights = weights[tokens]
    if sampling.top_p < 1.0:
        tokens, weights = _nucleus(tokens, weights, sampling.top_p)
    if sampling.min_p > 0.0:
        kept = weights >= sampling.min_p * weights.max()
        tokens, weights = tokens[kept], weights[kept]
    return tokens, weights


def _largest(values: Logits, count: int) -> NDArray[np.int64]:
    """The places of the `count` largest values, in ascending order."""
    border = np.partition(values, len(values) - count)[len(values) - count]
    above = np.flatnonzero(values > border)
    equal = np.flatnonzero(values == border)[: count - len(above)]
    return np.sort(np.concatenate([above, equal]))


def _nucleus(
    tokens: NDArray[np.int64], weights: NDArray[np.float64], top_p: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The smallest set of the likeliest tokens whose mass is at least `top_p` of the whole."""
    wanted = top_p * weights.sum()
    some = np.arange(len(tokens))
    if len(tokens) > _CANDIDATES:
        few = np.sort(np.argpartition(-weights, _CANDIDATES)[:_CANDIDATES])
        if weights[few].sum() >= wanted and weights[few].min() > 0:
            some = few
    order = some[np.argsort(-weights[some], kind="stable")]
    end = int(np.searchsorted(np.cumsum(weights[order]), wanted)) + 1
    kept = np.sort(order[:end])
    return tokens[kept], weights[kept]


def log_probabilities(logits: Logits) -> NDArray[np.float64]:
    """The model's own log-probabilities, before bias, penalties and temperature: (n_vocab,)."""
    shifted = logits.astype(np.float64) - float(logits.max())
    return shifted - np.log(np.exp(shifted).sum())


def top(values: NDArray[np.float64], count: int) -> list[int]:
    """The places of the `count` largest values, largest first."""
    if count <= 0:
        return []
    count = min(count, len(values))
    some = np.argpartition(-values, count - 1)[:count]
    return [int(place) for place in some[np.argsort(-values[some], kind="stable")]]
