"""A generation: one model, one context, one version's adapter. It serves until its last answer.

Output rows are added here, to the logits, from the state after the output norm: exactly what the
devices tune, also where llama.cpp has no LoRA for the output matrix because it is the embeddings'.
llama.cpp ends the process on a batch longer than the context was made for: that is checked first.
"""

import ctypes
import math
import threading
import time
from collections.abc import Mapping
from collections.abc import Sequence as Several
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.proxy_inference.batching import Forget, Plan, Schedule, Sequence
from services.proxy_inference.llama_batch import LlamaBatch
from services.proxy_inference.running import Run
from services.proxy_inference.shelf import ModelFile
from services.proxy_inference.speaking import BATCH_TOKENS, Heard, Room, Settled, parted
from services.proxy_inference.vocabulary import Detokenizer
from shared.adapter import Adapter
from shared.engine.embeddings import Embeddings
from shared.engine.fitting import check_fit, supported_header
from shared.engine.gguf_file import Header, read_header
from shared.engine.llama_adapters import Control, Lora
from shared.engine.model import Adaptation
from shared.engine.native import (
    load,
    logits_at,
    native,
    read_tensor,
    reason,
    remove_tokens,
    start,
    tensor_bytes,
    tensor_name,
)
from shared.engine.soft_prompt import Inputs
from shared.errors import EngineError

_FINAL_STATE = b"result_norm"
_SMALL_BYTES = 1 << 27
_MOST_SCORES_BYTES = 1 << 28
"""A small model, whose scores take no more, has its attention computed whole and not by `flash`:
that takes half the time for several tokens of a pass. But it looks at all that the cache holds, of
whomever; so the cache keeps little of what nobody uses."""
_IDLE_CELLS = 512
_MOST_LOGITS = 1 << 24
"""Of one pass: 64 MB."""
_MOST_FILLED = 16
"""Passes of fewer tokens may be filled up to what costs less."""
_TRIALS = 6
_TRIALS_S = 2.0
"""Where they take longer, passes are sent as they are: nobody is served meanwhile, and on a machine
that is so busy they tell little."""
_GAIN = 0.95
_HELD = 256
"""Tokens in the cache while passes are timed."""

_adapters = threading.Lock()
"""A model keeps a list of its adapters; two threads must not change it at once."""


class Weights:
    """A GGUF file in memory, shared by the generations over it."""

    def __init__(self, file: ModelFile, *, tuned: bool = True) -> None:
        """`tuned`: the fleet's adapters are to fit; else any architecture of llama.cpp's will do.

        Raises EngineError for a file that cannot be served; names it and the mend.
        """
        start()
        self.file = file
        self.path = path = str(file.path)
        self.digest = file.digest
        self.header: Header = supported_header(path) if tuned else read_header(path)
        self.model: Any = load(path)
        self.vocabulary = Detokenizer(self.model)
        self.width = int(native.llama_model_n_embd(self.model))
        self.trained_tokens = int(native.llama_model_n_ctx_train(self.model))
        self.users = 0

    def close(self) -> None:
        native.llama_model_free(self.model)


