"""What the quality table is made of: models, rows, settings, and the name each result is kept by.

Devices, their rows and the held-out rows of ag_news and e2e_nlg are those of `NAME=learn`, seed 1
(learn/tasks.py says how they are dealt). Held-out rows are only reported; `validation` is what
routing chooses by; `public` is what the server distils on. Of ag_news texts alone are public; of
the others answers too, and there the small model is distilled twice: heard along the answers, and
taught them as well.

| dataset | validation | public |
|---|---|---|
| ag_news | 200 of the test rows that are not held out | other rows that no device holds |
| e2e_nlg | 200 by meaning, which devices give up | cleaned_dev without meanings used above |
| tinystories | 100 | 150 |

tinystories is what the large model knows more of than the small one, before anybody is tuned; of
the other two it does not. Its rows are stories, to be gone on with after their first sentence: 150
held out, 600 dealt evenly to 8 devices. Texts of e2e_nlg's cleaned_dev were in what the models were
pretrained on.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np

from deploy.demo.processes import ROOT
from services.proxy_inference.routing import Judge
from shared.messages import Task
from tests.bench.learn.orders import Order, order
from tests.bench.learn.settings import Table
from tests.bench.learn.tasks import MODELS, LearnTask, Row, learn_task, read, some, there

HARNESS = 1
"""Part of every kept result's name: raised when the same settings would give other numbers."""
CACHE = Path(os.environ.get("PROXY_CACHE", ROOT / ".bench/proxy"))
DATASETS = ("ag_news", "e2e_nlg", "tinystories")
SMALL, LARGE = "llama-1m", "llama-3m"
PARAMETERS = {SMALL: 1_311_872, LARGE: 3_410_176}
ALPHAS = (0.5, 1.0, 1.5)
SEED = 1
VALIDATION_ROWS = 200
STORIES = {"heldout": 150, "validation": 100, "public": 150}
"""Of tinystories; devices have the rest of its 1,000."""
STORY_DEVICES = 8
STORY_TOKENS = 192
_NEVER = 2**62
"""A budget of tokens that is never spent: jobs end by their rounds."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One data set's numbers."""

    dataset: str
    job: Order
    """Of the small model; its budget never ends it."""
    ceiling: Order
    """Of the large model."""
    public_rows: int = 1500
    distil_steps: int = 200

    def name(self, step: str, *parts: object) -> str:
        """Names what a step's result follows from: all that is its own, and `parts`."""
        of: dict[str, object] = {"dataset": self.dataset, "small": SMALL, "large": LARGE}
        of |= {"rows": VALIDATION_ROWS, "parts": parts}
        text = json.dumps([HARNESS, step, of], sort_keys=True, default=str)
        return f"{self.dataset}-{step}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def plan(dataset: str, *, quick: bool) -> Plan:
    """The numbers of `dataset`; `quick` has fewer rounds of everything.

    Raises:
        SystemExit: there is no such data set here.
    """
    if dataset not in DATASETS:
        raise SystemExit(f"proxy: no DATASET {dataset!r}; there are {', '.join(DATASETS)}")
    stories = dataset == "tinystories"
    rounds, ceiling_rounds = (15, 10) if quick else (20, 15) if stories else (60, 60)
    like = "e2e_nlg" if stories else dataset
    job: Table = {"tuning.rounds": rounds}
    if stories:
        job["pacing.enough_devices"] = STORY_DEVICES
    ceiling: Table = {"rounds": ceiling_rounds}
    if stories:  # so few rows are learned by heart at the rate of the others
        ceiling["learning_rate"] = 1e-3
    return Plan(
        dataset=dataset,
        job=order("seedwire", like, SEED, budget_tokens=_NEVER, changes=job),
        ceiling=order("ceiling", like, SEED, budget_tokens=_NEVER, changes=ceiling),
        public_rows=300 if quick else 1500,
        distil_steps=50 if quick else 200,
    )


def steps(dataset: str) -> list[str]:
    """What has to be made for `dataset`, in an order in which it can be."""
    answered = ["answered"] if judge(dataset) == "loss" else []
    return ["tuned", "ceiling", "distilled", *answered, "measured"]


def judge(dataset: str) -> Judge:
    """What the modes are compared by."""
    return "accuracy" if dataset == "ag_news" else "loss"


