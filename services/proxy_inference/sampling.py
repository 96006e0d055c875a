"""From one position's logits to the next token, in numpy. Pure.

The order: logit bias and penalties, temperature, top-k, top-p, min-p. A request has its own
generator, Philox keyed by its seed, and draws once a token: what else is computed beside it changes
nothing but, through the kernels' batch layout, the last bits of the logits. Penalties count what
has been written, not the prompt.

A draft is a token that a small model proposes. `choose` takes it or another one so that the choice
is distributed as it would be without drafts (speculative sampling, Leviathan et al. 2023): with
p the shares by the logits and q those that the draft was drawn by, it is taken with probability
min(1, p/q), and in its place comes a draw from max(0, p - q). How much is drafted hangs on what it
costs at the time, so an answer whose request names a seed is written without, to be repeatable.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]

_CANDIDATES = 1024
"""Top-p sorts only so many tokens where they are enough."""
_FAR = np.float32(60.0)
"""Nats: a token so far below another has no probability, and float32 still holds the sum."""
_NOTHING: Counter[int] = Counter()


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


_NO_TOKENS = np.empty(0, np.int64)
_NO_SHARES = np.empty(0)


@dataclass(frozen=True, slots=True)
class Draft:
    """A proposed token."""

    token: int
    sure: float
    """The drafting model's own probability, before filters and temperature, of what it would draw
    most likely. Whether a draft is sent hangs on this alone: did it hang on the token that was
    drawn, those that are sent would no longer be distributed by `shares`."""
    tokens: NDArray[np.int64] = field(default_factory=lambda: _NO_TOKENS)
    shares: NDArray[np.float64] = field(default_factory=lambda: _NO_SHARES)
    """q: the candidates it was drawn from and the probability of each; none where the likeliest
    is taken."""


class Sampler:
    """One answer's choices."""

    def __init__(
        self, sampling: Sampling, seed: int, stream: int = 0, *, repeats: bool = False
    ) -> None:
        """`stream` tells the answers to one request apart; `repeats`: whoever gives this seed again
        expects the same answer."""
        self._sampling = sampling
        self._repeats = repeats
        self._key = np.array([seed % 2**64, stream], np.uint64)
        self._random = np.random.Generator(np.random.Philox(key=self._key))
        self._drafting: np.random.Generator | None = None
        self._written: Counter[int] = Counter()

    @property
    def sampling(self) -> Sampling:
        return self._sampling

    def seed(self) -> int:
        """For a next token that is drawn elsewhere: 31 bits of this answer's own."""
        start = np.array([self._written.total(), 0, 0, 2], np.uint64)
        return int(np.random.Philox(key=self._key, counter=start).random_raw()) >> 33

    @property
    def drafts(self) -> bool:
        """Whether drafts may be taken."""
        return self.greedy or not self._repeats

    @property
    def penalises(self) -> bool:
        """Whether what has been written matters."""
        return bool(self._sampling.presence_penalty or self._sampling.frequency_penalty)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self._sampling.temperature == 0.0

    def choose(self, logits: Logits, draft: Draft | None = None) -> int:
        """The next token, given finite logits (n_vocab,), and maybe what a small model proposes."""
        adjusted = self._adjusted(logits, self._written)
        if self.greedy:
            token = int(adjusted.argmax())
        else:
            tokens, weights = candidates(adjusted, self._sampling)
            if draft is None:
                token = _drawn(tokens, weights, self._random)
            else:
                token = _verified(tokens, weights, draft, self._random)
        self._written[token] += 1
        return token

    def drafter(self) -> "Drafter":
        """Proposes what may come next; it draws from numbers of its own."""
        if self._drafting is None:
            start = np.array([0, 0, 0, 1], np.uint64)
            self._drafting = np.random.Generator(np.random.Philox(key=self._key, counter=start))
        return Drafter(self, self._drafting)

    def propose(self, logits: Logits, written: Counter[int], random: np.random.Generator) -> Draft:
        """A draft by a small model's logits (n_vocab,), after `written`."""
        adjusted = self._adjusted(logits, written)
        if self.greedy:
            token = int(adjusted.argmax())
            return Draft(token, probability(logits, token), _NO_TOKENS, _NO_SHARES)
        tokens, weights = candidates(adjusted, self._sampling)
        sure = probability(logits, int(logits.argmax()))
        return Draft(_drawn(tokens, weights, random), sure, tokens, weights / weights.sum())

    def chance(self, logits: Logits, draft: Draft) -> float:
        """About how likely `choose` would take the draft: filters and penalties left aside."""
        if self.greedy:
            return float(int(logits.argmax()) == draft.token)
        temperature = np.float32(self._sampling.temperature)
        share = probability(logits / temperature, draft.token)
        place = int(np.searchsorted(draft.tokens, draft.token))
        return min(1.0, share / max(float(draft.shares[place]), 1e-12))

    def _adjusted(self, logits: Logits, written: Counter[int]) -> Logits:
        sampling = self._sampling
        penalised = self.penalises and written
        if not sampling.bias and not penalised:
            return logits
        adjusted = logits.copy()
        for token, bias in sampling.bias.items():
            if 0 <= token < len(adjusted):
                adjusted[token] += np.float32(bias)
        if penalised:
            tokens = np.fromiter(written.keys(), np.int64)
            counts = np.fromiter(written.values(), np.float32)
            drop = sampling.presence_penalty + sampling.frequency_penalty * counts
            adjusted[tokens] -= drop.astype(np.float32)
        return adjusted

    @property
    def written(self) -> Counter[int]:
        """How often each token was chosen so far; a copy."""
        return self._written.copy()


