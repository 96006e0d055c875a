"""Random-weight GGUF files of the supported architectures, for tests and benchmarks.

Small enough to be written in milliseconds, and loaded by llama.cpp like any other: only the weights
mean nothing. The tokenizer is byte-level BPE with a handful of merges.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import gguf
import numpy as np
from numpy.typing import NDArray

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3", "phi3")
MERGES = ["Ġ a", "Ġ b", "Ġ t", "h e", "Ġt he", "i n", "e r"]


@dataclass(frozen=True)
class Shape:
    """How large a model is. Widths must be multiples of 32, for Q8_0."""

    width: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    feed_forward: int = 96
    vocabulary: int = 320
    context: int = 1024
    head: int = 0
    """Width of a head; 0: width / heads."""
    by_layer: bool = False
    """The header tells `kv_heads` for each layer."""

    @property
    def head_width(self) -> int:
        return self.head or self.width // self.heads


def write(
    path: Path,
    architecture: str = "llama",
    *,
    shape: Shape = Shape(),
    tied: bool = False,
    quantized: bool = True,
    plus: Mapping[str, NDArray[np.float32]] = MappingProxyType({}),
    also: Mapping[str, NDArray[np.float32]] = MappingProxyType({}),
    entries: Mapping[str, str | float] = MappingProxyType({}),
    seed: int = 1,
    controls: Sequence[str] = (),
    chat_template: str = "",
) -> Path:
    """A GGUF file at `path`: matrices in Q8_0, or in F32 where not `quantized`.

    The matrices in `plus` are added to those of the same name; `also` are further tensors, in F32,
    and `entries` further texts and numbers of the header. `controls` are control tokens beside
    `<|end|>`, which begins and ends a text.
    """
    writer = gguf.GGUFWriter(path, architecture)
    _describe(writer, architecture, shape)
    _tokenizer(writer, shape.vocabulary, controls)
    if chat_template:
        writer.add_chat_template(chat_template)
    for name, value in entries.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(name, value)  # type: ignore[arg-type]
    for name, data in also.items():
        writer.add_tensor(name, data)
    random = np.random.default_rng(seed)
    for name, dims in _tensors(architecture, shape, tied=tied).items():
        if len(dims) == 1:
            ones = np.zeros if name.endswith(".bias") else np.ones
            writer.add_tensor(name, ones(dims, np.float32))
            continue
        data = random.standard_normal(dims, np.float32) * np.float32(1.0 / np.sqrt(dims[1]))
        data += plus.get(name, np.float32(0.0))
        if quantized:
            kind = gguf.GGMLQuantizationType.Q8_0
            packed: NDArray[np.uint8] = gguf.quants.quantize(data, kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_recurrent(path: Path) -> Path:
    """A Mamba model with the same tokenizer: its state cannot be cut back."""
    width, inner, state, rank = 64, 128, 16, 4
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_context_length(1024)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(1)
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(rank)
    writer.add_layer_norm_rms_eps(1e-5)
    _tokenizer(writer, 320, ())
    tensors: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (320, width),
        "output_norm.weight": (width,),
        "blk.0.attn_norm.weight": (width,),
        "blk.0.ssm_in.weight": (2 * inner, width),
        "blk.0.ssm_conv1d.weight": (inner, 4),
        "blk.0.ssm_conv1d.bias": (inner,),
        "blk.0.ssm_x.weight": (rank + 2 * state, inner),
        "blk.0.ssm_dt.weight": (inner, rank),
        "blk.0.ssm_dt.bias": (inner,),
        "blk.0.ssm_a": (inner, state),
        "blk.0.ssm_d": (inner,),
        "blk.0.ssm_out.weight": (width, inner),
    }
    for name, dims in tensors.items():
        writer.add_tensor(name, np.full(dims, -0.1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _describe(writer: gguf.GGUFWriter, architecture: str, shape: Shape) -> None:
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    pairs = [shape.kv_heads] * shape.layers
    writer.add_head_count_kv(pairs if shape.by_layer else shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(shape.head_width)
    if architecture in ("qwen3", "gemma3") or shape.head:
        writer.add_key_length(shape.head_width)
        writer.add_value_length(shape.head_width)
    if architecture == "gemma3":
        writer.add_sliding_window(128)
    writer.add_vocab_size(shape.vocabulary)


def _tokenizer(writer: gguf.GGUFWriter, vocabulary: int, controls: Sequence[str]) -> None:
    tokens = ["<|end|>", *_byte_letters(), *(merge.replace(" ", "") for merge in MERGES)]
    kinds = [gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * (len(tokens) - 1)]
    tokens += controls
    kinds += [gguf.TokenType.CONTROL] * len(controls)
    spare = vocabulary - len(tokens)
    tokens += [f"<|unused{number}|>" for number in range(spare)]
    kinds += [gguf.TokenType.UNUSED] * spare
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(True)


def _byte_letters() -> list[str]:
    """GPT-2's printable letter for each byte, in its order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(others))]


def _tensors(architecture: str, shape: Shape, *, tied: bool) -> dict[str, tuple[int, ...]]:
    """Each tensor's dimensions, row-major: (d_out, d_in)."""
    width, head = shape.width, shape.head_width
    q, kv = head * shape.heads, head * shape.kv_heads
    tensors: dict[str, tuple[int, ...]] = {"token_embd.weight": (shape.vocabulary, width)}
    for layer in range(shape.layers):
        block: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (width,),
            "attn_output.weight": (width, q),
            "ffn_norm.weight": (width,),
            "ffn_down.weight": (width, shape.feed_forward),
        }
        if architecture == "phi3":
            block["attn_qkv.weight"] = (q + 2 * kv, width)
            block["ffn_up.weight"] = (2 * shape.feed_forward, width)
        else:
            block["attn_q.weight"] = (q, width)
            block["attn_k.weight"] = block["attn_v.weight"] = (kv, width)
            block["ffn_gate.weight"] = block["ffn_up.weight"] = (shape.feed_forward, width)
        if architecture == "qwen2":
            block["attn_q.bias"] = (q,)
            block["attn_k.bias"] = block["attn_v.bias"] = (kv,)
        if architecture in ("qwen3", "gemma3"):
            block["attn_q_norm.weight"] = block["attn_k_norm.weight"] = (head,)
        if architecture == "gemma3":
            block["post_attention_norm.weight"] = block["post_ffw_norm.weight"] = (width,)
        tensors |= {f"blk.{layer}.{name}": dims for name, dims in block.items()}
    tensors["output_norm.weight"] = (width,)
    if not tied:
        tensors["output.weight"] = (shape.vocabulary, width)
    return tensors
