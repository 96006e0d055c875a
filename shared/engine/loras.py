"""The LoRA blocks of a manifest as what they are: A and B of each tensor, at some theta."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.engine.model import Adaptation

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Lora:
    """What is added to a matrix is B A: A (r, d_in) and B (d_out, r)."""

    a: Floats
    b: Floats


class Loras:
    """B moves; of A those rows do that have a block of their own."""

    def __init__(self, blocks: Adaptation) -> None:
        self._blocks = blocks
        self.slots: dict[str, list[int]] = {}
        """By tensor, its blocks of B in the order of their slots."""
        moving: dict[tuple[str, int], int] = {}
        for number, block in enumerate(blocks.blocks):
            if block.kind == "lora_b":
                self.slots.setdefault(block.tensor, []).append(number)
            elif block.kind == "lora_a":
                moving[block.tensor, block.slot] = number
        self.moving_a: dict[str, dict[int, int]] = {
            tensor: {
                row: moving[key]
                for row, number in enumerate(slots)
                if (key := (tensor, blocks.blocks[number].slot)) in moving
            }
            for tensor, slots in self.slots.items()
        }
        """By tensor and row of A, the block that moves it."""
        self._fixed: dict[str, Floats] = {}

    def a(self, tensor: str, values: Floats) -> Floats:
        """A of `tensor` at `values` (d,): (r, d_in)."""
        if tensor not in self._fixed:
            rows = [self._blocks.fixed_a(number) for number in self.slots[tensor]]
            self._fixed[tensor] = np.stack(rows)
        a = self._fixed[tensor]
        if moving := self.moving_a[tensor]:
            a = a.copy()
            for row, number in moving.items():
                a[row] += self._blocks.part(number, values)
        return a

    def b(self, tensor: str, values: Floats) -> Floats:
        """B of `tensor` at `values` (d,): (d_out, r)."""
        columns = [self._blocks.part(number, values) for number in self.slots[tensor]]
        return np.stack(columns, axis=1)

    def at(self, tensor: str, values: Floats) -> Lora:
        return Lora(self.a(tensor, values), self.b(tensor, values))
