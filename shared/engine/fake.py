"""A small softmax model over hashed words, in closed form: an engine for tests of all but engines.

Tokens are hashed words; the state at a position is the sum of their random vectors, moved by the
manifest's blocks and normalised, and a random matrix turns it into logits. So every kind of block
lowers its loss when tuned, as in a language model, and nothing needs llama.cpp.

A path of `fake` takes the defaults, `fake:abort` dies at its first pass; any other path is a JSON
file of `Options`.
"""

import os
import re
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from shared.engine import scoring
from shared.engine.block_sites import BlockSites
from shared.engine.examples import first_tokens
from shared.engine.last_block import LastBlock
from shared.engine.loras import Loras
from shared.engine.model import Adaptation, Example, Losses, Sites
from shared.engine.protocol import Facts
from shared.errors import EngineError

if TYPE_CHECKING:
    from shared.engine.chat import ChatTemplate

START, END, _FIRST_WORD = 0, 1, 2
OUTPUT, MIXER = "output.weight", "blk.0.mix.weight"


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a fake model is."""

    n_embd: int = 32
    n_vocab: int = 1024
    delay_s: float = 0.0
    """Every pass takes at least this long."""
    abort: bool = False
    """Every pass ends the process as a native assertion would."""
    abort_file: str = ""
    """The first pass that finds this file removes it and ends the process."""


class FakeEngine:
    """Opens fake models."""

    def inspect(self, path: str, words: list[str], template: str, prompt: str = "") -> Facts:
        options = _options(path)
        width, vocabulary = options.n_embd, options.n_vocab
        return Facts(
            architecture="fake",
            n_embd=width,
            n_layer=1,
            n_vocab=vocabulary,
            n_ctx_train=32768,
            tied=False,
            matrices={OUTPUT: [vocabulary, width], MIXER: [width, width]},
            tokens=first_tokens(words, template, Words(vocabulary)),
            parameters=(vocabulary + width) * width,
            prompt=Words(vocabulary).tokenize(prompt, start=False),
            prompt_rms=1.0,
        )

    def open(self, path: str, blocks: Adaptation, threads: int, max_tokens: int) -> "FakeModel":
        return FakeModel(_options(path), blocks)


class Words:
    """Each word is a token."""

    end = END
    controls = re.compile(r"(?!)")

    def __init__(self, n_vocab: int) -> None:
        self._n_vocab = n_vocab

    @property
    def chat(self) -> "ChatTemplate":
        return self._chat

    @cached_property
    def _chat(self) -> "ChatTemplate":
        from shared.engine.chat import ChatTemplate

        return ChatTemplate(None, "", "")

    def tokenize(self, text: str, *, start: bool, special: bool = True) -> list[int]:
        room = self._n_vocab - _FIRST_WORD
        hashed = [_FIRST_WORD + zlib.crc32(word.encode()) % room for word in text.split()]
        return [START, *hashed] if start else hashed


@dataclass(frozen=True, slots=True)
class _Prepared:
    """Examples as far as no adapter changes them; m positions in all."""

    examples: Sequence[Example]
    states: NDArray[np.float64]
    owners: NDArray[np.int64]
    targets: NDArray[np.int64]
    reach: NDArray[np.float64]
    """(m,): by how much of it a soft prompt's sum moves each state."""
    text_tokens: int
    tokens: int


