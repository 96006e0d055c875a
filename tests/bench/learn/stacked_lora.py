"""The LoRAs of several devices on one model in torch, computed side by side.

Rows of a batch belong to the devices in turn, as many to each. One pass over all of them costs a
fraction of a pass for each; what a device computes is what it would compute alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class _Adapted(nn.Module):
    """A frozen linear layer, and for each device a LoRA beside it."""

    def __init__(self, base: nn.Linear, scale: float) -> None:
        super().__init__()
        self.base = base
        self.scale = scale
        self.a = torch.zeros(0)
        """(devices, rank, d_in)"""
        self.b = torch.zeros(0)
        """(devices, d_out, rank)"""

    def forward(self, x: Tensor) -> Tensor:
        """(rows, t, d_in) to (rows, t, d_out)"""
        out: Tensor = self.base(x)
        devices = len(self.a)
        low = x.reshape(devices, -1, x.shape[-1]) @ self.a.transpose(1, 2)
        own = out.view(devices, -1, out.shape[-1])
        # In place: each tensor less is a page fault less for every 4 kB of it.
        return own.baddbmm_(low, self.b.transpose(1, 2), alpha=self.scale).view(out.shape)


class StackedLora:
    """LoRA of `rank` on the linear layers named in `targets`, in every layer of `body`.

    A device's parameters are one vector, (d,) float32.
    """

    def __init__(
        self, body: Any, targets: Sequence[str], rank: int, scale: float, seed: int
    ) -> None:
        self._layers: list[_Adapted] = []
        for one in body.parameters():
            one.requires_grad_(False)
        for parent in list(body.modules()):
            for name, child in list(parent.named_children()):
                if name in targets and isinstance(child, nn.Linear):
                    adapted = _Adapted(child, scale)
                    setattr(parent, name, adapted)
                    self._layers.append(adapted)
        random = torch.Generator().manual_seed(seed)
        parts: list[Tensor] = []
        for layer in self._layers:
            ins, outs = layer.base.in_features, layer.base.out_features
            bound = ins**-0.5
            parts.append((2.0 * torch.rand(rank * ins, generator=random) - 1.0) * bound)
            parts.append(torch.zeros(outs * rank))
        self._rank = rank
        self._first = torch.cat(parts)
        self.stand(self._first, 1)

    def start(self) -> Tensor:
        """Where training begins: A is random, uniform within 1/sqrt(d_in), and B is zero."""
        self.stand(self._first, 1)
        return self._first.clone()

    def stand(self, theta: Tensor, devices: int) -> None:
        """Put `devices` devices at `theta`, (d,)."""
        used = 0
        for layer in self._layers:
            for name, shape in (
                ("a", (self._rank, layer.base.in_features)),
                ("b", (layer.base.out_features, self._rank)),
            ):
                part = theta[used : used + shape[0] * shape[1]].reshape(1, *shape)
                used += part.numel()
                setattr(layer, name, part.repeat(devices, 1, 1).requires_grad_())

    def parameters(self) -> list[Tensor]:
        """What is trained: a leaf for each A and B, of all devices."""
        return [part for layer in self._layers for part in (layer.a, layer.b)]

    def vectors(self) -> Tensor:
        """(devices, d)"""
        with torch.no_grad():
            return torch.cat([part.detach().flatten(1) for part in self.parameters()], dim=1)
