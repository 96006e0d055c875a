"""What Hugging Face's models call a GGUF's matrices, and in which order they keep their rows.

Source: llama.cpp's converter, whose renaming and reordering this undoes. Of the architectures here
only llama's queries and keys are reordered: it rotates neighbouring rows, transformers rows half a
head apart.
"""

import re

import numpy as np
from numpy.typing import NDArray

from services.console.failure import Failure
from shared.engine.fitting import OUTPUT
from shared.engine.gguf_file import Header

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
_ROTATED = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}


def module(architecture: str, tensor: str) -> str | None:
    """The module of a causal language model that `tensor` is the weight of; None: it has none."""
    if tensor == OUTPUT:
        return "lm_head"
    found = _IN_LAYER.match(tensor)
    part = (_FUSED if architecture == "phi3" else _MODULES).get(found[2]) if found else None
    return f"model.layers.{found[1]}.{part}" if found and part else None


def in_their_order(header: Header, tensor: str, b: NDArray[np.float32]) -> NDArray[np.float32]:
    """The rows of `b` (d_out, rank), which are those of `tensor`, as Hugging Face keeps them.

    Raises:
        Failure: the model's heads do not divide its rows.
    """
    found = _IN_LAYER.match(tensor)
    if header.architecture != "llama" or not found or found[2] not in _ROTATED:
        return b
    heads = int(header.number(_ROTATED[found[2]]) or header.number("attention.head_count"))
    if not heads or len(b) % (2 * heads):
        raise Failure(f"{tensor} has {len(b)} rows and {heads} heads: no llama that we know")
    rows = np.arange(len(b)).reshape(heads, -1, 2).swapaxes(1, 2).ravel()
    return b[rows]
