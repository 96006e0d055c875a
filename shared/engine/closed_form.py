"""Parameters whose slopes follow from one forward pass, whatever their number.

Either the output rows alone (`last_layer`) or the last block as well (`last_block`). What a row of
data costs the model is paid once: its sites are kept, and depend on deeper parameters alone.
"""

from collections.abc import Sequence
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from shared.engine import last_layer
from shared.engine.block_sites import BlockSites
from shared.engine.last_block import LastBlock
from shared.engine.model import Adaptation, Example, Losses, Model, Sites
from shared.errors import EngineError

Floats = NDArray[np.float32]


class Kept(Protocol):
    """What is kept of a row of data."""

    @property
    def size_bytes(self) -> int: ...


class ClosedForm(Protocol):
    """The closed form of some of a manifest's blocks."""

    @property
    def numbers(self) -> Sequence[int]:
        """Which blocks."""
        ...

    def sites(self, examples: Sequence[Example]) -> Sequence[Kept]:
        """One forward pass; those blocks must stand at zero.

        Raises:
            EngineError: the engine failed.
        """
        ...

    def losses(self, sites: Sequence[Kept], values: Floats) -> Losses:
        """Losses at theta = `values` (d,)."""
        ...

    def gradient(self, sites: Sequence[Kept], values: Floats) -> tuple[Losses, NDArray[np.float64]]:
        """Losses, and the gradient of their sum: (d,) float64, zero outside `numbers`."""
        ...


def closed_form(model: Model, adaptation: Adaptation) -> tuple[ClosedForm | None, str]:
    """The closed form of as many blocks of the manifest as there is one for, and why of no more.

    The reason names the mend; it is for whoever asks for more than there is.
    """
    why = "there is none for these blocks; use how: probe"
    lora = {block.tensor for block in adaptation.blocks if block.kind == "lora_b"}
    if lora:
        try:
            block = model.last_block()
        except EngineError as error:  # probes can do without
            why = str(error)
        else:
            if lora <= block.tensors and not _steered(adaptation, min(lora)):
                return _Block(model, block), why
    return (_Rows(model, adaptation) if len(adaptation.output_rows) else None), why


def _steered(adaptation: Adaptation, tensor: str) -> bool:
    """Whether there is a prompt, or a control vector behind the block that `tensor` lies in."""
    layer = int(tensor.split(".")[1])
    return any(
        block.kind == "prompt" or (block.kind == "control" and block.layer >= layer)
        for block in adaptation.blocks
    )


class _Rows:
    def __init__(self, model: Model, adaptation: Adaptation) -> None:
        self._model = model
        self._adaptation = adaptation
        self.numbers = [
            number for number, block in enumerate(adaptation.blocks) if block.kind == "output_rows"
        ]

    def sites(self, examples: Sequence[Example]) -> Sequence[Sites]:
        return self._model.sites(examples)

    def losses(self, sites: Sequence[Kept], values: Floats) -> Losses:
        return last_layer.losses(cast("Sequence[Sites]", sites), self._deltas(values))

    def gradient(self, sites: Sequence[Kept], values: Floats) -> tuple[Losses, NDArray[np.float64]]:
        deltas, held = self._deltas(values), cast("Sequence[Sites]", sites)
        rows = last_layer.gradient(held, deltas)
        offsets = self._adaptation.offsets
        whole = np.zeros(offsets[-1])
        done = 0
        for number in self.numbers:
            height = self._adaptation.blocks[number].shape[0]
            whole[offsets[number] : offsets[number + 1]] = rows[done : done + height].ravel()
            done += height
        return last_layer.losses(held, deltas), whole

    def _deltas(self, values: Floats) -> NDArray[np.float64]:
        """(r, n_embd), in the order of their blocks."""
        parts = [self._adaptation.part(number, values) for number in self.numbers]
        return np.concatenate(parts).astype(np.float64)


class _Block:
    def __init__(self, model: Model, block: LastBlock) -> None:
        self._model = model
        self._block = block
        self.numbers = block.numbers

    def sites(self, examples: Sequence[Example]) -> Sequence[BlockSites]:
        return self._model.block_sites(examples, self._block)

    def losses(self, sites: Sequence[Kept], values: Floats) -> Losses:
        return self._block.losses(cast("Sequence[BlockSites]", sites), values)

    def gradient(self, sites: Sequence[Kept], values: Floats) -> tuple[Losses, NDArray[np.float64]]:
        return self._block.gradient(cast("Sequence[BlockSites]", sites), values)