class Drafter:
    """Proposes one token after the other, as if each had been taken."""

    def __init__(self, sampler: Sampler, random: np.random.Generator) -> None:
        self.sampler = sampler
        self._random = random
        self._written = sampler.written if sampler.penalises else None

    def propose(self, logits: Logits) -> Draft:
        written = self._written
        if written is None:
            return self.sampler.propose(logits, _NOTHING, self._random)
        draft = self.sampler.propose(logits, written, self._random)
        written[draft.token] += 1
        return draft


def _drawn(
    tokens: NDArray[np.int64], weights: NDArray[np.float64], random: np.random.Generator
) -> int:
    sums = np.cumsum(weights)
    place = int(np.searchsorted(sums, random.random() * sums[-1], side="right"))
    return int(tokens[min(place, len(tokens) - 1)])


def _verified(
    tokens: NDArray[np.int64],
    weights: NDArray[np.float64],
    draft: Draft,
    random: np.random.Generator,
) -> int:
    """The draft, or a draw from what the candidates have beyond the draft's own."""
    shares = weights / weights.sum()
    theirs = _at(draft.tokens, draft.shares, tokens)
    p = _at(tokens, shares, np.array([draft.token]))[0]
    q = _at(draft.tokens, draft.shares, np.array([draft.token]))[0]
    if random.random() * q < p:
        return draft.token
    rest = np.maximum(shares - theirs, 0.0)
    return _drawn(tokens, rest, random) if rest.any() else draft.token


def _at(
    tokens: NDArray[np.int64], shares: NDArray[np.float64], wanted: NDArray[np.int64]
) -> NDArray[np.float64]:
    """The shares of the `wanted` tokens, 0 of those that are not among `tokens` (ascending)."""
    places = np.minimum(np.searchsorted(tokens, wanted), len(tokens) - 1)
    return np.where(tokens[places] == wanted, shares[places], 0.0)


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


def probability(logits: Logits, token: int) -> float:
    """Of one token, by the softmax of the logits (n_vocab,)."""
    above = logits - logits[token]
    np.minimum(above, _FAR, out=above)
    np.exp(above, out=above)
    return 1.0 / float(above.sum())


def top(values: NDArray[np.float64], count: int) -> list[int]:
    """The places of the `count` largest values, largest first."""
    if count <= 0:
        return []
    count = min(count, len(values))
    some = np.argpartition(-values, count - 1)[:count]
    return [int(place) for place in some[np.argsort(-values[some], kind="stable")]]
