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

from shared.engine.adapter_tensors import LoraTensors, Matrix, control_vectors, numbers
from shared.engine.fitting import OUTPUT
from shared.engine.gguf_file import Header, LoraFile
from shared.engine.model import Adaptation
from shared.engine.native import native, pointer, reason, wide_vectors
from shared.errors import EngineError

_WIDE = 16
"""With AVX-512 llama.cpp multiplies F32 matrices fast if the inner dimension is a multiple of it.

Rank 8 with zeros up to 16, CPU time: llama-3m 0.96, a 118 MB model 0.98.
"""


class Lora:
    """The manifest's LoRA and output-row blocks as one adapter of the context."""

    def __init__(self, model: Any, context: Any, header: Header, blocks: Adaptation) -> None:
        self._model = model
        self._context = context
        self._blocks = blocks
        tied = OUTPUT not in header.tensors
        self._tensors = LoraTensors(header, blocks, rows=not tied)
        self._fixed_rows = numbers(blocks, "output_rows") if tied else []
        self._architecture = header.architecture
        self._wide = wide_vectors()
        self._file: LoraFile | None = None
        self._loaded: Any = None

    def set(self, values: NDArray[np.float32]) -> None:
        """Carry `values` (d,); nothing is in the model's way while its blocks are all zero."""
        if any(self._blocks.part(number, values).any() for number in self._fixed_rows):
            raise EngineError(
                "the model ties its output to its embeddings, so llama.cpp cannot probe output "
                f"rows; use how: exact, or a GGUF with its own {OUTPUT}"
            )
        if self._loaded is None and self._tensors.add_nothing(values):
            return
        moving = self._filled(self._tensors.moving(values))
        if self._file is None:
            self._file = LoraFile(
                self._architecture, [*self._filled(self._tensors.fixed()), *moving]
            )
        else:
            for name, matrix in moving:
                self._file.write(name, matrix)
        self._load(self._file.path)

    def _filled(self, matrices: list[Matrix]) -> list[Matrix]:
        """The same with zeros up to a rank that is multiplied fast."""
        if not self._wide:
            return matrices
        filled: list[Matrix] = []
        for name, matrix in matrices:
            axis = 0 if name.endswith(".lora_a") else 1
            more = [(0, 0), (0, 0)]
            if not name.startswith(OUTPUT):  # a whole vocabulary of zeros is no gain
                more[axis] = (0, -matrix.shape[axis] % _WIDE)
            filled.append((name, np.pad(matrix, more)))
        return filled

    def close(self) -> None:
        self._unload()
        if self._file is not None:
            self._file.close()

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
        layers = int(native.llama_model_n_layer(model))
        width = int(native.llama_model_n_embd(model))
        self._vectors = np.zeros((layers - 1, width), np.float32)
        """Of layers 1 and up: (n_layer - 1, n_embd)."""
        self._set = False

    def set(self, values: NDArray[np.float32]) -> None:
        """Carry `values` (d,); nothing is in the model's way while its blocks are all zero."""
        vectors = control_vectors(self._blocks, values)
        if not vectors or not (self._set or any(part.any() for part in vectors.values())):
            return
        self._vectors[:] = 0.0
        for layer, vector in vectors.items():
            self._vectors[layer - 1] = vector
        code = native.llama_set_adapter_cvec(
            self._context,
            pointer(self._vectors, ctypes.c_float),
            self._vectors.size,
            self._vectors.shape[1],
            min(vectors),
            max(vectors),
        )
        if code:
            raise EngineError(f"llama.cpp cannot carry the control vector: {reason()}")
        self._set = True
