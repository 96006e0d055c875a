"""The small model in torch: its float checkpoint, and a manifest's blocks as peft's LoRA on it.

Row of the checkpoint and of the GGUF file are told apart only here: what goes in and comes out is
theta as floats, (d,) float32, in the manifest's order.
"""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from services.distiller.buckets import Buckets, Floats, cut, joined
from services.distiller.kept import Kept
from services.distiller.public import Public
from shared.engine.hub_names import Heads, module, their_rows
from shared.engine.llama import Vocabulary
from shared.engine.loras import Loras
from shared.engine.model import Adaptation, Example
from shared.errors import EngineError

_MODEL_TYPES = {"gemma3": "gemma3_text"}
"""By architecture, what a checkpoint calls itself where that is not the same word."""
_AT_ONCE = 1 << 24
"""Logits of one pass: 64 MB, and several times that where the pass is learned from."""
_HEARD_ROWS = 64
_COMPARED_ROWS = 64


@dataclass(frozen=True, slots=True)
class _Part:
    """A LoRA of peft and the blocks that it carries."""

    module: str
    blocks_a: dict[int, int]
    """Row of A that moves, and its block."""
    blocks_b: list[int]
    """The block of each column of B; none where B is fixed."""
    rows: NDArray[np.int64]
    """Which row of the GGUF tensor stands at each row of the module's weight."""


