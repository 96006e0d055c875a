"""Models in llama.cpp, through its low-level functions.

Every pass runs on one batch of sequences in a unified cache with flash attention, the fastest
layout for short rows on a CPU, and is bit-identical when repeated. llama.cpp ends the process on a
batch longer than the context was made for; the context here holds the longest example.
"""

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shared.engine import scoring
from shared.engine.block_sites import BlockSites
from shared.engine.block_weights import BlockWeights, last_block_tensors
from shared.engine.decoding import decode
from shared.engine.embeddings import Embeddings, rms
from shared.engine.examples import first_tokens, tokens_after
from shared.engine.fitting import OUTPUT, check_fit, supported_header
from shared.engine.gguf_file import Header
from shared.engine.last_block import LastBlock
from shared.engine.layout import Batch, batches
from shared.engine.llama_adapters import Control, Lora
from shared.engine.model import Adaptation, Example, Losses, Sites
from shared.engine.native import (
    load,
    native,
    read_tensor,
    reason,
    start,
    tensor_bytes,
    tensor_name,
)
from shared.engine.protocol import Facts
from shared.engine.soft_prompt import Asked, keep_texts, prompted
from shared.errors import EngineError

if TYPE_CHECKING:
    from shared.engine.chat import ChatTemplate  # Jinja, which only conversations need

_BATCH_TOKENS = 256
"""Rows of a batch attend to each other's places, only to be masked: more tokens waste more of that.

CPU time against 512, llama-3m 0.91, Q4_K_M 0.92; a 118 MB model 0.98 (rows of one length) to 1.01.
"""
_SEQUENCES = 64
_LOGITS = 1 << 24
"""Of one batch, unless one example alone has more: 64 MB."""

_FINAL_STATE = b"result_norm"
_LAYER_END = b"l_out-%d"
_NOTHING = np.empty((0, 0), np.float32)


class LlamaEngine:
    """Opens GGUF files."""

    def __init__(self) -> None:
        start()

    def inspect(self, path: str, words: list[str], template: str, prompt: str = "") -> Facts:
        header = supported_header(path)
        tokens: list[int] = []
        start: list[int] = []
        if words or prompt:
            model = load(path, vocabulary_only=True)
            vocabulary = Vocabulary(model)
            tokens = first_tokens(words, template, vocabulary)
            start = tokens_after(template, prompt, vocabulary) if prompt else []
            native.llama_model_free(model)
        embedding = header.tensors.get("token_embd.weight", (0, 0))
        return Facts(
            architecture=header.architecture,
            n_embd=int(header.number("embedding_length")),
            n_layer=int(header.number("block_count")),
            n_vocab=embedding[1],
            n_ctx_train=int(header.number("context_length")),
            tied=OUTPUT not in header.tensors,
            matrices={
                name: [shape[1], shape[0]]
                for name, shape in header.tensors.items()
                if len(shape) == 2
            },
            tokens=tokens,
            last_block=sorted(last_block_tensors(path, header)),
            parameters=sum(
                int(np.prod(shape, dtype=np.int64)) for shape in header.tensors.values()
            ),
            prompt=start,
            prompt_rms=rms(Embeddings(path, header).rows(np.array(start))) if start else 0.0,
        )

    def open(self, path: str, blocks: Adaptation, threads: int, max_tokens: int) -> "LlamaModel":
        header = supported_header(path)
        check_fit(path, header, blocks, max_tokens)
        return LlamaModel(path, header, blocks, threads, max_tokens)