@dataclasses.dataclass(frozen=True)
class SmallTask(LearnTask):
    """What devices learn, on the small model."""

    def model(self, quantisation: str = "q8_0") -> Path:
        return gguf(SMALL, quantisation)

    @property
    def checkpoint(self) -> Path:
        return there(MODELS / SMALL)


@dataclasses.dataclass(frozen=True)
class Rows:
    """One data set: no row, and of e2e_nlg no meaning, is in two of the four parts."""

    task: LearnTask
    """Of the large model: the devices' rows, and the held-out ones."""
    validation: list[Row]
    public: list[Row]

    @property
    def small(self) -> SmallTask:
        task = self.task
        return SmallTask(task.name, task.task, task.devices, task.heldout)


def rows(plan: Plan) -> Rows:
    """The same on every machine."""
    random = np.random.default_rng([SEED, len(plan.dataset), 7])
    if plan.dataset == "tinystories":
        return _stories(random)
    task = learn_task(plan.dataset, SEED)
    made = _topics if plan.dataset == "ag_news" else _meanings
    return made(task, random, plan.public_rows)


def gguf(model: str, quantisation: str = "q8_0") -> Path:
    return there(MODELS / model / f"{quantisation}.gguf")


def _topics(task: LearnTask, random: np.random.Generator, public_rows: int) -> Rows:
    used = {row["text"] for row in _all(task)}
    test = {row["text"]: row for row in read("ag_news", "test") if row["text"] not in used}
    validation = [
        {"text": row["text"], "label": row["label_name"]}
        for row in some(list(test.values()), VALIDATION_ROWS, random)
    ]
    used |= {row["text"] for row in validation}
    free = {row["text"]: row for row in [*test.values(), *read("ag_news", "train")]}
    public = [{"text": text} for text in free if text not in used]
    return Rows(task, validation, some(public, public_rows, random))


def _meanings(task: LearnTask, random: np.random.Generator, public_rows: int) -> Rows:
    by_meaning: dict[tuple[str, ...], list[Row]] = {}
    for held in task.devices.values():
        for row in held:
            by_meaning.setdefault(_meaning(row["prompt"]), []).append(row)
    taken: set[tuple[str, ...]] = set()
    validation: list[Row] = []
    keys = list(by_meaning)
    for number in random.permutation(len(keys)):
        if len(validation) >= VALIDATION_ROWS:
            break
        taken.add(keys[number])
        validation += by_meaning[keys[number]]
    devices = {
        name: [row for row in held if _meaning(row["prompt"]) not in taken]
        for name, held in task.devices.items()
    }
    used = {_meaning(row["prompt"]) for row in _all(task)}
    public = [
        {"prompt": row["mr"] + "\n", "completion": row["ref"]}
        for row in read("e2e_nlg", "cleaned_dev")
        if _meaning(row["mr"]) not in used
    ]
    return Rows(
        dataclasses.replace(task, devices=devices),
        validation[:VALIDATION_ROWS],
        some(public, public_rows, random),
    )


def _stories(random: np.random.Generator) -> Rows:
    found: list[Row] = []
    for row in read("tinystories_1000", "all"):
        first, stop, rest = row["text"].strip().partition(". ")
        if rest:
            found.append({"prompt": first + stop.rstrip(), "completion": f" {rest}"})
    parts: dict[str, list[Row]] = {}
    left = some(found, len(found), random)
    for name, count in STORIES.items():
        parts[name], left = left[:count], left[count:]
    devices = {f"device-{n:02}": left[n::STORY_DEVICES] for n in range(STORY_DEVICES)}
    task = Task("tokens", max_tokens=STORY_TOKENS)
    learned = LearnTask(f"tinystories-iid-{SEED}", task, devices, parts["heldout"])
    return Rows(learned, parts["validation"], parts["public"])


def _meaning(prompt: str) -> tuple[str, ...]:
    """The set of attributes that a prompt of e2e_nlg gives, in whatever order."""
    return tuple(sorted(re.findall(r"(\w[\w ]*\[[^\]]*\])", prompt)))


def _all(task: LearnTask) -> Iterable[Row]:
    for held in task.devices.values():
        yield from held
    yield from task.heldout