class Student:
    """Stands at some theta; `values` is where training has brought it."""

    def __init__(self, folder: Path, blocks: Adaptation, *, device: str = "cpu") -> None:
        """The checkpoint in `folder`, in float32, at theta = 0.

        Raises:
            EngineError: the checkpoint is missing or another model's, or peft has no form for a
                block; names it.
        """
        self._blocks = blocks
        self._kept, self._origin = Kept(None, 0), tuple[object, ...]()
        strange = {block.kind for block in blocks.blocks} & {"control", "prompt"}
        if strange:
            raise EngineError(
                f"the job tunes blocks of kind {min(strange)}, which peft has no form for: only "
                "lora and output_rows can be distilled"
            )
        self._device = _device(device)
        whole = _loaded(folder, blocks.architecture)
        self._heads = Heads(
            int(whole.config.num_attention_heads), int(whole.config.num_key_value_heads or 0)
        )
        self._loras = Loras(blocks)
        self._parts = self._named(whole)
        ranks = {part.module: self._rank(part) for part in self._parts}
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=1,
            lora_alpha=1,
            lora_dropout=0.0,
            bias="none",
            target_modules=list(ranks),
            rank_pattern=ranks,
            alpha_pattern=ranks,
        )
        with warnings.catch_warnings():
            # That a tied output could not be merged: nothing is merged here.
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings", category=UserWarning)
            # Of peft's own use of transformers.
            warnings.filterwarnings("ignore", message="`is_gradient", category=FutureWarning)
            self._peft: Any = get_peft_model(whole, config)
        self._whole: Any = whole.to(self._device).eval()
        self.width: int = self._whole.get_output_embeddings().weight.shape[0]
        """How many tokens it predicts."""
        self._place()
        self.stand(np.zeros(blocks.offsets[-1], np.float32))

    def stand(self, values: Floats) -> None:
        """Be at `values`, (d,) float32."""
        with torch.no_grad():
            for part in self._parts:
                a, b = self._matrices(part)
                if part.module == "lm_head" and not part.blocks_b:
                    a.copy_(torch.from_numpy(self._output_rows(values)))
                    continue
                tensor = self._tensor(part)
                a.copy_(torch.from_numpy(self._loras.a(tensor, values)))
                b.copy_(torch.from_numpy(self._loras.b(tensor, values)[part.rows]))

    def values(self) -> Floats:
        """Where it stands: (d,) float32."""
        offsets = self._blocks.offsets
        found = np.zeros(offsets[-1], np.float32)
        for part in self._parts:
            a, b = (one.detach().cpu().numpy() for one in self._matrices(part))
            if part.module == "lm_head" and not part.blocks_b:
                self._put_output_rows(a, found)
                continue
            in_file = np.empty_like(b)
            in_file[part.rows] = b
            for column, number in enumerate(part.blocks_b):
                found[offsets[number] : offsets[number + 1]] = in_file[:, column]
            for row, number in part.blocks_a.items():
                first = self._loras.slots[self._tensor(part)][row]
                moved = a[row] - self._blocks.fixed_a(first)
                found[offsets[number] : offsets[number + 1]] = moved
        return found

    def parameters(self) -> list[Tensor]:
        """What theta moves."""
        return [one for one in self._peft.parameters() if one.requires_grad]

    def logits(self, examples: Sequence[Example]) -> Tensor:
        """What it predicts where `examples` are read: (m, n_vocab).

        Nothing attends to what comes after it, so rows padded at the right need no mask.
        """
        lengths = [len(one.tokens) for one in examples]
        tokens = np.zeros((len(examples), max(lengths)), np.int64)
        for row, one in enumerate(examples):
            tokens[row, : lengths[row]] = one.tokens
        reads = [len(one.targets) for one in examples]
        rows = np.repeat(np.arange(len(examples)), reads)
        places = np.concatenate([np.arange(n - m, n) for n, m in zip(lengths, reads, strict=True)])
        sent = torch.from_numpy(tokens).to(self._device)
        states = self._whole.model(input_ids=sent, use_cache=False).last_hidden_state
        found: Tensor = self._whole.lm_head(states[rows, places])
        return found

    def keep(self, kept: Kept, origin: tuple[object, ...]) -> None:
        """What it says from now on is kept; all but its values follows from `origin`."""
        self._kept, self._origin = kept, origin

    def heard(self, values: Floats, public: Public, like: Buckets, temperature: float) -> Buckets:
        """What it says at `values` of the tokens that `like` has."""
        at, ids = hashlib.sha256(values.data), hashlib.sha256(like.ids.data)
        parts = ("small", *self._origin, at.hexdigest(), public.digest, ids.hexdigest())
        return self._kept.get(
            (*parts, temperature), lambda: self._heard(values, public, like, temperature)
        )

    @torch.no_grad()
    def _heard(self, values: Floats, public: Public, like: Buckets, temperature: float) -> Buckets:
        self.stand(values)
        parts: list[Buckets] = []
        for run in self.runs(public.examples):
            at = slice(int(public.starts[run.start]), int(public.starts[run.stop]))
            logits = self.logits(public.examples[run]).float().cpu().numpy()
            parts.append(
                cut(
                    logits,
                    public.targets[at],
                    ids=like.ids[at],
                    choices=bool(public.choices),
                    temperature=temperature,
                )
            )
        return joined(parts)

    def runs(self, examples: Sequence[Example]) -> Iterator[slice]:
        """Runs of `examples` whose logits are not too much memory at once."""
        low = positions = 0
        for number, one in enumerate(examples):
            positions += len(one.targets)
            if number > low and (positions * self.width > _AT_ONCE or number - low == _HEARD_ROWS):
                yield slice(low, number)
                low, positions = number, len(one.targets)
        yield slice(low, len(examples))

    def _named(self, whole: Any) -> list[_Part]:
        blocks, parts = self._blocks, list[_Part]()
        for tensor, slots in self._loras.slots.items():
            name = module(blocks.architecture, tensor)
            if name is None:
                raise EngineError(f"{tensor} is no matrix of Hugging Face's {blocks.architecture}")
            height = blocks.blocks[slots[0]].shape[0]
            rows = their_rows(blocks.architecture, tensor, self._heads, height)
            parts.append(_Part(name, self._loras.moving_a[tensor], slots, rows))
            _check(whole, name, height, blocks.blocks[slots[0]].d_in)
        if len(blocks.output_rows):
            parts.append(_Part("lm_head", {}, [], np.empty(0, np.int64)))
            width = next(b.shape[1] for b in blocks.blocks if b.kind == "output_rows")
            _check(whole, "lm_head", None, width)
        return parts

    def _place(self) -> None:
        """The selector of output rows is in its place, and what theta does not move is still."""
        for part in self._parts:
            a, b = self._matrices(part)
            if part.module == "lm_head" and not part.blocks_b:
                with torch.no_grad():
                    b.zero_()
                    b[self._blocks.output_rows, torch.arange(b.shape[1])] = 1.0
                b.requires_grad_(False)
                continue
            if not part.blocks_a:
                a.requires_grad_(False)
            elif len(part.blocks_a) < len(a):
                moves = torch.zeros(len(a), 1, device=self._device)
                moves[list(part.blocks_a)] = 1.0
                a.register_hook(moves.mul)

    def _rank(self, part: _Part) -> int:
        return len(part.blocks_b) or len(self._blocks.output_rows)

    def _tensor(self, part: _Part) -> str:
        return self._blocks.blocks[part.blocks_b[0]].tensor

    def _matrices(self, part: _Part) -> tuple[Tensor, Tensor]:
        layer = self._peft.base_model.model.get_submodule(part.module)
        return layer.lora_A["default"].weight, layer.lora_B["default"].weight

    def _output_rows(self, values: Floats) -> Floats:
        numbers = [n for n, block in enumerate(self._blocks.blocks) if block.kind == "output_rows"]
        return np.concatenate([self._blocks.part(number, values) for number in numbers])

    def _put_output_rows(self, rows: Floats, values: Floats) -> None:
        offsets, done = self._blocks.offsets, 0
        for number, block in enumerate(self._blocks.blocks):
            if block.kind == "output_rows":
                part = rows[done : done + len(block.rows)]
                values[offsets[number] : offsets[number + 1]] = part.ravel()
                done += len(block.rows)


