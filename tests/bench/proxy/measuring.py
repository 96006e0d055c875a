"""Every mode on the same rows: each model's logits once, through llama.cpp, the rest in numpy."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from shared.adapter import UNIT, Adapter
from shared.dataset import Row as DatasetRow
from shared.dataset.records import Record
from shared.dataset.rows import Meaning
from shared.engine import scoring
from shared.engine.examples import choice_tokens, example
from shared.engine.llama import LlamaEngine, LlamaModel
from shared.engine.model import Adaptation, Example, Losses, Tokenizer
from shared.messages import Task
from tests.bench.learn.tasks import Row
from tests.bench.proxy.plan import ALPHAS, LARGE, SMALL, gguf

THREADS = 1


class Adapted(msgspec.Struct, frozen=True):
    """An adapter of the small model, as it is published."""

    manifest: bytes
    snapshot: bytes

    @property
    def adapter(self) -> Adapter:
        return Adapter.from_bytes(self.manifest, self.snapshot)

    @property
    def blocks(self) -> Adaptation:
        adapter = self.adapter
        made = adapter.manifest
        offsets = adapter.layout.offsets
        return Adaptation(made.architecture, made.seed, made.epoch, made.blocks, offsets)

    def at(self, values: NDArray[np.float32]) -> "Adapted":
        """The same blocks at `values`, (d,) float32, as theta's integers hold them."""
        adapter = self.adapter
        adapter.theta = np.rint(values.astype(np.float64) / UNIT).astype(np.int32)
        return Adapted(self.manifest, adapter.to_bytes())


def opened(path: Path, max_tokens: int, adapted: Adapted | None = None) -> LlamaModel:
    """The model in `path`, at the adapter if there is one."""
    engine = LlamaEngine()
    facts = engine.inspect(str(path), [], "{text}")
    blocks = adapted.blocks if adapted else Adaptation(facts.architecture, 0, 0, [], [0])
    model = engine.open(str(path), blocks, THREADS, max_tokens)
    if adapted is not None:
        model.stand(adapted.adapter.values())
    return model


def measured(task: Task, rows: Sequence[Row], tuned: Mapping[str, Adapted]) -> dict[str, Losses]:
    """Losses of `rows` by mode.

    `tuned` has adapters of the small model by name, one of them `small`. There are `large`,
    `small_base`, those names, and `ensemble_<alpha>` for each of ALPHAS.
    """
    with ExitStack() as models_open:
        models = {
            "large": opened(gguf(LARGE), task.max_tokens),
            "small_base": opened(gguf(SMALL), task.max_tokens),
        }
        for name, adapted in tuned.items():
            models[name] = opened(gguf(SMALL), task.max_tokens, adapted)
        for model in models.values():
            models_open.callback(model.close)
        tokenizer = models["large"]
        found = examples(task, rows, tokenizer)
        choices = None
        if task.loss == "choices":
            choices = np.array(choice_tokens(task, tokenizer), np.int64)
        targets = np.concatenate([one.targets for one in found]).astype(np.int64)
        weight = np.array([len(one.targets) for one in found], np.int64)
        sums = {name: _Sum(weight, choices) for name in (*models, *map(ensemble, ALPHAS))}
        # The layout follows from the examples alone, so the models' batches are the same.
        done = 0
        for batch in zip(*(model.logits(found) for model in models.values()), strict=True):
            logits = dict(zip(models, batch, strict=True))
            moved = logits["small"] - logits["small_base"]
            for alpha in ALPHAS:
                logits[ensemble(alpha)] = logits["large"] + np.float32(alpha) * moved
            for name, said in logits.items():
                sums[name].add(done, said, targets[done : done + len(moved)])
            done += len(moved)
    return {name: one.losses for name, one in sums.items()}


def ensemble(alpha: float) -> str:
    """What the mode is called."""
    return f"ensemble_{alpha:g}"


def examples(task: Task, rows: Sequence[Row], tokenizer: Tokenizer) -> list[Example]:
    """Rows as tokens, as a device understands them."""
    meaning = Meaning(task)
    return [
        example(found, task, tokenizer)
        for row in rows
        for found in meaning.rows(Record(1, json.dumps(row).encode()))
        if isinstance(found, DatasetRow)
    ]


class _Sum:
    """One mode's losses by row, gathered batch by batch."""

    def __init__(self, weight: NDArray[np.int64], choices: NDArray[np.int64] | None) -> None:
        self._weight, self._choices = weight, choices
        self._owners = np.repeat(np.arange(len(weight)), weight)
        self._loss = np.zeros(len(weight))
        self._wrong = np.zeros(len(weight), np.int64)

    def add(self, first: int, logits: scoring.Logits, targets: NDArray[np.int64]) -> None:
        """Logits of the positions from `first` on."""
        at_site, right = scoring.losses(logits, targets, self._choices)
        owners = self._owners[first : first + len(targets)]
        np.add.at(self._loss, owners, at_site)
        np.add.at(self._wrong, owners, ~right)

    @property
    def losses(self) -> Losses:
        return Losses(self._loss, self._weight, self._wrong == 0)