class FakeModel(Words):
    """The model at one adapter."""

    def __init__(self, options: Options, blocks: Adaptation) -> None:
        super().__init__(options.n_vocab)
        self._options = options
        self._blocks = blocks
        self._loras = Loras(blocks)
        self._rows = blocks.output_rows
        self._choices: NDArray[np.int64] | None = None
        self._values = np.zeros(blocks.offsets[-1], np.float32)
        self._vectors = _signs(1, options)
        self._output = _signs(2, options) / np.sqrt(options.n_embd)
        self._prepared: _Prepared | None = None
        self._texts: tuple[bytes, ...] = ()
        """Whose cache would be kept behind a soft prompt."""
        self.forwarded = 0
        for block in blocks.blocks:
            width = options.n_embd
            if block.shape[-1] != width or (block.kind == "lora_b" and block.d_in != width):
                raise EngineError(f"manifest: {block.tensor} does not have width {width}")
        if len(blocks.prompt_tokens) and blocks.prompt_tokens.max() >= options.n_vocab:
            raise EngineError(f"manifest: there are only {options.n_vocab} tokens")
        if len(self._rows) and self._rows.max() >= options.n_vocab:
            raise EngineError(f"manifest: {OUTPUT} has only {options.n_vocab} rows")

    def choose_among(self, tokens: list[int]) -> None:
        self._choices = np.array(tokens, np.int64) if tokens else None

    def stand(self, values: NDArray[np.float32]) -> None:
        self._values = values.copy()

    def parts(self, examples: Sequence[Example]) -> list[slice]:
        return [slice(0, len(examples))]

    def measure(self, examples: Sequence[Example]) -> Losses:
        hidden, given = self._hidden(examples)
        output = self._output.copy()
        for number, block in enumerate(self._blocks.blocks):
            if block.kind == "output_rows":
                output[block.rows] += self._blocks.part(number, self._values)
        logits = hidden @ (output if self._choices is None else output[self._choices]).T
        at_target = logits[np.arange(len(logits)), given.targets]
        owners, count = given.owners, len(examples)
        loss = np.bincount(owners, _log_sum_exp(logits) - at_target, count).astype(np.float64)
        wrong = np.bincount(owners, at_target < logits.max(axis=1), count)
        return Losses(loss, np.bincount(owners, minlength=count).astype(np.int64), wrong == 0)

    def sites(self, examples: Sequence[Example]) -> list[Sites]:
        hidden, given = self._hidden(examples)
        logits = hidden @ self._output.T
        targets = given.targets
        others = np.ones(self._options.n_vocab, np.bool_)
        if self._choices is not None:
            others[:] = False
            others[self._choices] = True
            targets = self._choices[targets]
        rows = np.where(others[self._rows], logits[:, self._rows], -np.inf)
        others[self._rows] = False
        rest = logits[:, others]
        places = {row: place for place, row in enumerate(self._rows.tolist())}
        whole = Sites(
            hidden=hidden.astype(np.float32),
            rows=rows,
            rest=_log_sum_exp(rest),
            rest_max=rest.max(axis=1, initial=-np.inf),
            target=np.array([places.get(t, -1) for t in targets.tolist()], np.int32),
            target_logit=logits[np.arange(len(logits)), targets],
        )
        return list(scoring.split(whole, [len(example.targets) for example in examples]))

    def last_block(self) -> LastBlock:
        raise EngineError("the fake model has no last block; use how: probe")

    def block_sites(self, examples: Sequence[Example], block: LastBlock) -> list[BlockSites]:
        raise EngineError("the fake model has no last block; use how: probe")

    def close(self) -> None:
        """Nothing is held."""

    def _hidden(self, examples: Sequence[Example]) -> tuple[NDArray[np.float64], _Prepared]:
        """The normalised states that targets are predicted from, (m, n_embd) float64."""
        self._misbehave()
        given = self._prepared
        if given is None or given.examples is not examples:
            given = self._prepared = self._prepare(examples)
            texts = tuple(example.tokens.tobytes() for example in examples)
            if texts != self._texts:
                self.forwarded += given.text_tokens
            self._texts = texts
        state = given.states
        moved = state.copy()
        for number, block in enumerate(self._blocks.blocks):
            part = self._blocks.part(number, self._values)
            if block.kind == "control":
                moved += part
        for tensor in self._loras.slots:
            lora = self._loras.at(tensor, self._values)
            moved += (state @ lora.a.T) @ lora.b.T
        if len(self._blocks.prompt_tokens):
            added = self._blocks.prompt_moved(self._values).sum(axis=0)
            moved += np.outer(given.reach, added)
        self.forwarded += given.tokens
        return moved / np.sqrt((moved**2).mean(axis=1, keepdims=True) + 1e-6), given

    def _prepare(self, examples: Sequence[Example]) -> "_Prepared":
        states: list[NDArray[np.float64]] = []
        reach: list[NDArray[np.float64]] = []
        prompt = self._blocks.prompt_tokens
        text_tokens = 0
        for example in examples:
            tokens = np.insert(example.tokens, example.asked, prompt)
            steps = np.sqrt(np.arange(1, len(tokens) + 1))[:, None]
            state = np.cumsum(self._vectors[tokens], axis=0) / steps
            states.append(state[len(state) - len(example.targets) :])
            reach.append(1.0 / steps[len(state) - len(example.targets) :, 0])
            text_tokens += example.asked if len(prompt) else 0
        return _Prepared(
            examples=examples,
            states=np.concatenate(states),
            owners=np.repeat(np.arange(len(states)), [len(state) for state in states]),
            targets=np.concatenate([example.targets for example in examples]).astype(np.int64),
            reach=np.concatenate(reach),
            text_tokens=text_tokens,
            tokens=sum(len(example.tokens) + len(prompt) for example in examples) - text_tokens,
        )

    def _misbehave(self) -> None:
        if self._options.delay_s:
            time.sleep(self._options.delay_s)
        if self._options.abort:
            os.abort()
        if self._options.abort_file and Path(self._options.abort_file).exists():
            Path(self._options.abort_file).unlink()
            os.abort()


def _options(path: str) -> Options:
    if path in {"fake", "fake:abort"}:
        return Options(abort=path.endswith("abort"))
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=Options)
    except (OSError, msgspec.MsgspecError) as error:
        raise EngineError(f"{path}: not a fake model: {error}") from error


def _signs(table: int, options: Options) -> NDArray[np.float64]:
    """(n_vocab, n_embd) entries +-1, the same everywhere."""
    size = options.n_vocab * options.n_embd
    words = np.random.Philox(key=[table, 0]).random_raw(size) & np.uint64(1)
    return (words.astype(np.float64) * 2.0 - 1.0).reshape(options.n_vocab, options.n_embd)


def _log_sum_exp(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over the last axis: (m, k) -> (m,); -inf where k = 0."""
    largest = logits.max(axis=1, initial=-np.inf)
    if not logits.shape[1]:
        return largest
    return largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))
