"""Loss and gradient of the last block in closed form, from one forward pass.

What enters the last block depends on nothing in it, and is kept for each row of data, with the keys
and values that the block's own matrices make of it. For any LoRA on the block's matrices, B alone
or A as well, and any output rows, what follows is one query's attention, one feed-forward step and
the output rows, at the few positions where a token is predicted. No token is sent through the model
again.

Shapes: B examples, n positions, m sites an example, E the model's width, H heads over K pairs of
key and value, of width D.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.engine.block_sites import Batch, BlockSites, Told, groups
from shared.engine.block_sites import batch as batch_of
from shared.engine.block_weights import BlockWeights, sigmoid, silu
from shared.engine.loras import Lora, Loras
from shared.engine.model import Adaptation, Example, Losses
from shared.engine.output_head import OutputHead

Floats = NDArray[np.float32]

_ONE = np.float32(1.0)


@dataclass(slots=True)
class _Passed:
    """What the backward pass needs of a forward one; `entering` and `low` by matrix.

    `entering` (.., d_in) is what a matrix with a LoRA was given, `low` (.., r) that under its A.
    """

    entering: dict[str, Floats]
    low: dict[str, Floats]
    raw_keys: Floats
    raw_queries: Floats
    keys: Floats
    values: Floats
    queries: Floats
    shares: Floats
    after: Floats
    normed: Floats
    gate: Floats
    up: Floats
    last: Floats
    state: Floats


class LastBlock:
    """The last block of a model, with the blocks of one manifest that lie in it."""

    def __init__(
        self, weights: BlockWeights, adaptation: Adaptation, choices: NDArray[np.int64] | None
    ) -> None:
        """Losses are over `choices`, tokens, or over the whole vocabulary."""
        self._weights = weights
        self._adaptation = adaptation
        self._head = OutputHead(weights, adaptation, choices)
        self._loras = Loras(adaptation)
        tensors = [tensor for tensor in self._loras.slots if tensor in weights.roles]
        self._tensors = {weights.roles[tensor]: tensor for tensor in tensors}
        self._rows = [n for n, block in enumerate(adaptation.blocks) if block.kind == "output_rows"]

    @property
    def tensors(self) -> set[str]:
        """Its matrices."""
        return set(self._weights.roles)

    @property
    def numbers(self) -> list[int]:
        """The manifest's blocks whose slopes are known in closed form."""
        found = list(self._rows)
        for tensor in self._tensors.values():
            found += [*self._loras.slots[tensor], *self._loras.moving_a[tensor].values()]
        return sorted(found)

    def sites(
        self, examples: Sequence[Example], streams: Sequence[Floats], states: Sequence[Floats]
    ) -> list[BlockSites]:
        """Of each example from what enters the block, (n, E), and its final states, (m, E)."""
        found = [
            self._site(example, stream, len(state))
            for example, stream, state in zip(examples, streams, states, strict=True)
        ]
        still = np.zeros(self._adaptation.offsets[-1], np.float32)
        for chosen in groups(found, self._weights):
            batch = batch_of([found[number] for number in chosen])
            ours = self._forward(batch, self._at(still)).state
            for place, number in enumerate(chosen):
                state = states[number]
                found[number].beside[:] = state - ours[place, : len(state)]
        return found

    def losses(self, sites: Sequence[BlockSites], values: Floats) -> Losses:
        """Losses of the examples at theta = `values` (d,)."""
        loras = self._at(values)
        told = Told.of(sites)
        for chosen in groups(sites, self._weights):
            batch = batch_of([sites[number] for number in chosen])
            state = self._forward(batch, loras).state
            head = self._head.losses(state[batch.real], batch.targets[batch.real], values)
            told.take(chosen, batch, head.losses, head.right)
        return told.losses()

    def gradient(
        self, sites: Sequence[BlockSites], values: Floats
    ) -> tuple[Losses, NDArray[np.float64]]:
        """Losses, and the gradient of their sum: (d,) float64, zero outside `numbers`."""
        whole = np.zeros(self._adaptation.offsets[-1])
        loras = self._at(values)
        told = Told.of(sites)
        for chosen in groups(sites, self._weights):
            batch = batch_of([sites[number] for number in chosen])
            passed = self._forward(batch, loras)
            state, targets = passed.state[batch.real], batch.targets[batch.real]
            head = self._head.losses(state, targets, values)
            told.take(chosen, batch, head.losses, head.right)
            back, rows = self._head.slopes(state, targets, values, head)
            slopes = np.zeros_like(passed.state)
            slopes[batch.real] = back
            for role, part in self._backward(batch, loras, passed, slopes).items():
                tensor = self._tensors[role]
                for column, number in enumerate(self._loras.slots[tensor]):
                    self._span(whole, number)[:] += part.b[:, column]
                for row, number in self._loras.moving_a[tensor].items():
                    self._span(whole, number)[:] += part.a[row]
            done = 0
            for number in self._rows:
                height = self._adaptation.blocks[number].shape[0]
                self._span(whole, number)[:] += rows[done : done + height].ravel()
                done += height
        return told.losses(), whole

    def _span(self, whole: NDArray[np.float64], number: int) -> NDArray[np.float64]:
        offsets = self._adaptation.offsets
        return whole[offsets[number] : offsets[number + 1]]

    def _at(self, values: Floats) -> dict[str, Lora]:
        return {role: self._loras.at(tensor, values) for role, tensor in self._tensors.items()}

    def _site(self, example: Example, stream: Floats, m: int) -> BlockSites:
        weights = self._weights
        entering = weights.norm(stream, "attn_norm")
        half = np.float16
        return BlockSites(
            entering=entering.astype(half),
            keys=weights.through("attn_k", entering).astype(half),
            values=weights.through("attn_v", entering).astype(half),
            queries=weights.through("attn_q", entering[-m:]).astype(half),
            stream=stream[-m:].copy(),
            beside=np.zeros_like(stream[-m:], half),
            targets=example.targets,
        )

    def _forward(self, batch: Batch, loras: dict[str, Lora]) -> _Passed:
        weights = self._weights
        b, n = batch.keys.shape[:2]
        m = batch.at.shape[1]
        given: dict[str, Floats] = {}
        low: dict[str, Floats] = {}

        def moved(role: str, entering: Floats, base: Floats) -> Floats:
            if role not in loras:
                return base
            given[role], low[role] = entering, entering @ loras[role].a.T
            return np.add(base, low[role] @ loras[role].b.T, dtype=np.float32)

        def through(role: str, entering: Floats) -> Floats:
            return moved(role, entering, weights.through(role, entering))

        at_sites = weights.norm(batch.stream, "attn_norm")
        raw_queries = weights.heads(moved("attn_q", at_sites, batch.queries))
        raw_keys = weights.heads(moved("attn_k", batch.entering, batch.keys))
        values = weights.heads(moved("attn_v", batch.entering, batch.values))
        at = np.maximum(batch.at, 0)
        queries = weights.rotary.turned(weights.head_norm(raw_queries, "attn_q_norm"), at)
        keys = weights.rotary.turned(weights.head_norm(raw_keys, "attn_k_norm"), np.arange(n))
        queries = weights.by_group(queries)  # (B, K, m g, D)
        keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)  # (B, K, n, D)
        scores = queries @ keys.swapaxes(2, 3) * np.float32(weights.scale)
        hidden = np.arange(n) > at[:, :, None]  # (B, m, n)
        shape = (b, weights.pairs, m, weights.group, n)
        scores = scores.reshape(shape)
        scores = np.where(hidden[:, None, :, None, :], np.float32(-np.inf), scores)
        scores -= scores.max(axis=-1, keepdims=True)
        shares = np.exp(scores)
        shares /= shares.sum(axis=-1, keepdims=True)
        shares = shares.reshape(b, weights.pairs, m * weights.group, n)
        mixed = weights.from_group(shares @ values, m)  # (B, m, H D)

        after = batch.stream + through("attn_output", mixed)
        normed = weights.norm(after, "ffn_norm")
        gate, up = through("ffn_gate", normed), through("ffn_up", normed)
        last = after + through("ffn_down", silu(gate) * up)
        state = weights.norm(last, "output_norm") + batch.beside
        return _Passed(
            given, low, raw_keys, raw_queries, keys, values, queries, shares, after, normed, gate,
            up, last, state,
        )  # fmt: skip

    def _backward(
        self, batch: Batch, loras: dict[str, Lora], passed: _Passed, slopes: Floats
    ) -> dict[str, Lora]:
        """The gradient with respect to each A and B, from that of the final states."""
        weights = self._weights
        m = batch.at.shape[1]
        found: dict[str, Lora] = {}

        def find(role: str, outgoing: Floats) -> Floats:
            """The gradient of what is under A, (.., r); those of A and B are found on the way."""
            under = outgoing @ loras[role].b
            moves = self._loras.moving_a[self._tensors[role]]
            a = _outer(under, passed.entering[role]) if moves else loras[role].a
            found[role] = Lora(a, _outer(outgoing, passed.low[role]))
            return under

        def into(role: str, outgoing: Floats) -> Floats:
            """The gradient of what enters a matrix."""
            back = weights.back_through(role, outgoing)
            if role not in loras:
                return back
            return np.add(back, find(role, outgoing) @ loras[role].a, dtype=np.float32)

        last = weights.norm_back(passed.last, "output_norm", slopes)
        inner = into("ffn_down", last)
        opened = sigmoid(passed.gate)
        up = inner * passed.gate * opened
        gate = np.multiply(
            inner * passed.up, opened * (_ONE + passed.gate * (_ONE - opened)), dtype=np.float32
        )
        normed = into("ffn_gate", gate) + into("ffn_up", up)
        after = last + weights.norm_back(passed.after, "ffn_norm", normed)
        mixed = weights.by_group(weights.heads(into("attn_output", after)))
        shares = mixed @ passed.values.swapaxes(2, 3)
        values = passed.shares.swapaxes(2, 3) @ mixed
        shares -= (shares * passed.shares).sum(axis=-1, keepdims=True)
        scores = shares * passed.shares * np.float32(weights.scale)
        queries = weights.heads(weights.from_group(scores @ passed.keys, m))
        keys = (scores.swapaxes(2, 3) @ passed.queries).swapaxes(1, 2)  # (B, n, K, D)
        if "attn_q" in loras:
            queries = weights.rotary.turned(queries, np.maximum(batch.at, 0), back=True)
            queries = weights.head_norm_back(passed.raw_queries, "attn_q_norm", queries)
            find("attn_q", _flat(queries))
        if "attn_k" in loras:
            keys = weights.rotary.turned(keys, np.arange(keys.shape[1]), back=True)
            keys = weights.head_norm_back(passed.raw_keys, "attn_k_norm", keys)
            find("attn_k", _flat(keys))
        if "attn_v" in loras:
            find("attn_v", _flat(values.swapaxes(1, 2)))
        return found


def _flat(heads: Floats) -> Floats:
    """(B, n, h, D) to (B, n, h D)."""
    return heads.reshape(*heads.shape[:2], -1)


def _outer(outgoing: Floats, entering: Floats) -> Floats:
    """The sum over all positions of outgoing (.., p) times entering (.., q): (p, q)."""
    return outgoing.reshape(-1, outgoing.shape[-1]).T @ entering.reshape(-1, entering.shape[-1])