class Vocabulary:
    """A model's tokenizer."""

    def __init__(self, model: Any) -> None:
        self._vocabulary = native.llama_model_get_vocab(model)
        self._start = native.llama_vocab_bos(self._vocabulary)
        self._starts = bool(native.llama_vocab_get_add_bos(self._vocabulary)) and self._start >= 0
        self.end = int(native.llama_vocab_eos(self._vocabulary))
        self.size = int(native.llama_vocab_n_tokens(self._vocabulary))
        self._template: bytes | None = native.llama_model_chat_template(model, None)

    @property
    def controls(self) -> re.Pattern[str]:
        return self._controls

    @cached_property
    def _controls(self) -> re.Pattern[str]:
        kinds = native.LLAMA_TOKEN_ATTR_CONTROL | native.LLAMA_TOKEN_ATTR_UNKNOWN
        spelled = {
            self.spelling(token)
            for token in range(self.size)
            if native.llama_vocab_get_attr(self._vocabulary, token) & kinds
        }
        longest_first = sorted(filter(None, spelled), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @property
    def chat(self) -> "ChatTemplate":
        return self._chat

    @cached_property
    def _chat(self) -> "ChatTemplate":
        from shared.engine.chat import ChatTemplate

        text = self._template.decode(errors="replace") if self._template else None
        bos, eos = self.spelling(self._start), self.spelling(self.end)
        return ChatTemplate(text, bos, eos, starts=self._starts)

    def spelling(self, token: int) -> str:
        """The token as the vocabulary spells it; nothing where there is none (-1)."""
        if token < 0:
            return ""
        return native.llama_vocab_get_text(self._vocabulary, token).decode(errors="replace")

    def tokenize(self, text: str, *, start: bool, special: bool = True) -> list[int]:
        data = text.encode()
        room = len(data) + 8
        while True:
            found = (native.llama_token * room)()
            count = native.llama_tokenize(
                self._vocabulary, data, len(data), found, room, False, special
            )
            if count >= 0:
                break
            room = -count
        return [self._start, *found[:count]] if start and self._starts else list(found[:count])


class LlamaModel(Vocabulary):
    """One model with one context, its blocks as a LoRA and a control vector."""

    def __init__(
        self, path: str, header: Header, blocks: Adaptation, threads: int, max_tokens: int
    ) -> None:
        self._model: Any = load(path)
        super().__init__(self._model)
        self._blocks = blocks
        self._rows = blocks.output_rows
        self._choices: NDArray[np.int64] | None = None
        self._width = int(native.llama_model_n_embd(self._model))
        self._batch_tokens = max(_BATCH_TOKENS, max_tokens)
        self._path, self._header = path, header
        self._watched: tuple[bytes, ...] = ()
        self._states: dict[bytes, list[NDArray[np.float32]]] = {}
        self._evaluated = native.ggml_backend_sched_eval_callback(self._on_evaluated)
        self._context: Any = self._open_context(path, header, threads)
        self._lora = Lora(self._model, self._context, header, blocks)
        self._control = Control(self._context, self._model, blocks)
        self._prompted = prompted(path, header, blocks, self._context, self._batch_tokens)
        self._laid_out: tuple[Sequence[Example], Sequence[Batch]] = ([], [])
        self._diverged = False
        self.forwarded = 0

    def choose_among(self, tokens: list[int]) -> None:
        self._choices = np.array(tokens, np.int64) if tokens else None

    def stand(self, values: NDArray[np.float32]) -> None:
        self._control.set(values)
        self._lora.set(values)
        if self._prompted is not None:
            self._prompted.set(values)

    def parts(self, examples: Sequence[Example]) -> list[slice]:
        if self._prompted is not None:
            return self._prompted.parts(examples)
        return [slice(0, len(examples))]

    def measure(self, examples: Sequence[Example]) -> Losses:
        loss = np.zeros(len(examples), np.float64)
        wrong = np.zeros(len(examples), np.int64)
        for batch in self._lay_out(examples):
            at_site, right = scoring.losses(self._forward(batch), batch.targets, self._choices)
            np.add.at(loss, batch.owners, at_site)
            np.add.at(wrong, batch.owners, ~right)
        self._diverged = not np.isfinite(loss).all()
        weight = np.array([len(example.targets) for example in examples], np.int64)
        return Losses(loss, weight, wrong == 0)

    def logits(self, examples: Sequence[Example]) -> Iterator[scoring.Logits]:
        """The logits where `examples` are read, in order and a batch at a time: (m, n_vocab).

        Each is valid until the next is asked for.
        """
        for batch in self._lay_out(examples):
            yield self._forward(batch)

    def sites(self, examples: Sequence[Example]) -> list[Sites]:
        found: list[Sites] = []
        for batch in self._lay_out(examples):
            logits, (hidden,) = self._watch(batch, _FINAL_STATE)
            whole = scoring.sites(logits, hidden, batch.targets, self._rows, self._choices)
            counts = [len(example.targets) for example in _of(batch, examples)]
            found.extend(scoring.split(whole, counts))
        return found

    def last_block(self) -> LastBlock:
        weights = BlockWeights(self._path, self._header)
        return LastBlock(weights, self._blocks, self._choices)

    def block_sites(self, examples: Sequence[Example], block: LastBlock) -> list[BlockSites]:
        entering = _LAYER_END % (int(self._header.number("block_count")) - 2)
        found: list[BlockSites] = []
        for batch in self._lay_out(examples):
            _, (hidden, streams) = self._watch(batch, _FINAL_STATE, entering)
            chosen = _of(batch, examples)
            ends = np.cumsum([len(example.tokens) for example in chosen])[:-1]
            sites = np.cumsum([len(example.targets) for example in chosen])[:-1]
            found.extend(block.sites(chosen, np.split(streams, ends), np.split(hidden, sites)))
        return found

    def close(self) -> None:
        self._lora.close()
        native.llama_free(self._context)
        native.llama_model_free(self._model)

    def _open_context(self, path: str, header: Header, threads: int) -> Any:
        wanted = native.llama_context_default_params()
        wanted.n_ctx = wanted.n_batch = wanted.n_ubatch = self._batch_tokens
        wanted.n_seq_max = _SEQUENCES
        wanted.n_threads = wanted.n_threads_batch = threads
        wanted.kv_unified = True
        wanted.op_offload = False
        wanted.no_perf = True
        if len(self._blocks.prompt_tokens):
            keep_texts(wanted, self._model, header, self._batch_tokens)
        if self._may_watch(header):  # it is called for every node of the graph
            wanted.cb_eval = self._evaluated
        context = native.llama_init_from_model(self._model, wanted)
        if not context:
            native.llama_model_free(self._model)
            raise EngineError(f"{path}: no memory for {self._batch_tokens} tokens; {reason()}")
        return context

    def _may_watch(self, header: Header) -> bool:
        """Whether the manifest has what a closed form reads inner states for."""
        lora = [block.tensor for block in self._blocks.blocks if block.kind == "lora_b"]
        last = f"blk.{int(header.number('block_count')) - 1}."
        inside = bool(lora) and all(tensor.startswith(last) for tensor in lora)
        return inside or len(self._rows) > 0

    def _lay_out(self, examples: Sequence[Example]) -> Sequence[Batch]:
        """The batches of `examples`; those of the last call are kept."""
        if self._laid_out[0] is not examples:
            most_read = max(_LOGITS // self.size, 1)
            if self._prompted is not None:
                laid_out = self._prompted.lay_out(examples, most_read)
            else:
                laid_out = batches(examples, self._batch_tokens, _SEQUENCES, most_read)
            self._laid_out = (examples, laid_out)
        return self._laid_out[1]

    def _forward(self, batch: Batch) -> scoring.Logits:
        """Logits of the batch's read positions: (m, n_vocab) float32, valid until the next call."""
        # After a diverged pass the cache may hold NaN, which a mask of weight 0 lets through.
        if self._prompted is not None and isinstance(batch, Asked):
            self.forwarded += self._prompted.forward(batch, spoiled=self._diverged)
        else:
            size = len(batch.tokens)
            if size > self._batch_tokens:
                raise EngineError(f"an example of {size} tokens; at most {self._batch_tokens} fit")
            native.llama_memory_clear(native.llama_get_memory(self._context), self._diverged)
            decode(self._context, batch)
            self.forwarded += size
        logits = native.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, shape=(len(batch.targets), self.size))

    def _watch(
        self, batch: Batch, *names: bytes
    ) -> tuple[scoring.Logits, list[NDArray[np.float32]]]:
        """A pass's logits, and the states of width n_embd that `names` call in its graph."""
        self._watched = names
        try:
            logits = self._forward(batch)
        finally:
            self._watched = ()
            seen, self._states = self._states, {}
        states = [np.concatenate(seen.get(name, [_NOTHING])) for name in names]
        lengths = [len(logits) if name == _FINAL_STATE else len(batch.tokens) for name in names]
        if [len(state) for state in states] != lengths:
            raise EngineError("llama.cpp gave no inner states; use how: probe for this model")
        return logits, states

    def _on_evaluated(self, tensor: int, ask: bool, _: object) -> bool:
        """llama.cpp has computed, or asks whether we want to see, a node of its graph."""
        if not self._watched:
            return False
        name: bytes = tensor_name(tensor)
        if ask:
            return name in self._watched
        state = np.empty((tensor_bytes(tensor) // (4 * self._width), self._width), np.float32)
        read_tensor(tensor, state.ctypes.data, 0, state.nbytes)
        self._states.setdefault(name, []).append(state)
        return True


def _of(batch: Batch, examples: Sequence[Example]) -> Sequence[Example]:
    """Those of `examples` that a batch holds."""
    return examples[int(batch.owners[0]) : int(batch.owners[-1]) + 1]
