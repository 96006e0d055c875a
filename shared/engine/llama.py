"""Models in llama.cpp, through its low-level functions; the only importer of llama_cpp.

What is moved is rewritten whole: theta +- eps z goes into one LoRA that is loaded anew for each
pass, not into a second one stacked on theta's with a scale of either sign. Measured in CPU time,
by turns, rank 8 on q and v, 512 tokens a pass, medians (quartiles) of rewriting over stacking: 0.92
(0.90-0.94) on llama-3m, 60 pairs; 0.95 (0.89-1.02) on a 118 MB model, d = 98,304, 16 pairs.

Every pass runs on one batch of sequences in a unified cache with flash attention, the fastest
layout for short rows on a CPU, and is bit-identical when repeated. llama.cpp ends the process on a
batch longer than the context was made for; the context here holds the longest example.
"""

import ctypes
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from llama_cpp import _ggml
from llama_cpp import llama_cpp as typed
from numpy.typing import NDArray

from shared.engine import scoring
from shared.engine.examples import first_tokens
from shared.engine.fitting import OUTPUT, check_fit, supported_header
from shared.engine.gguf_file import Header, LoraFile, Matrix
from shared.engine.layout import Batch, batches
from shared.engine.model import Adaptation, Example, Losses, Sites
from shared.engine.protocol import Facts
from shared.errors import EngineError

native: Any = typed
"""Handles are opaque pointers, which llama_cpp's annotations call now int, now None."""

_BATCH_TOKENS = 512
_SEQUENCES = 64
_LOGITS = 1 << 24
"""Of one batch, unless one example alone has more: 64 MB."""

_ERROR_LEVEL = 4
_FINAL_STATE = b"result_norm"
_MMAP_THRESHOLD = -3

_said: deque[str] = deque(maxlen=3)
"""The last errors that llama.cpp logged."""


def _hear(level: int, text: bytes, _: object) -> None:
    if level == _ERROR_LEVEL and text.strip():
        _said.append(text.decode(errors="replace").strip())


_ear = native.llama_log_callback(_hear)


