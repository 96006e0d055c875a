"""A soft prompt between each row's prompt and its answer, and the rows' texts kept in the cache.

Source: Lester et al. (EMNLP 2021), prompt tuning; Malladi et al., MeZO, section 2.2 and appendix E:
it has to start as a real text's. Theta = 0 is the model with the start's tokens in that place.
Differs in: it is a suffix. What comes before it does not hang on it, so the cache of the rows'
texts is made once and a probe sends prompt and answer alone; a prefix has every probe send it all.
It stands at the very end, after a template's words too: that is a place which every kind of row
has, and a request that comes to be served; whoever wants a question behind the text asks it in the
words that the prompt starts as. Measured by backprop on ag_news with llama-3m, 8 tokens, 200 steps
of Adam: loss 0.96 here, 1.05 between the text and the template's words, 1.37 before the text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.engine.adapter_tensors import numbers
from shared.engine.decoding import decode
from shared.engine.embeddings import Embeddings
from shared.engine.gguf_file import Header
from shared.engine.layout import Batch, packed
from shared.engine.model import Adaptation, Example
from shared.engine.native import native
from shared.errors import EngineError

SEQUENCES = 256
"""As many as llama.cpp can tell apart."""
_CELLS = 4096
_CACHE_BYTES = 64 * 2**20


class Inputs:
    """What the first layer sees of tokens and of the prompt's rows at some theta.

    Of p rows the first counts as token -1, the last as -p.
    """

    def __init__(self, embeddings: Embeddings, blocks: Adaptation) -> None:
        self._embeddings = embeddings
        self._blocks = blocks
        self._start = embeddings.rows(blocks.prompt_tokens)
        self._rows = self._start
        self.prompt = -1 - np.arange(len(self._start), dtype=np.int32)
        """(p,): the rows as tokens."""

    def set(self, values: NDArray[np.float32]) -> None:
        """The prompt is that of `values` (d,)."""
        self._rows = self._start + self._blocks.prompt_moved(values)

    def of(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """(n,) -> (n, n_embd) float32."""
        found = np.empty((len(tokens), self._embeddings.width), np.float32)
        own = tokens < 0
        found[own] = self._rows[-1 - tokens[own]]
        found[~own] = self._embeddings.rows(tokens[~own])
        return found


@dataclass(frozen=True, slots=True)
class Texts:
    """What stands before the prompt in rows whose cache is kept together."""

    key: tuple[bytes, ...]
    """The rows' tokens up to the prompt: whether the cache holds these texts."""
    batches: list[Batch]


@dataclass(frozen=True, slots=True)
class Asked(Batch):
    """Prompt and answer of rows whose texts lie in the cache; tokens as `Inputs` counts them."""

    texts: Texts
    starts: list[tuple[int, int]]
    """Sequence and first position of each row."""


