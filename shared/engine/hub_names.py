"""What Hugging Face's models call a GGUF's matrices, and in which order they keep their rows.

Source: llama.cpp's converter, whose renaming and reordering this undoes. Of the architectures here
only llama's queries and keys are reordered: it rotates neighbouring rows, transformers rows half a
head apart.
"""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.engine.fitting import OUTPUT
from shared.errors import EngineError

_MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FUSED = {
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_IN_LAYER = re.compile(r"^blk\.(\d+)\.(\w+)\.weight$")


@dataclass(frozen=True, slots=True)
class Heads:
    """A model's attention heads, and those that have keys of their own; 0: as many."""

    queries: int
    keys: int

    def of(self, part: str) -> int:
        """How many heads the rows of matrix `part` are; 0 where it is not rotated."""
        return {"attn_q": self.queries, "attn_k": self.keys or self.queries}.get(part, 0)


def module(architecture: str, tensor: str) -> str | None:
    """The module of a causal language model that `tensor` is the weight of; None: it has none."""
    if tensor == OUTPUT:
        return "lm_head"
    found = _IN_LAYER.match(tensor)
    part = (_FUSED if architecture == "phi3" else _MODULES).get(found[2]) if found else None
    return f"model.layers.{found[1]}.{part}" if found and part else None


def their_rows(architecture: str, tensor: str, heads: Heads, count: int) -> NDArray[np.int64]:
    """Which of a GGUF tensor's `count` rows Hugging Face keeps at each place: (count,).

    Raises:
        EngineError: the model's heads do not divide its rows.
    """
    rows = np.arange(count)
    found = _IN_LAYER.match(tensor)
    part = found[2] if found else ""
    if architecture != "llama" or part not in ("attn_q", "attn_k"):
        return rows
    number = heads.of(part)
    if not number or count % (2 * number):
        raise EngineError(f"{tensor} has {count} rows and {number} heads: no llama that we know")
    return rows.reshape(number, -1, 2).swapaxes(1, 2).ravel()