class LlamaEngine:
    """Opens GGUF files."""

    def __init__(self) -> None:
        _hold_the_heap()
        native.llama_log_set(_ear, ctypes.c_void_p(0))
        native.llama_backend_init()

    def inspect(self, path: str, words: list[str], template: str) -> Facts:
        header = supported_header(path)
        tokens: list[int] = []
        if words:
            model = _load(path, vocabulary_only=True)
            tokens = first_tokens(words, template, Vocabulary(model))
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
            parameters=sum(
                int(np.prod(shape, dtype=np.int64)) for shape in header.tensors.values()
            ),
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
        self._starts = native.llama_vocab_get_add_bos(self._vocabulary) and self._start >= 0
        self.end = int(native.llama_vocab_eos(self._vocabulary))
        self.size = int(native.llama_vocab_n_tokens(self._vocabulary))

    def tokenize(self, text: str, *, start: bool) -> list[int]:
        data = text.encode()
        room = len(data) + 8
        while True:
            found = (native.llama_token * room)()
            count = native.llama_tokenize(
                self._vocabulary, data, len(data), found, room, False, True
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
        self._model: Any = _load(path)
        super().__init__(self._model)
        self._blocks = blocks
        self._rows = blocks.output_rows
        self._choices: NDArray[np.int64] | None = None
        self._width = int(native.llama_model_n_embd(self._model))
        self._batch_tokens = max(_BATCH_TOKENS, max_tokens)
        self._watching = False
        self._states: list[NDArray[np.float32]] = []
        self._evaluated = native.ggml_backend_sched_eval_callback(self._on_evaluated)
        self._context: Any = self._open_context(path, threads)
        self._lora = _Lora(self._model, self._context, header, blocks)
        self._control = _Control(self._context, self._model, blocks)
        self._laid_out: tuple[Sequence[Example], list[Batch]] = ([], [])
        self._diverged = False
        self.forwarded = 0

    def choose_among(self, tokens: list[int]) -> None:
        self._choices = np.array(tokens, np.int64) if tokens else None

    def stand(self, values: NDArray[np.float32]) -> None:
        self._control.set(values)
        self._lora.set(values)

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

    def sites(self, examples: Sequence[Example]) -> list[Sites]:
        found: list[Sites] = []
        for batch in self._lay_out(examples):
            self._watching = True
            logits = self._forward(batch)
            self._watching = False
            hidden = np.concatenate(self._states)
            self._states.clear()
            if len(hidden) != len(logits):
                raise EngineError("llama.cpp gave no final states; use how: probe for this model")
            whole = scoring.sites(logits, hidden, batch.targets, self._rows, self._choices)
            first, last = int(batch.owners[0]), int(batch.owners[-1])
            counts = [len(example.targets) for example in examples[first : last + 1]]
            found.extend(scoring.split(whole, counts))
        return found

    def close(self) -> None:
        self._lora.close()
        native.llama_free(self._context)
        native.llama_model_free(self._model)

    def _open_context(self, path: str, threads: int) -> Any:
        wanted = native.llama_context_default_params()
        wanted.n_ctx = wanted.n_batch = wanted.n_ubatch = self._batch_tokens
        wanted.n_seq_max = _SEQUENCES
        wanted.n_threads = wanted.n_threads_batch = threads
        wanted.kv_unified = True
        wanted.op_offload = False
        wanted.no_perf = True
        if len(self._rows):
            wanted.cb_eval = self._evaluated
        context = native.llama_init_from_model(self._model, wanted)
        if not context:
            native.llama_model_free(self._model)
            raise EngineError(f"{path}: no memory for {self._batch_tokens} tokens; {_reason()}")
        return context

    def _lay_out(self, examples: Sequence[Example]) -> list[Batch]:
        """The batches of `examples`; those of the last call are kept."""
        if self._laid_out[0] is not examples:
            most_read = max(_LOGITS // self.size, 1)
            laid_out = batches(examples, self._batch_tokens, _SEQUENCES, most_read)
            self._laid_out = (examples, laid_out)
        return self._laid_out[1]

    def _forward(self, batch: Batch) -> scoring.Logits:
        """Logits of the batch's read positions: (m, n_vocab) float32, valid until the next call."""
        size = len(batch.tokens)
        if size > self._batch_tokens:
            raise EngineError(f"an example of {size} tokens; at most {self._batch_tokens} fit")
        # After a diverged pass the cache may hold NaN, which a mask of weight 0 lets through.
        native.llama_memory_clear(native.llama_get_memory(self._context), self._diverged)
        one_each = np.ones(size, np.int32)
        pointers = batch.sequences.ctypes.data + 4 * np.arange(size, dtype=np.uint64)
        sent = native.llama_batch()
        sent.n_tokens = size
        sent.token = _pointer(batch.tokens, ctypes.c_int32)
        sent.pos = _pointer(batch.positions, ctypes.c_int32)
        sent.n_seq_id = _pointer(one_each, ctypes.c_int32)
        sent.seq_id = _pointer(pointers, ctypes.POINTER(ctypes.c_int32))
        sent.logits = _pointer(batch.read, ctypes.c_int8)
        code = native.llama_decode(self._context, sent)
        if code:
            raise EngineError(f"llama.cpp could not decode (code {code}); {_reason()}")
        self.forwarded += size
        logits = native.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, shape=(len(batch.targets), self.size))

    def _on_evaluated(self, tensor: int, ask: bool, _: object) -> bool:
        """llama.cpp has computed, or asks whether we want to see, a node of its graph."""
        if ask:
            return self._watching and _tensor_name(tensor) == _FINAL_STATE
        state = np.empty((_tensor_bytes(tensor) // (4 * self._width), self._width), np.float32)
        _read_tensor(tensor, state.ctypes.data, 0, state.nbytes)
        self._states.append(state)
        return True


class _Lora:
    """The manifest's LoRA and output-row blocks as one adapter of the context."""

    def __init__(self, model: Any, context: Any, header: Header, blocks: Adaptation) -> None:
        self._model = model
        self._context = context
        self._blocks = blocks
        self._columns: dict[str, list[int]] = {}
        for number, block in enumerate(blocks.blocks):
            if block.kind == "lora_b":
                self._columns.setdefault(block.tensor, []).append(number)
        self._row_blocks = [n for n, b in enumerate(blocks.blocks) if b.kind == "output_rows"]
        self._tied = OUTPUT not in header.tensors
        self._architecture = header.architecture
        self._file: LoraFile | None = None
        self._loaded: Any = None

    def set(self, values: NDArray[np.float32]) -> None:
        """Carry `values` (d,); nothing is in the model's way while its blocks are all zero."""
        parts = {number: self._blocks.part(number, values) for number in self._numbers()}
        if self._loaded is None and not any(part.any() for part in parts.values()):
            return
        if self._row_blocks and self._tied and any(parts[n].any() for n in self._row_blocks):
            raise EngineError(
                "the model ties its output to its embeddings, so llama.cpp cannot probe output "
                f"rows; use how: exact, or a GGUF with its own {OUTPUT}"
            )
        if self._file is None:
            self._file = LoraFile(self._architecture, self._fresh(parts))
        for name, numbers in self._columns.items():
            columns = np.stack([parts[number] for number in numbers], axis=1)
            self._file.write(f"{name}.lora_b", columns)
        if self._carries_rows:
            rows = np.concatenate([parts[number] for number in self._row_blocks])
            self._file.write(f"{OUTPUT}.lora_a", rows)
        self._load(self._file.path)

    def close(self) -> None:
        self._unload()
        if self._file is not None:
            self._file.close()

    @property
    def _carries_rows(self) -> bool:
        return bool(self._row_blocks) and not self._tied

    def _numbers(self) -> list[int]:
        columns = [number for numbers in self._columns.values() for number in numbers]
        return [*columns, *self._row_blocks]

    def _fresh(self, parts: dict[int, NDArray[np.float32]]) -> list[Matrix]:
        """All tensors of the adapter: what stays, and room for what is rewritten."""
        tensors: list[Matrix] = []
        for name, numbers in self._columns.items():
            fixed = np.stack([self._blocks.fixed_a(number) for number in numbers])
            tensors.append((f"{name}.lora_a", fixed))
            outs = len(parts[numbers[0]])
            tensors.append((f"{name}.lora_b", np.zeros((outs, len(numbers)), np.float32)))
        if self._carries_rows:
            rows = self._blocks.output_rows
            width = parts[self._row_blocks[0]].shape[1]
            tensors.append((f"{OUTPUT}.lora_a", np.zeros((len(rows), width), np.float32)))
            size = native.llama_vocab_n_tokens(native.llama_model_get_vocab(self._model))
            selector = np.zeros((size, len(rows)), np.float32)
            selector[rows, np.arange(len(rows))] = 1.0
            tensors.append((f"{OUTPUT}.lora_b", selector))
        return tensors

    def _load(self, path: str) -> None:
        self._unload()
        loaded = native.llama_adapter_lora_init(self._model, path.encode())
        if not loaded:
            raise EngineError(f"llama.cpp cannot carry the adapter: {_reason()}")
        self._loaded = loaded
        adapters = (native.llama_adapter_lora_p_ctypes * 1)(loaded)
        native.llama_set_adapters_lora(self._context, adapters, 1, (ctypes.c_float * 1)(1.0))

    def _unload(self) -> None:
        if self._loaded is not None:
            native.llama_set_adapters_lora(self._context, None, 0, None)
            native.llama_adapter_lora_free(self._loaded)
            self._loaded = None


class _Control:
    """The manifest's control vectors in the context."""

    def __init__(self, context: Any, model: Any, blocks: Adaptation) -> None:
        self._context = context
        self._blocks = blocks
        self._numbers = [n for n, block in enumerate(blocks.blocks) if block.kind == "control"]
        layers = int(native.llama_model_n_layer(model))
        width = int(native.llama_model_n_embd(model))
        self._vectors = np.zeros((layers - 1, width), np.float32)
        """Of layers 1 and up: (n_layer - 1, n_embd)."""
        self._set = False

    def set(self, values: NDArray[np.float32]) -> None:
        """Carry `values` (d,); nothing is in the model's way while its blocks are all zero."""
        parts = {number: self._blocks.part(number, values) for number in self._numbers}
        if not parts or not (self._set or any(part.any() for part in parts.values())):
            return
        layers = {number: self._blocks.blocks[number].layer for number in parts}
        self._vectors[:] = 0.0
        for number, part in parts.items():
            self._vectors[layers[number] - 1] += part
        code = native.llama_set_adapter_cvec(
            self._context,
            _pointer(self._vectors, ctypes.c_float),
            self._vectors.size,
            self._vectors.shape[1],
            min(layers.values()),
            max(layers.values()),
        )
        if code:
            raise EngineError(f"llama.cpp cannot carry the control vector: {_reason()}")
        self._set = True


def _load(path: str, *, vocabulary_only: bool = False) -> Any:
    wanted = native.llama_model_default_params()
    wanted.n_gpu_layers = 0
    wanted.load_mode = native.LLAMA_LOAD_MODE_MMAP
    wanted.vocab_only = vocabulary_only
    model = native.llama_model_load_from_file(path.encode(), wanted)
    if not model:
        raise EngineError(f"{path}: llama.cpp cannot load it: {_reason()}")
    return model


def _hold_the_heap() -> None:
    """Give large blocks back to the system at once.

    Each new adapter makes llama.cpp plan its graphs anew; with glibc's default, which raises its
    threshold as it goes, the heap grew by 40 MB in a thousand reloads, and not at all like this.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_MMAP_THRESHOLD, 1 << 20)


def _reason() -> str:
    """What llama.cpp logged last."""
    said = " | ".join(_said)
    _said.clear()
    return said or "it gave no reason"


def _pointer(array: NDArray[Any], kind: Any) -> Any:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))


_tensor_name: Any = _ggml.libggml.ggml_get_name
_tensor_name.argtypes, _tensor_name.restype = [ctypes.c_void_p], ctypes.c_char_p
_tensor_bytes: Any = _ggml.libggml.ggml_nbytes
_tensor_bytes.argtypes, _tensor_bytes.restype = [ctypes.c_void_p], ctypes.c_size_t
_read_tensor: Any = _ggml.libggml.ggml_backend_tensor_get
_read_tensor.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
_read_tensor.restype = None
