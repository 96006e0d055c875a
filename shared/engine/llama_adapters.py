"""An adapter's numbers in a llama.cpp context: one LoRA and one control vector, rewritten whole.

What is moved is rewritten whole: theta +- eps z goes into one LoRA that is loaded anew for each
pass, not into a second one stacked on theta's with a scale of either sign. Measured in CPU time,
by turns, rank 8 on q and v, 512 tokens a pass, medians (quartiles) of rewriting over stacking: 0.92
(0.90-0.94) on llama-3m, 60 pairs; 0.95 (0.89-1.02) on a 118 MB model, d = 98,304, 16 pairs.
"""

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.engine.fitting import OUTPUT
from shared.engine.gguf_file import Header, LoraFile, Matrix
from shared.engine.model import Adaptation
from shared.engine.native import native, pointer, reason
from shared.errors import EngineError


class Lora:
    """The manifest's LoRA and output-row blocks as one adapter of the context."""

    def __init__(self, model: Any, context: Any, header: Header, blocks: Adaptation) -> None:
        self._model = model
        self._context = context
        self._blocks = blocks
        self._columns: dict[str, list[int]] = {}
        for number, block in enumerate(blocks.blocks):
            if block.kind == "lora_b":
                self._columns.setdefault(block.tensor, []).append(number)
        self._row_blocks = [n for n, b in enumerate(blocks.blocks) if b.kind == "output_rows"]
        self._tied = OUTPUT not in header.tensors
        self._architecture = header.architecture
        self._file: LoraFile | None = None
        self._loaded: Any = None

    def set(self, values: NDArray[np.float32]) -> None:
        """Carry `values` (d,); nothing is in the model's way while its blocks are all zero."""
        parts = {number: self._blocks.part(number, values) for number in self._numbers()}
        if self._loaded is None and not any(part.any() for part in parts.values()):
            return
        if self._row_blocks and self._tied and any(parts[n].any() for n in self._row_blocks):
            raise EngineError(
                "the model ties its output to its embeddings, so llama.cpp cannot probe output "
                f"rows; use how: exact, or a GGUF with its own {OUTPUT}"
            )
        if self._file is None:
            self._file = LoraFile(self._architecture, self._fresh(parts))
        for name, numbers in self._columns.items():
            columns = np.stack([parts[number] for number in numbers], axis=1)
            self._file.write(f"{name}.lora_b", columns)
        if self._carries_rows:
            rows = np.concatenate([parts[number] for number in self._row_blocks])
            self._file.write(f"{OUTPUT}.lora_a", rows)
        self._load(self._file.path)

    def close(self) -> None:
        self._unload()
        if self._file is not None:
            self._file.close()

    @property
    def _carries_rows(self) -> bool:
        return bool(self._row_blocks) and not self._tied

    def _numbers(self) -> list[int]:
        columns = [number for numbers in self._columns.values() for number in numbers]
        return [*columns, *self._row_blocks]

    def _fresh(self, parts: dict[int, NDArray[np.float32]]) -> list[Matrix]:
        """All tensors of the adapter: what stays, and room for what is rewritten."""
        tensors: list[Matrix] = []
        for name, numbers in self._columns.items():
            fixed = np.stack([self._blocks.fixed_a(number) for number in numbers])
            tensors.append((f"{name}.lora_a", fixed))
            outs = len(parts[numbers[0]])
            tensors.append((f"{name}.lora_b", np.zeros((outs, len(numbers)), np.float32)))
        if self._carries_rows:
            rows = self._blocks.output_rows
            width = parts[self._row_blocks[0]].shape[1]
            tensors.append((f"{OUTPUT}.lora_a", np.zeros((len(rows), width), np.float32)))
            size = native.llama_vocab_n_tokens(native.llama_model_get_vocab(self._model))
            selector = np.zeros((size, len(rows)), np.float32)
            selector[rows, np.arange(len(rows))] = 1.0
            tensors.append((f"{OUTPUT}.lora_b", selector))
        return tensors

    def _load(self, path: str) -> None:
        self._unload()
        loaded = native.llama_adapter_lora_init(self._model, path.encode())
        if not loaded:
            raise EngineError(f"llama.cpp cannot carry the adapter: {reason()}")
        self._loaded = loaded
        adapters = (native.llama_adapter_lora_p_ctypes * 1)(loaded)
        native.llama_set_adapters_lora(self._context, adapters, 1, (ctypes.c_float * 1)(1.0))

    def _unload(self) -> None:
        if self._loaded is not None:
            native.llama_set_adapters_lora(self._context, None, 0, None)
            native.llama_adapter_lora_free(self._loaded)
            self._loaded = None


class Control:
    """The manifest's control vectors in the context."""

    def __init__(self, context: Any, model: Any, blocks: Adaptation) -> None:
        self._context = context
        self._blocks = blocks
        self._numbers = [n for n, block in enumerate(blocks.blocks) if block.kind == "control"]
        layers = int(native.llama_model_n_layer(model))
        width = int(native.llama_model_n_embd(model))
        self._vectors = np.zeros((layers - 1, width), np.float32)
        """Of layers 1 and up: (n_layer - 1, n_embd)."""
        self._set = False

    def set(self, values: NDArray[np.float32]) -> None:
        """Carry `values` (d,); nothing is in the model's way while its blocks are all zero."""
        parts = {number: self._blocks.part(number, values) for number in self._numbers}
        if not parts or not (self._set or any(part.any() for part in parts.values())):
            return
        layers = {number: self._blocks.blocks[number].layer for number in parts}
        self._vectors[:] = 0.0
        for number, part in parts.items():
            self._vectors[layers[number] - 1] += part
        code = native.llama_set_adapter_cvec(
            self._context,
            pointer(self._vectors, ctypes.c_float),
            self._vectors.size,
            self._vectors.shape[1],
            min(layers.values()),
            max(layers.values()),
        )
        if code:
            raise EngineError(f"llama.cpp cannot carry the control vector: {reason()}")
        self._set = True
