"""What the child's engines offer, and what goes into and comes out of them.

A model stands at one adapter (`stand`), is sent sequences in a fixed layout and answers with
losses. The same sequences in the same order are laid out alike every time, so what two calls differ
by is the adapter alone.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from msgspec import UNSET
from numpy.typing import NDArray

from shared import directions
from shared.engine.protocol import Facts
from shared.messages.jobs import Block

if TYPE_CHECKING:
    from shared.engine.block_sites import BlockSites
    from shared.engine.chat import ChatTemplate  # Jinja, which only conversations need
    from shared.engine.last_block import LastBlock

TEMPLATE_EDGE = "\n"
"""Stands for the text before a word where the template ends with `{text}` itself."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row as tokens.

    `tokens` (n,) int32 is what is sent; logits are read at its last `len(targets)` positions.
    `targets` (m,) int32: the token that should follow each of them, or, for choices, the index of
    the right choice at the one position. The model puts a soft prompt after the first `asked`.
    """

    tokens: NDArray[np.int32]
    targets: NDArray[np.int32]

    @property
    def asked(self) -> int:
        """How many tokens stand before the answer."""
        return len(self.tokens) - len(self.targets) + 1


@dataclass(frozen=True, slots=True)
class Losses:
    """Per example: summed loss in nats (n,) float64, what it is summed over (n,) int64, and whether
    the most likely answer is the right one throughout, (n,) bool."""

    loss: NDArray[np.float64]
    weight: NDArray[np.int64]
    right: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Sites:
    """What the last layer sees of one example: its loss as a function of output rows.

    For m positions, r adapted rows, of width n_embd; the rows' own deltas are *not* in it.
    """

    hidden: NDArray[np.float32]
    """(m, n_embd): the state after the output norm."""
    rows: NDArray[np.float64]
    """(m, r): logits of the adapted rows; -inf where a row is no choice."""
    rest: NDArray[np.float64]
    """(m,): log-sum-exp of all other logits; -inf where there are none."""
    rest_max: NDArray[np.float64]
    """(m,): the largest of all other logits; -inf where there are none."""
    target: NDArray[np.int32]
    """(m,): the target's place among the adapted rows, or -1."""
    target_logit: NDArray[np.float64]
    """(m,): the target's logit, without its row's delta."""

    @property
    def size_bytes(self) -> int:
        arrays = (self.hidden, self.rows, self.rest, self.rest_max, self.target, self.target_logit)
        return sum(array.nbytes for array in arrays)


class Tokenizer(Protocol):
    """Text to tokens."""

    @property
    def end(self) -> int:
        """The token that ends a text, or -1 where the model has none."""
        ...

    @property
    def controls(self) -> re.Pattern[str]:
        """Finds the spelling of any control token."""
        ...

    @property
    def chat(self) -> "ChatTemplate":
        """The model's chat template.

        Raises:
            EngineError: it is broken.
        """
        ...

    def tokenize(self, text: str, *, start: bool, special: bool = True) -> list[int]:
        """The tokens of `text`; with `start`, what the model wants at the start comes first.

        `special`: what spells a control token becomes that token.
        """
        ...


class Model(Tokenizer, Protocol):
    """A loaded model, the blocks of one manifest, and where they stand."""

    @property
    def forwarded(self) -> int:
        """Tokens sent forward so far."""
        ...

    def choose_among(self, tokens: list[int]) -> None:
        """Losses compare these tokens only, as choices; empty: the whole vocabulary."""
        ...

    def stand(self, values: NDArray[np.float32]) -> None:
        """What follows is measured with the blocks at `values`, (d,) float32.

        Raises:
            EngineError: the model cannot carry a block.
        """
        ...

    def parts(self, examples: Sequence[Example]) -> list[slice]:
        """Which of `examples` to measure again and again together, before the next of them.

        What a part's passes have in common is kept between them.
        """
        ...

    def measure(self, examples: Sequence[Example]) -> Losses:
        """One forward pass over `examples`.

        Raises:
            EngineError: the engine failed.
        """
        ...

    def sites(self, examples: Sequence[Example]) -> list[Sites]:
        """One forward pass over `examples`, read before the output rows.

        The output rows must stand at zero.

        Raises:
            EngineError: the engine failed.
        """
        ...

    def last_block(self) -> "LastBlock":
        """Its last block, with the manifest's blocks that lie in it; after `choose_among`.

        Raises:
            EngineError: there is no closed form for it; names the mend.
        """
        ...

    def block_sites(self, examples: Sequence[Example], block: "LastBlock") -> list["BlockSites"]:
        """One forward pass over `examples`, read before the last block.

        The blocks in it must stand at zero.

        Raises:
            EngineError: the engine failed.
        """
        ...

    def close(self) -> None:
        """Give back what the model holds."""
        ...


class Engine(Protocol):
    """An engine as the worker holds it: it opens models."""

    def inspect(self, path: str, words: list[str], template: str, prompt: str = "") -> Facts:
        """What the model in `path` is; the rest is as `Inspect` says.

        Raises:
            EngineError: it is missing, damaged or not supported; names the mend.
        """
        ...

    def open(self, path: str, blocks: "Adaptation", threads: int, max_tokens: int) -> Model:
        """The model in `path`, its blocks at zero.

        Raises:
            EngineError: it is missing, damaged, not supported, or does not fit the manifest.
        """
        ...


@dataclass(frozen=True, slots=True)
class Adaptation:
    """The manifest's blocks as an engine needs them: where each lies in theta and its part of A."""

    architecture: str
    seed: int
    epoch: int
    blocks: list[Block]
    offsets: list[int]
    """First parameter of each block, and d at the end."""

    @property
    def output_rows(self) -> NDArray[np.int64]:
        """The adapted rows of the output matrix, in the order of their blocks."""
        rows = [row for block in self.blocks if block.kind == "output_rows" for row in block.rows]
        return np.array(rows, np.int64)

    @property
    def prompt_tokens(self) -> NDArray[np.int32]:
        """What the soft prompt starts as: (p,) int32, p = 0 where there is none."""
        tokens = [token for block in self.blocks if block.kind == "prompt" for token in block.rows]
        return np.array(tokens, np.int32)

    def prompt_moved(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """What `values` (d,) add to the embeddings of `prompt_tokens`: (p, n_embd) float32."""
        return np.concatenate(
            [
                np.float32(block.unit) * self.part(number, values)
                for number, block in enumerate(self.blocks)
                if block.kind == "prompt" and block.unit is not UNSET
            ]
        )

    def fixed_a(self, number: int) -> NDArray[np.float32]:
        """The row of A of LoRA block `number` (`lora_b`) at theta = 0: (d_in,) float32."""
        before = sum(block.d_in for block in self.blocks[:number] if block.kind == "lora_b")
        d_in = self.blocks[number].d_in
        signs = directions.lora_a(self.seed, self.epoch, before, d_in)
        return signs.astype(np.float32) / np.sqrt(np.float32(d_in))

    def part(self, number: int, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Block `number` of `values` (d,), in the block's shape."""
        flat = values[self.offsets[number] : self.offsets[number + 1]]
        return flat.reshape(self.blocks[number].shape)