class PromptedPasses:
    """Forward passes of one context over rows with the prompt in its place."""

    def __init__(
        self, inputs: Inputs, blocks: Adaptation, context: Any, cells: int, batch_tokens: int
    ) -> None:
        self._inputs = inputs
        self._context = context
        self._text_cells = cells - batch_tokens
        self._batch_tokens = batch_tokens
        self._deeper = _deeper(blocks)
        self._at: NDArray[np.float32] | None = None
        self._kept: Texts | None = None
        self._asked: list[tuple[int, int]] = []

    def set(self, values: NDArray[np.float32]) -> None:
        """Stand at `values` (d,); texts are only kept while no other block moves their cache."""
        self._inputs.set(values)
        deeper = values[self._deeper]
        if self._at is None or not np.array_equal(deeper, self._at):
            self._at, self._kept = deeper, None

    def lay_out(self, examples: Sequence[Example], max_read: int) -> list[Asked]:
        """`examples` in order, part by part."""
        found: list[Asked] = []
        for part in self.parts(examples):
            found += self._group(examples[part], part.start, max_read)
        return found

    def parts(self, examples: Sequence[Example]) -> list[slice]:
        """Runs of `examples` whose texts the cache holds together."""
        sizes = [example.asked for example in examples]
        return [slice(*run) for run in packed([(sizes, self._text_cells)], SEQUENCES)]

    def forward(self, asked: Asked, *, spoiled: bool) -> int:
        """The asked positions are computed; how many were sent for that, texts included.

        `spoiled`: the cache may hold numbers that are not finite.

        Raises:
            EngineError: llama.cpp failed.
        """
        memory = native.llama_get_memory(self._context)
        kept, self._kept = self._kept, None
        sent = 0
        if spoiled or kept is None or kept.key != asked.texts.key:
            native.llama_memory_clear(memory, spoiled)
            for batch in asked.texts.batches:
                decode(self._context, batch)
                sent += len(batch.tokens)
        else:
            for sequence, start in self._asked:
                if not native.llama_memory_seq_rm(memory, sequence, start, -1):
                    raise EngineError("llama.cpp cannot cut this model's cache back")
        decode(self._context, asked, self._inputs.of(asked.tokens))
        self._kept, self._asked = asked.texts, asked.starts
        return sent + len(asked.tokens)

    def _group(self, rows: Sequence[Example], owner: int, max_read: int) -> Iterator[Asked]:
        """Of rows whose texts are kept together, the first the example `owner`."""
        prompt = self._inputs.prompt
        heads = [row.tokens[: row.asked] for row in rows]
        tails = [np.concatenate([prompt, row.tokens[row.asked :]]) for row in rows]
        longest = max(len(part) for part in [*heads, *tails])
        if longest > self._batch_tokens:
            raise EngineError(f"an example of {longest} tokens; at most {self._batch_tokens} fit")
        texts = Texts(tuple(head.tobytes() for head in heads), [])
        lengths = [len(head) for head in heads]
        for first, end in packed([(lengths, self._batch_tokens)], SEQUENCES):
            read = np.zeros(sum(lengths[first:end]), np.int8)
            batch = Batch(*_placed(heads, first, end, [0] * len(rows)), read, *_nothing())
            if len(batch.tokens):
                texts.batches.append(batch)
        sizes = [len(tail) for tail in tails]
        reads = [len(row.targets) for row in rows]
        for first, end in packed([(sizes, self._batch_tokens), (reads, max_read)], SEQUENCES):
            last = range(first, end)
            read = [np.arange(sizes[n]) >= sizes[n] - reads[n] for n in last]
            yield Asked(
                *_placed(tails, first, end, lengths),
                np.concatenate(read).astype(np.int8),
                owner + np.repeat(np.arange(first, end), reads[first:end]),
                np.concatenate([rows[n].targets for n in last]).astype(np.int64),
                texts,
                [(n, lengths[n]) for n in last],
            )


def prompted(
    path: str, header: Header, blocks: Adaptation, context: Any, batch_tokens: int
) -> PromptedPasses | None:
    """The passes of a context that `keep_texts` was asked for; none without a prompt."""
    if not len(blocks.prompt_tokens):
        return None
    inputs = Inputs(Embeddings(path, header), blocks)
    cells = int(native.llama_n_ctx(context))
    return PromptedPasses(inputs, blocks, context, cells, batch_tokens)


def keep_texts(wanted: Any, model: Any, header: Header, batch_tokens: int) -> None:
    """The context's parameters leave room for texts: 4,096 tokens, or what 64 MB hold of them."""
    heads, key_heads = native.llama_model_n_head(model), native.llama_model_n_head_kv(model)
    width = int(header.number("attention.key_length")) or native.llama_model_n_embd(model) // heads
    each = 2 * 2 * native.llama_model_n_layer(model) * key_heads * width
    room = max(min(_CELLS, _CACHE_BYTES // max(each, 1)), 2 * batch_tokens)
    wanted.n_ctx = -(-room // 256) * 256
    wanted.n_seq_max = SEQUENCES
    wanted.swa_full = True  # a window would have forgotten what a prompt sees, where it is cut back


def _deeper(blocks: Adaptation) -> NDArray[np.bool_]:
    """(d,): the parameters that a text's cache hangs on."""
    found = np.ones(blocks.offsets[-1], np.bool_)
    for number in [*numbers(blocks, "prompt"), *numbers(blocks, "output_rows")]:
        found[blocks.offsets[number] : blocks.offsets[number + 1]] = False
    return found


def _placed(
    parts: list[NDArray[np.int32]], first: int, end: int, starts: list[int]
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Tokens, positions and sequences of parts [first, end), each from its start on."""
    chosen = parts[first:end]
    lengths = [len(part) for part in chosen]
    places = [
        np.arange(start, start + length)
        for start, length in zip(starts[first:end], lengths, strict=True)
    ]
    sequences = np.repeat(np.arange(first, end), lengths)
    return (
        np.concatenate(chosen),
        np.concatenate(places).astype(np.int32),
        sequences.astype(np.int32),
    )


def _nothing() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """No owners and no targets."""
    return np.empty(0, np.int64), np.empty(0, np.int64)
