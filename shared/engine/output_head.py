"""From final states to losses, and back: the output matrix's rows, with theta's part in them.

Rows are read a run at a time, so that a large vocabulary is never all float32 at once. Shapes: s
sites, c rows that losses are over, r adapted rows, E the model's width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.engine.block_weights import BlockWeights
from shared.engine.model import Adaptation

Floats = NDArray[np.float32]

_ONE = np.float32(1.0)


@dataclass(frozen=True, slots=True)
class Head:
    """What the output rows say of s sites, (s,) each."""

    normaliser: NDArray[np.float64]
    losses: NDArray[np.float64]
    right: NDArray[np.bool_]


class OutputHead:
    """The rows that losses are over: those of `choices`, tokens, or all."""

    def __init__(
        self, weights: BlockWeights, adaptation: Adaptation, choices: NDArray[np.int64] | None
    ) -> None:
        self._weights = weights
        self._adaptation = adaptation
        self._choices = choices
        self._numbers = [
            number for number, block in enumerate(adaptation.blocks) if block.kind == "output_rows"
        ]

    def losses(self, states: Floats, targets: NDArray[np.int64], values: Floats) -> Head:
        """Losses of s sites with final `states` (s, E) and `targets` (s,)."""
        largest = np.full(len(states), -np.inf)
        total, at_target = np.zeros(len(states)), np.zeros(len(states))
        for low, rows in self._output(values):
            logits = states @ rows.T
            top = np.maximum(largest, logits.max(axis=1))
            here = np.flatnonzero((targets >= low) & (targets < low + len(rows)))
            at_target[here] = logits[here, targets[here] - low]
            logits -= top[:, None].astype(np.float32)
            np.exp(logits, out=logits)
            total = total * np.exp(largest - top)
            total += logits.sum(axis=1, dtype=np.float64)
            largest = top
        normaliser = np.log(total) + largest
        return Head(normaliser, normaliser - at_target, at_target >= largest)

    def slopes(
        self, states: Floats, targets: NDArray[np.int64], values: Floats, head: Head
    ) -> tuple[Floats, NDArray[np.float64]]:
        """The slopes of the states, (s, E), and of the adapted rows, (r, E)."""
        back = np.zeros_like(states)
        adapted = self._places()
        found = np.zeros((len(adapted), states.shape[1]))
        normaliser = head.normaliser[:, None].astype(np.float32)
        for low, rows in self._output(values):
            shares = states @ rows.T
            shares -= normaliser
            np.exp(shares, out=shares)
            here = np.flatnonzero((targets >= low) & (targets < low + len(rows)))
            shares[here, targets[here] - low] -= _ONE
            back += shares @ rows
            inside = np.flatnonzero((adapted >= low) & (adapted < low + len(rows)))
            found[inside] = shares[:, adapted[inside] - low].T @ states
        return back, found

    def _places(self) -> NDArray[np.int64]:
        """Where each adapted row stands among those that losses are over; -1: it does not."""
        adapted = self._adaptation.output_rows
        if self._choices is None:
            return adapted
        places = {token: place for place, token in enumerate(self._choices.tolist())}
        return np.array([places.get(row, -1) for row in adapted.tolist()], np.int64)

    def _output(self, values: Floats) -> Iterator[tuple[int, Floats]]:
        """The rows that losses are over, with theta's part, a run at a time: (c, E)."""
        adapted = self._places()
        parts = [self._adaptation.part(number, values) for number in self._numbers]
        deltas = np.concatenate(parts) if parts else values[:0]
        for low, rows in self._weights.output(self._choices):
            inside = np.flatnonzero((adapted >= low) & (adapted < low + len(rows)))
            if len(inside):
                rows = rows.copy()
                rows[adapted[inside] - low] += deltas[inside]
            yield low, rows
