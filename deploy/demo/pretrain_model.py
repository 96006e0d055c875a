"""The demo's model: a small Llama in torch, named as llama.cpp names its tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

END_ID = 0
PAD_ID = 1


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama-architecture model; every width is a multiple of 32, the block size of Q8_0."""

    vocabulary: int = 3072
    width: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 640
    context: int = 256
    rope_base: float = 10_000.0
    norm_epsilon: float = 1e-5

    @property
    def head_width(self) -> int:
        return self.width // self.heads


class Attention(nn.Module):
    """Grouped-query attention; each rotation turns a pair of neighbours, as llama.cpp's does."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        kv_width = shape.kv_heads * shape.head_width
        self.attn_q = nn.Linear(shape.width, shape.width, bias=False)
        self.attn_k = nn.Linear(shape.width, kv_width, bias=False)
        self.attn_v = nn.Linear(shape.width, kv_width, bias=False)
        self.attn_output = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor, turns: Tensor, visible: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = (batch, length, -1, self.shape.head_width)
        q = _rotated(self.attn_q(x).view(split), turns).transpose(1, 2)
        k = _rotated(self.attn_k(x).view(split), turns).transpose(1, 2)
        v = self.attn_v(x).view(split).transpose(1, 2)
        groups = self.shape.heads // self.shape.kv_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.attn_output(mixed.transpose(1, 2).reshape(batch, length, width))


def _rotated(x: Tensor, turns: Tensor) -> Tensor:
    """Return `x` (batch, length, heads, head_width) turned by `turns` (2, length, 1, half)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = turns[0].to(x.dtype), turns[1].to(x.dtype)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class Block(nn.Module):
    """One transformer layer: attention and a SwiGLU, both on normalised input."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(shape.width, eps=shape.norm_epsilon)
        self.attention = Attention(shape)
        self.ffn_norm = nn.RMSNorm(shape.width, eps=shape.norm_epsilon)
        self.ffn_gate = nn.Linear(shape.width, shape.ffn, bias=False)
        self.ffn_up = nn.Linear(shape.width, shape.ffn, bias=False)
        self.ffn_down = nn.Linear(shape.ffn, shape.width, bias=False)

    def forward(self, x: Tensor, turns: Tensor, visible: Tensor) -> Tensor:
        x = x + self.attention(self.attn_norm(x), turns, visible)
        h = self.ffn_norm(x)
        return x + self.ffn_down(functional.silu(self.ffn_gate(h)) * self.ffn_up(h))


class Llama(nn.Module):
    """The whole model; `output` is a matrix of its own, so that an adapter may change its rows."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Embedding(shape.vocabulary, shape.width)
        self.blk = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.output_norm = nn.RMSNorm(shape.width, eps=shape.norm_epsilon)
        self.output = nn.Linear(shape.width, shape.vocabulary, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith(("attn_output.weight", "ffn_down.weight"))
                nn.init.normal_(
                    weight, std=0.02 / math.sqrt(2 * shape.layers) if residual else 0.02
                )

    def states(self, tokens: Tensor) -> Tensor:
        """Return the normalised last states (batch, length, width); documents do not mix."""
        length, half = tokens.shape[1], self.shape.head_width // 2
        frequencies = self.shape.rope_base ** (-torch.arange(half) / half)
        angles = torch.outer(torch.arange(length).float(), frequencies).unsqueeze(1)
        turns = torch.stack((angles.cos(), angles.sin()))
        document = (tokens == END_ID).cumsum(1)
        same = document.unsqueeze(2) == document.unsqueeze(1)
        visible = (same & torch.ones(length, length, dtype=torch.bool).tril()).unsqueeze(1)
        x = self.token_embd(tokens)
        for block in self.blk:
            x = block(x, turns, visible)
        return self.output_norm(x)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.states(tokens))
