"""The weights of a model's last block, and what its matrices and norms do forward and backward."""

import math
from collections.abc import Iterator
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from shared.engine.gguf_file import Header
from shared.engine.rotary import Rotary
from shared.engine.weights import Weights
from shared.errors import EngineError

Floats = NDArray[np.float32]

CLOSED_FORM = ("llama", "qwen2", "qwen3")
"""Architectures whose last block is written out here."""

_KEPT = 1 << 22
"""Weights that are kept as float32: 16 MB."""
_AT_ONCE = 1 << 20
"""Of a larger output matrix, as many as are float32 at a time."""

MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_NORMS = ("attn_norm", "ffn_norm")
_HEAD_NORMS = ("attn_q_norm", "attn_k_norm")
_BIASED = ("attn_q", "attn_k", "attn_v")


class BlockWeights:
    """The last block of the model in a GGUF file."""

    def __init__(self, path: str, header: Header) -> None:
        """Nothing is read yet but the norms.

        Raises:
            EngineError: its last block has parts that are not known here; names one.
        """
        if header.architecture not in CLOSED_FORM:
            raise EngineError(
                f"{path}: the last block of {header.architecture} has no closed form here; use "
                "how: probe, or --adapter output-rows"
            )
        layers = int(header.number("block_count"))
        prefix = f"blk.{layers - 1}."
        known = {f"{prefix}{name}.weight" for name in (*MATRICES, *_NORMS, *_HEAD_NORMS)}
        known |= {f"{prefix}{name}.bias" for name in _BIASED}
        strange = {name for name in header.tensors if name.startswith(prefix)} - known
        missing = {f"{prefix}{name}.weight" for name in (*MATRICES, *_NORMS)} - set(header.tensors)
        strange |= {"output.bias"} & set(header.tensors)
        if strange or missing or layers < 2:
            what = min(strange | missing, default="a single block")
            raise EngineError(f"{path}: {what} has no closed form here; use how: probe")
        self._weights = Weights(path, header)
        self._prefix = prefix
        self._epsilon = np.float32(header.number("attention.layer_norm_rms_epsilon") or 1e-5)
        self.width = width = int(header.number("embedding_length"))
        heads = int(header.number("attention.head_count"))
        if heads < 1:
            raise EngineError(f"{path}: its header has no attention.head_count; use how: probe")
        self.pairs = int(header.number("attention.head_count_kv")) or heads
        self.head_width = int(header.number("attention.key_length")) or width // heads
        if self.pairs < 1 or heads % self.pairs or self.head_width < 1:
            raise EngineError(
                f"{path}: {heads} heads over {self.pairs} of width {self.head_width} have no "
                "closed form here; use how: probe"
            )
        self.group = heads // self.pairs
        self.scale = self.head_width**-0.5
        self._output_name = (
            "output.weight" if self._weights.has("output.weight") else "token_embd.weight"
        )
        inner = header.tensors[f"{prefix}ffn_up.weight"][-1:]
        self.inner_width = inner[0] if inner else 0
        self._check(path, header, prefix, width, heads * self.head_width)
        self.roles = {f"{prefix}{name}.weight": name for name in MATRICES}
        """Which part of the block each of its tensors is."""
        self.rotary = Rotary(path, header, self._weights, self.head_width)
        names = {name: f"{prefix}{name}.weight" for name in (*_NORMS, *_HEAD_NORMS)}
        names["output_norm"] = "output_norm.weight"
        self._norms = {
            name: self._weights.vector(tensor)
            for name, tensor in names.items()
            if self._weights.has(tensor)
        }
        sizes = [math.prod(header.tensors[name]) for name in self.roles]
        self._kept: dict[str, Floats] | None = {} if sum(sizes) <= _KEPT else None
        self._output: tuple[NDArray[np.int64], Floats] | None = None

    def _check(self, path: str, header: Header, prefix: str, width: int, all_heads: int) -> None:
        """Find a tensor whose shape or type is not as `through` and `heads` take it to be.

        Raises:
            EngineError: names it.
        """
        key = self.pairs * self.head_width
        shapes = {
            "attn_q": (width, all_heads),
            "attn_k": (width, key),
            "attn_v": (width, key),
            "attn_output": (all_heads, width),
            "ffn_gate": (width, self.inner_width),
            "ffn_up": (width, self.inner_width),
            "ffn_down": (self.inner_width, width),
        }
        for role, shape in shapes.items():
            name = f"{prefix}{role}.weight"
            if header.tensors[name] != shape:
                raise EngineError(
                    f"{path}: {name} has shape {list(header.tensors[name])}, a closed form only "
                    f"with {list(shape)}; use how: probe"
                )
        own = [name for name in header.tensors if name.startswith(prefix)]
        for name in (*own, "output_norm.weight", self._output_name):
            self._weights.check(name)

    def _matrix(self, role: str) -> Floats:
        """Read anew each time where the block is large: the file is in memory anyway."""
        if self._kept is None:
            return self._weights.matrix(f"{self._prefix}{role}.weight")
        if role not in self._kept:
            self._kept[role] = self._weights.matrix(f"{self._prefix}{role}.weight")
        return self._kept[role]

    @cached_property
    def _biases(self) -> dict[str, Floats]:
        names = {name: f"{self._prefix}{name}.bias" for name in _BIASED}
        return {n: self._weights.vector(t) for n, t in names.items() if self._weights.has(t)}

    def output(self, choices: NDArray[np.int64] | None) -> Iterator[tuple[int, Floats]]:
        """Rows `choices` of the output matrix, or all, a run at a time: its first place, (c, E)."""
        height = self._weights.height(self._output_name)
        if choices is None and height * self.width > _KEPT:
            step = max(1, _AT_ONCE // self.width)
            for low in range(0, height, step):
                yield low, self._weights.rows(self._output_name, low, min(height, low + step))
            return
        rows = np.arange(height) if choices is None else choices
        if self._output is None or not np.array_equal(self._output[0], rows):
            self._output = (rows, self._weights.chosen(self._output_name, rows))
        yield 0, self._output[1]

    def through(self, role: str, entering: Floats) -> Floats:
        """What matrix `role` makes of (..., d_in): (..., d_out)."""
        found = entering @ self._matrix(role).T
        return found + self._biases[role] if role in self._biases else found

    def back_through(self, role: str, outgoing: Floats) -> Floats:
        """The gradient of what enters, (..., d_in), from that of what leaves."""
        return outgoing @ self._matrix(role)

    def norm(self, x: Floats, name: str) -> Floats:
        """Root-mean-square norm of (..., d), times its weights."""
        return x * self._inverse(x) * self._norms[name]

    def norm_back(self, x: Floats, name: str, outgoing: Floats) -> Floats:
        """The gradient of `x` from that of `norm(x, name)`."""
        inverse = self._inverse(x)
        weighted = outgoing * self._norms[name]
        along = (weighted * x).mean(axis=-1, keepdims=True)
        return inverse * (weighted - x * inverse * inverse * along)

    def head_norm(self, heads: Floats, name: str) -> Floats:
        """The norm of each head, where the model has one."""
        return self.norm(heads, name) if name in self._norms else heads

    def head_norm_back(self, heads: Floats, name: str, outgoing: Floats) -> Floats:
        return self.norm_back(heads, name, outgoing) if name in self._norms else outgoing

    def heads(self, flat: Floats) -> Floats:
        """(B, n, h D) to (B, n, h, D)."""
        return flat.reshape(*flat.shape[:2], -1, self.head_width)

    def by_group(self, heads: Floats) -> Floats:
        """(B, m, H, D) to (B, K, m g, D): the g heads that share a key side by side."""
        b, m = heads.shape[:2]
        grouped = heads.reshape(b, m, self.pairs, self.group, self.head_width)
        return grouped.transpose(0, 2, 1, 3, 4).reshape(b, self.pairs, -1, self.head_width)

    def from_group(self, grouped: Floats, m: int) -> Floats:
        """(B, K, m g, D) to (B, m, H D)."""
        b = len(grouped)
        heads = grouped.reshape(b, self.pairs, m, self.group, self.head_width)
        return heads.transpose(0, 2, 1, 3, 4).reshape(b, m, -1)

    def _inverse(self, x: Floats) -> Floats:
        squares = np.einsum("...i,...i->...", x, x)[..., None] / np.float32(x.shape[-1])
        return np.float32(1.0) / np.sqrt(squares + self._epsilon)


def last_block_tensors(path: str, header: Header) -> set[str]:
    """The matrices of a model's last block; none where it has no closed form here."""
    try:
        return set(BlockWeights(path, header).roles)
    except EngineError:
        return set()


def sigmoid(x: Floats) -> Floats:
    with np.errstate(over="ignore"):
        return np.float32(1.0) / (np.float32(1.0) + np.exp(-x))


def silu(x: Floats) -> Floats:
    return x * sigmoid(x)