class Generation:
    """Steps one version's sequences. Opened and closed by one thread, stepped by another."""

    def __init__(
        self, weights: Weights, adapter: Adapter | None, room: Room, *, drafted: bool = False
    ) -> None:
        """It has computed a first token. `drafted`: its passes will be now shorter, now longer.

        Raises:
            EngineError: the adapter does not fit the model, there is no memory, or the model says
                nothing finite with it.
        """
        self.weights = weights
        self.room = room
        self.limit = min(room.cells, weights.trained_tokens or room.cells)
        """Tokens of the longest prompt and answer together."""
        self.most_reads = max(_MOST_LOGITS // weights.vocabulary.size, 1)
        heads = int(native.llama_model_n_head(weights.model))
        scores_bytes = 4 * heads * BATCH_TOKENS * room.cells
        small = int(native.llama_model_size(weights.model)) <= _SMALL_BYTES
        self._whole = small and scores_bytes <= _MOST_SCORES_BYTES
        self.idle_cells = _IDLE_CELLS if self._whole else room.cells
        self._rows = np.empty(0, np.int64)
        self._deltas = np.empty((0, weights.width), np.float32)
        self._watching = False
        self._states: list[NDArray[np.float32]] = []
        self._evaluated = native.ggml_backend_sched_eval_callback(self._on_evaluated)
        self._lora: Lora | None = None
        self.prompt: list[int] = []
        """What a request's prompt ends with: the rows of a soft prompt, as `Inputs` counts them."""
        adaptation = _adaptation(adapter) if adapter else None
        if adaptation:
            check_fit(weights.path, weights.header, adaptation, 0)
        rows = adaptation is not None and any(
            block.kind == "output_rows" for block in adaptation.blocks
        )
        self._context: Any = self._open_context(watched=rows)
        self._memory: Any = native.llama_get_memory(self._context)
        self._logits: dict[tuple[int, int], NDArray[np.float32]] = {}
        """By address and rows."""
        self._filled_up = False
        """Whether the cache holds what filled the last pass up."""
        self._drafted = drafted
        self._batch = LlamaBatch(BATCH_TOKENS, room.lanes, drafted=drafted)
        self._fillings = range(_MOST_FILLED + 1)
        """To how many tokens a pass of so many is filled up."""
        try:
            if adapter and adaptation and len(adaptation.prompt_tokens):
                self._ask_softly(adaptation, adapter.values())
            if adapter and adaptation:
                self._carry(adaptation, adapter.values())
            self._try()
        except EngineError:
            self.close()
            raise

    def decode(self, plan: Plan) -> NDArray[np.float32]:
        """Logits of the plan's read positions, in its order: (reads, n_vocab) float32.

        They are valid, and the caller's to change, until the next call.

        Raises:
            EngineError: llama.cpp failed; the cache is in no known state.
        """
        size = plan.size
        filled = self.filled(size)
        reads = self._batch.fill(plan, size, filled)
        self._edit(plan)
        if not size:
            return np.empty((0, self.weights.vocabulary.size), np.float32)
        self._filled_up = filled > size
        self._watching = bool(reads) and len(self._rows) > 0
        code = native.llama_decode(self._context, self._batch.sent)
        self._watching = False
        if code:
            self._states.clear()
            raise EngineError(f"llama.cpp could not decode (code {code}); {reason()}")
        if not reads:
            native.llama_synchronize(self._context)
            return np.empty((0, self.weights.vocabulary.size), np.float32)
        logits = self._read(reads)
        if len(self._rows):
            states = np.concatenate(self._states)[:reads]
            self._states.clear()
            if len(states) < reads:
                raise EngineError("llama.cpp gave no final states: output rows cannot be served")
            logits[:, self._rows] += states @ self._deltas.T
        return logits

    def _read(self, reads: int) -> NDArray[np.float32]:
        """llama.cpp's own logits, not a copy."""
        at = logits_at(self._context)
        assert at
        found = self._logits.get((at, reads))
        if found is None:
            if len(self._logits) >= _MOST_FILLED:
                self._logits.clear()
            count = reads * self.weights.vocabulary.size
            memory = memoryview((ctypes.c_float * count).from_address(at))
            found = self._logits[at, reads] = np.frombuffer(memory, np.float32).reshape(reads, -1)
        return found

    def speak(self, plan: Plan, schedule: Schedule, runs: Mapping[Sequence, Run]) -> list[Heard]:
        """As `decode`, by sequence; what waits and who asks make no difference."""
        return parted(plan.shares, self.decode(plan))

    def settle(self, settled: list[Settled]) -> None:
        """Nothing is learnt from it."""

    def clear(self) -> None:
        """The cache is empty, of numbers too: what was not finite could leak through a mask."""
        native.llama_memory_clear(self._memory, True)

    def close(self) -> None:
        with _adapters:
            if self._lora is not None:
                self._lora.close()
        native.llama_free(self._context)

    def _carry(self, adaptation: Adaptation, values: NDArray[np.float32]) -> None:
        """Output rows go to the logits; every other block into the context."""
        rows = [n for n, block in enumerate(adaptation.blocks) if block.kind == "output_rows"]
        if rows:
            self._rows = adaptation.output_rows
            if len(set(self._rows.tolist())) != len(self._rows):
                raise EngineError("manifest: an output row is tuned by two blocks")
            self._deltas = np.concatenate([adaptation.part(n, values) for n in rows])
        deeper, deeper_values = _without(adaptation, rows, values)
        if not deeper.blocks:
            return
        with _adapters:
            self._lora = Lora(self.weights.model, self._context, self.weights.header, deeper)
            self._lora.set(deeper_values)
        Control(self._context, self.weights.model, deeper).set(deeper_values)

    def _ask_softly(self, adaptation: Adaptation, values: NDArray[np.float32]) -> None:
        """Everything is sent as embeddings, a soft prompt's rows among them."""
        inputs = Inputs(Embeddings(self.weights.path, self.weights.header), adaptation)
        inputs.set(values)
        self.prompt = inputs.prompt.tolist()
        self._batch = LlamaBatch(BATCH_TOKENS, self.room.lanes, inputs, drafted=self._drafted)

    def _try(self) -> None:
        """One token, so that a version that cannot speak is refused before it serves anyone."""
        logits = self.decode(self.trial(1))
        finite = bool(np.isfinite(logits).all())
        self.clear()
        if not finite:
            raise EngineError("the model's answers are not finite with this adapter")
        if self._whole and self.room.lanes > 1 and self.room.cells > 2 * _HELD:
            self._fillings = self._measured_fillings()

    def filled(self, size: int) -> int:
        """How many tokens a pass of `size` is sent with."""
        return self._fillings[size] if size < len(self._fillings) else size

    def occupy(self) -> bool:
        """Fill lane 0 for trials in others, as others' texts do in service; whether it matters."""
        matters = self._whole and self.room.lanes > 1 and self.room.cells > 2 * _HELD
        if matters:
            self.decode(self.trial(_HELD))
        return matters

    def trial(self, size: int, lane: int = 0) -> Plan:
        """A pass of `size` tokens, all of them read, into the empty lane `lane`."""
        schedule = Schedule(lanes=1, cells=size, batch_tokens=size, most_reads=size)
        schedule.lanes[0].number = lane
        schedule.add(Sequence([max(self.weights.vocabulary.end, 0)] * size, read_from=0))
        return schedule.next()

    def _measured_fillings(self) -> Several[int]:
        """llama.cpp's kernels are made for some widths: one or three tokens may cost more than four
        do."""
        sizes = range(1, _MOST_FILLED + 1)
        seconds = dict.fromkeys(sizes, math.inf)
        found, until = [0, *sizes], time.perf_counter() + _TRIALS_S
        self.occupy()
        for _ in range(_TRIALS):
            for size in sizes:
                if time.perf_counter() > until:
                    self.clear()
                    return found
                began = time.perf_counter()
                self.decode(self.trial(size, lane=1))
                seconds[size] = min(seconds[size], time.perf_counter() - began)
                self.decode(Plan([Forget(1, 0)]))
        self.clear()
        for size in sizes:
            best = min(range(size, _MOST_FILLED + 1), key=lambda one: seconds[one])
            if seconds[best] < _GAIN * seconds[size]:
                found[size] = best
        return found

    def _open_context(self, *, watched: bool) -> Any:
        wanted = native.llama_context_default_params()
        wanted.n_ctx = self.room.cells + _MOST_FILLED
        wanted.n_batch = wanted.n_ubatch = BATCH_TOKENS
        wanted.n_seq_max = self.room.lanes + 1  # one more, for what fills a pass up
        wanted.n_threads = wanted.n_threads_batch = self.room.threads
        wanted.kv_unified = True
        wanted.swa_full = True  # so that a prefix can be cut back where layers see a window
        wanted.op_offload = False
        wanted.no_perf = True
        if self._whole:
            wanted.flash_attn_type = native.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if watched:
            wanted.cb_eval = self._evaluated
        context = native.llama_init_from_model(self.weights.model, wanted)
        if not context:
            raise EngineError(
                f"{self.weights.path}: no memory for {self.room.cells} tokens; lower "
                f"--context-tokens; {reason()}"
            )
        return context

    def _edit(self, plan: Plan) -> None:
        if self._filled_up:
            remove_tokens(self._memory, self.room.lanes, -1, -1)
            self._filled_up = False
        for edit in plan.edits:
            if isinstance(edit, Forget):
                if not remove_tokens(self._memory, edit.lane, edit.start, -1):
                    raise EngineError("llama.cpp cannot cut this model's cache back")
            else:
                native.llama_memory_seq_cp(self._memory, edit.source, edit.lane, 0, edit.count)

    def _on_evaluated(self, tensor: int, ask: bool, _: object) -> bool:
        """llama.cpp has computed, or asks whether we want to see, a node of its graph."""
        if ask:
            return self._watching and tensor_name(tensor) == _FINAL_STATE
        width = self.weights.width
        state = np.empty((tensor_bytes(tensor) // (4 * width), width), np.float32)
        read_tensor(tensor, state.ctypes.data, 0, state.nbytes)
        self._states.append(state)
        return True


def steering(small: Weights, adapter: Adapter, room: Room) -> Generation:
    """The tuned small model, for a large one that it is to steer.

    Raises:
        EngineError: it has a soft prompt, or cannot be served.
    """
    tuned = Generation(small, adapter, room)
    if tuned.prompt:
        tuned.close()
        raise EngineError(
            "a version with a soft prompt steers no large model: its tokens have other places"
        )
    return tuned


def _adaptation(adapter: Adapter) -> Adaptation:
    manifest = adapter.manifest
    return Adaptation(
        manifest.architecture,
        manifest.seed,
        manifest.epoch_of_a,
        manifest.blocks,
        adapter.layout.offsets,
    )


def _without(
    adaptation: Adaptation, numbers: list[int], values: NDArray[np.float32]
) -> tuple[Adaptation, NDArray[np.float32]]:
    """The adaptation and its values without the blocks `numbers`."""
    kept = [n for n in range(len(adaptation.blocks)) if n not in set(numbers)]
    parts = [adaptation.part(n, values).ravel() for n in kept]
    offsets = [0, *np.cumsum([part.size for part in parts]).tolist()]
    blocks = [adaptation.blocks[n] for n in kept]
    changed = Adaptation(
        adaptation.architecture, adaptation.seed, adaptation.epoch, blocks, offsets
    )
    return changed, np.concatenate(parts) if parts else np.empty(0, np.float32)