def check_tokens(folder: Path, public: Public, large: Vocabulary) -> None:
    """Find a checkpoint that reads the public rows otherwise than the large model does.

    Raises:
        EngineError: says what it reads otherwise.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise EngineError(
            f"{folder}: transformers loads no tokenizer from there, put the model's own beside the "
            f"checkpoint: {error}"
        ) from error
    for one in public.examples[:_COMPARED_ROWS]:
        text = str(tokenizer.decode(one.tokens.tolist()))
        theirs = [int(token) for token in tokenizer.encode(text, add_special_tokens=False)]
        ours = large.tokenize(text, start=False)
        if theirs != ours:
            raise EngineError(
                f"the tokenizers of {folder} and of the large model differ on {text[:60]!r}: only "
                "models that share one can be added up"
            )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition("\n")[0]
        raise EngineError(f"--device {name}: {why}; `cpu` is always there") from error
    return device


def _loaded(folder: Path, architecture: str) -> Any:
    if not (folder / "config.json").is_file():
        raise EngineError(f"{folder}: no config.json; name the checkpoint's folder (--small)")
    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise EngineError(f"{folder}: transformers cannot load it: {error}") from error
    whole, report = loaded
    if missing := sorted(report["missing_keys"]):  # which transformers would make up
        raise EngineError(
            f"{folder}: the checkpoint has no {missing[0]}, and {len(missing) - 1} more are "
            "missing; name a whole one (--small)"
        )
    kind = str(whole.config.model_type)
    if kind != (wanted := _MODEL_TYPES.get(architecture, architecture)):
        raise EngineError(
            f"{folder} is a {kind}, the job's model a {wanted}; name its own checkpoint, of the "
            "language model alone"
        )
    whole.requires_grad_(False)
    return whole


def _check(whole: Any, name: str, height: int | None, width: int) -> None:
    try:
        shape = tuple(whole.get_submodule(name).weight.shape)
    except AttributeError as error:
        raise EngineError(f"the checkpoint has no {name}; name the job's own (--small)") from error
    if shape[1] != width or (height is not None and shape[0] != height):
        raise EngineError(
            f"{name} of the checkpoint has shape {list(shape)}, the job's {[height or '?', width]};"
            " name the job's own (--small)"
        )
