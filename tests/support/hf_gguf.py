"""Random-weight models of the supported architectures, in transformers and as the same GGUF.

The weights are transformers'; the file is written by the rules of llama.cpp's converter: which
rows it reorders, what it adds to a norm. Importing this skips a test where torch or transformers
are absent.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support import tiny_gguf

torch: Any = pytest.importorskip("torch", reason="torch is not installed")
transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed")
torch.set_num_threads(1)

SHAPE = tiny_gguf.Shape()

_CONFIGS = {
    "llama": "LlamaConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "gemma3": "Gemma3TextConfig",
    "phi3": "Phi3Config",
}
_PLACES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GEMMA_PARTS = _PARTS | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


@dataclass(frozen=True)
class Twin:
    """One model, twice."""

    architecture: str
    hf: Any
    """Its transformers model: CPU, float32."""
    path: Path
    """The same weights as a GGUF file in F32."""


def twin(
    folder: Path,
    architecture: str,
    *,
    tied: bool = False,
    seed: int = 1,
    shape: tiny_gguf.Shape = SHAPE,
) -> Twin:
    """A random model in transformers, and its GGUF file in `folder`."""
    torch.manual_seed(seed)
    config = getattr(transformers, _CONFIGS[architecture])(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        attn_implementation="eager",
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        **_own(architecture, shape.head_width),
    )
    hf = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            offset = 1.0 if "norm" in name and architecture != "gemma3" else 0.0
            scale = 0.1 if weight.dim() == 1 else weight.shape[1] ** -0.5
            weight.copy_(offset + scale * torch.randn_like(weight))
    path = folder / f"{architecture}{'-tied' if tied else ''}.gguf"
    tiny_gguf.write(path, architecture, shape=shape, tied=tied, quantized=False)
    weights = {name: weight.numpy() for name, weight in hf.state_dict().items()}
    _fill(path, architecture, shape, weights)
    return Twin(architecture, hf, path)


def logits(model: Any, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """What a transformers or PEFT model says after each of `tokens` (n,): (n, n_vocab)."""
    with torch.no_grad():
        found = model(torch.tensor(tokens, dtype=torch.long)[None]).logits[0]
    return found.float().numpy()


def _own(architecture: str, head: int) -> dict[str, Any]:
    match architecture:
        case "gemma3":
            return {"head_dim": head, "query_pre_attn_scalar": head, "sliding_window": 128}
        case "qwen3" | "llama":
            return {"head_dim": head}
        case _:
            return {}


def _fill(
    path: Path, architecture: str, shape: tiny_gguf.Shape, weights: dict[str, NDArray[np.float32]]
) -> None:
    """Every tensor of the file at `path` is that of `weights`, as the converter would write it."""
    named = {_gguf_name(architecture, name): name for name in weights}
    for tensor in gguf.GGUFReader(path, "r+").tensors:
        name = named[tensor.name]
        weight = weights[name]
        if architecture == "llama" and "self_attn.q_proj" in name:
            weight = interleaved(weight, shape.heads)
        if architecture == "llama" and "self_attn.k_proj" in name:
            weight = interleaved(weight, shape.kv_heads)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            weight = weight + 1.0
        tensor.data[:] = weight.reshape(tensor.data.shape)


def _gguf_name(architecture: str, name: str) -> str:
    parts = _GEMMA_PARTS if architecture == "gemma3" else _PARTS
    module, _, suffix = name.rpartition(".")
    if module in _PLACES:
        return f"{_PLACES[module]}.{suffix}"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{parts[part]}.{suffix}"


def interleaved(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of rotated pairs that stand half a head apart in transformers, side by side."""
    rows = np.arange(len(weight)).reshape(heads, 2, -1).swapaxes(1, 2).ravel()
    return weight[rows]
