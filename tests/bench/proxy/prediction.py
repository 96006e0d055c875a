"""What speculation should gain, from what is measured of the models alone.

With b the share of tokens that the tuned small model would have drafted right, g drafts a pass and
costs in seconds by tokens of a pass (L of the large model, M of the small), a pass brings

    E(g) = (1 - b^(g+1)) / (1 - b)                         (Leviathan et al. 2023, eq. 1)

tokens for L(g + 1) + M(g + 1) + (g + 1) M(1), the plain ensemble one for L(1) + 2 M(1); the best g
is taken. Nothing is added for what is done beside the models.
"""

import time
from collections.abc import Sequence as Several
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from services.proxy_inference.batching import Forget, Plan, Schedule, Sequence
from services.proxy_inference.generation import Generation, Weights
from services.proxy_inference.shelf import ModelFile
from services.proxy_inference.speaking import Room
from shared.adapter import Adapter

SIZES = tuple(range(1, 10))
TURNS = 15
MOST_DRAFTS = max(SIZES) - 1
ROOM = Room(cells=1024, lanes=2, threads=1)


@dataclass(frozen=True)
class Measured:
    """Medians, in seconds by tokens of a pass, and the acceptance at alpha 1."""

    large: dict[int, float]
    base: dict[int, float]
    tuned: dict[int, float]
    greedy: float
    """b where the likeliest token is taken: how often both name the same."""
    sampled: float
    """b at temperature 1: 1 - TV(p, q)."""

    @property
    def c(self) -> float:
        return (self.base[1] + self.tuned[1]) / 2 / self.large[1]

    def v(self, size: int) -> float:
        """A pass of the large model of `size` tokens, in passes of one."""
        return self.large[size] / self.large[1]

    def gain(self, b: float) -> tuple[float, int]:
        """Over the plain ensemble, and with how many drafts."""
        plain = self.large[1] + self.base[1] + self.tuned[1]
        gains = [
            (sum(b**k for k in range(g + 1)) * plain / self._cycle(g), g)
            for g in range(MOST_DRAFTS + 1)
        ]
        return max(gains)

    def _cycle(self, g: int) -> float:
        if not g:
            return self.large[1] + self.base[1] + self.tuned[1]
        return self.large[g + 1] + self.base[g + 1] + (g + 1) * self.tuned[1]


class _Context:
    """One model with one text in its cache."""

    def __init__(self, weights: Weights, adapter: Adapter | None) -> None:
        self.generation = Generation(weights, adapter, ROOM)
        self._held = 0

    def read(self, tokens: Several[int]) -> NDArray[np.float32]:
        """Logits after each of the tokens; they follow what is held, and are held."""
        plan = self._plan(tokens)
        rows = self.generation.decode(plan)
        self._held += len(tokens)
        return rows

    def timed(self, size: int) -> float:
        """Seconds of a pass of `size` tokens; they are forgotten."""
        plan = self._plan([5] * size)
        began = time.perf_counter()
        self.generation.decode(plan)
        seconds = time.perf_counter() - began
        self.generation.decode(Plan([Forget(0, self._held)]))
        return seconds

    def clear(self) -> None:
        self.generation.clear()
        self._held = 0

    def _plan(self, tokens: Several[int]) -> Plan:
        schedule = Schedule(lanes=1, cells=ROOM.cells, batch_tokens=512, most_reads=512)
        sequence = Sequence([5] * self._held + list(tokens), read_from=self._held)
        schedule.add(sequence)
        plan = schedule.next()
        sequence.fed = self._held
        count = len(tokens)
        share = plan.shares[0]
        plan.shares = [type(share)(sequence, count, count)]
        return plan


def measured(
    large: Path, small: Path, adapter: Adapter, prompts: Several[str], tokens: int
) -> Measured:
    """Costs after a prompt and half an answer, and acceptance along greedy answers of `tokens`."""
    large_weights = Weights(ModelFile(large, "large"), tuned=False)
    small_weights = Weights(ModelFile(small, "small"))
    contexts = [
        _Context(large_weights, None),
        _Context(small_weights, None),
        _Context(small_weights, adapter),
    ]
    cut = small_weights.vocabulary.tokenize
    b = [_acceptance(contexts, cut(prompt, start=True), tokens) for prompt in prompts]
    curves = _curves(contexts, len(cut(prompts[0], start=True)) + tokens // 2)
    for context in contexts:
        context.generation.close()
    for weights in (large_weights, small_weights):
        weights.close()
    greedy, sampled = np.mean(b, axis=0).tolist()
    return Measured(curves[0], curves[1], curves[2], greedy, sampled)


def _curves(contexts: Several[_Context], held: int) -> list[dict[int, float]]:
    """By turns, as in service: each finds the processor's caches full of another's weights."""
    times = [{size: list[float]() for size in SIZES} for _ in contexts]
    for context in contexts:
        context.clear()
        context.read([5] * held)
    for _ in range(TURNS):
        for size in SIZES:
            for context, mine in zip(contexts, times, strict=True):
                mine[size].append(context.timed(size))
    return [{size: float(np.median(all_)) for size, all_ in mine.items()} for mine in times]


def _acceptance(contexts: Several[_Context], prompt: list[int], tokens: int) -> tuple[float, float]:
    """Of the tuned model's drafts, along one greedy answer of the ensemble."""
    for context in contexts:
        context.clear()
    said, same, overlap = prompt, 0, 0.0
    for _ in range(tokens):
        large, base, tuned = (context.read(said)[-1].astype(np.float64) for context in contexts)
        ensemble = large + tuned - base
        ensemble[0] = tuned[0] = -np.inf  # as the requests are: no answer ends before its length
        same += int(ensemble.argmax() == tuned.argmax())
        overlap += float(np.minimum(_shares(ensemble), _shares(tuned)).sum())
        said = [int(ensemble.argmax())]
    return same / tokens, overlap / tokens


def _shares(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()
