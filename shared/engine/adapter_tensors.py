"""An adapter's numbers as the tensors that carry them: LoRA's A and B, and control vectors.

Pure numpy. The engine rewrites these in a context, the export writes them to files: what a device
measures and what leaves the fleet are the same arrays.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shared.engine.fitting import OUTPUT
from shared.engine.gguf_file import Header
from shared.engine.loras import Loras
from shared.engine.model import Adaptation

Kind = Literal["lora_a", "lora_b", "control", "output_rows", "prompt"]
Matrix = tuple[str, NDArray[np.float32]]
"""A tensor's name in the GGUF, with `.lora_a` or `.lora_b` behind it, and (d_out, d_in) float32."""


class LoraTensors:
    """The manifest's LoRA and output-row blocks as pairs of matrices, B A of which is added.

    Of a LoRA block A, (rank, d_in), is fixed unless it has blocks of its own, and B moves,
    (d_out, rank). Of output rows A is the rows themselves, (rows, n_embd), and B puts each in its
    place, (n_vocab, rows).
    """

    def __init__(self, header: Header, blocks: Adaptation, *, rows: bool = True) -> None:
        """Of the model in whose file `header` stands; output rows are left out unless `rows`."""
        self._blocks = blocks
        self._loras = Loras(blocks)
        self._rows = numbers(blocks, "output_rows") if rows else []
        self._vocabulary = header.tensors["token_embd.weight"][1]

    @property
    def names(self) -> list[str]:
        """The tensors of the model that are added to."""
        return [*self._loras.slots, *([OUTPUT] if self._rows else [])]

    def add_nothing(self, values: NDArray[np.float32]) -> bool:
        """Whether all that is added at `values` (d,) is zero."""
        added = [*self._rows, *numbers(self._blocks, "lora_b")]
        return not any(self._blocks.part(number, values).any() for number in added)

    def fixed(self) -> list[Matrix]:
        """The matrices that theta does not move."""
        still = np.zeros(self._blocks.offsets[-1], np.float32)
        found = [
            (f"{name}.lora_a", self._loras.a(name, still))
            for name, moving in self._loras.moving_a.items()
            if not moving
        ]
        if self._rows:
            rows = self._blocks.output_rows
            selector = np.zeros((self._vocabulary, len(rows)), np.float32)
            selector[rows, np.arange(len(rows))] = 1.0
            found.append((f"{OUTPUT}.lora_b", selector))
        return found

    def moving(self, values: NDArray[np.float32]) -> list[Matrix]:
        """The matrices that theta is, at `values` (d,)."""
        found: list[Matrix] = []
        for name, moving in self._loras.moving_a.items():
            found.append((f"{name}.lora_b", self._loras.b(name, values)))
            if moving:
                found.append((f"{name}.lora_a", self._loras.a(name, values)))
        if self._rows:
            rows = [self._blocks.part(number, values) for number in self._rows]
            found.append((f"{OUTPUT}.lora_a", np.concatenate(rows)))
        return found

    def pairs(
        self, values: NDArray[np.float32]
    ) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Each tensor's A (rank, d_in) and B (d_out, rank), at `values` (d,)."""
        found = dict([*self.fixed(), *self.moving(values)])
        return {name: (found[f"{name}.lora_a"], found[f"{name}.lora_b"]) for name in self.names}


def numbers(blocks: Adaptation, kind: Kind) -> list[int]:
    """Which blocks are of `kind`."""
    return [number for number, block in enumerate(blocks.blocks) if block.kind == kind]


def control_vectors(
    blocks: Adaptation, values: NDArray[np.float32]
) -> dict[int, NDArray[np.float32]]:
    """What is added after each layer that has a control block, at `values` (d,): (n_embd,)."""
    found: dict[int, NDArray[np.float32]] = {}
    for number in numbers(blocks, "control"):
        layer, part = blocks.blocks[number].layer, blocks.part(number, values)
        found[layer] = found[layer] + part if layer in found else part
    return found
