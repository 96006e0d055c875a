"""What is learned: rows of public data on devices, as the real system would find them in files.

Classification is by label words. Training rows: at most 4,000, seeded, without repeats and without
any text that is held out. They are dealt to 16 devices by Dirichlet(0.5) over the labels, drawn
again until each device has at least 30 rows; evenly; or, for clinc150, one device a domain.

| dataset | training rows of | held out |
|---|---|---|
| ag_news, trec, clinc150 | train | 1,000 rows of test (of trec all, 500) |
| sst2 | train | all 872 rows of validation; test has no labels |
| e2e_nlg | cleaned_test | 300 rows of cleaned_test |

e2e_nlg: the models have read cleaned_dev as plain text, so cleaned_test alone serves both sides. It
is split by meaning: no set of attributes, in whatever order, is on both. Its rows are dealt by the
kind of food, and are few in the held-out part because every token of theirs is predicted.

The folders are SEEDWIRE_DATA and SEEDWIRE_MODELS, or ../shared/data and ../shared/models beside the
repository.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from deploy.demo.processes import ROOT
from shared.engine.llama import LlamaEngine
from shared.messages import Task

DATA = Path(os.environ.get("SEEDWIRE_DATA", ROOT.parent / "shared/data"))
MODELS = Path(os.environ.get("SEEDWIRE_MODELS", ROOT.parent / "shared/models"))
MODEL = MODELS / "llama-3m"
DATASETS = ("ag_news", "trec", "sst2", "clinc150", "e2e_nlg")
TRAINING_ROWS = 4000
DEVICES = 16
LEAST_ROWS = 30
"""On each device."""
CONCENTRATION = 0.5
DRAWS = 10_000
MAX_TOKENS = 256
"""Of a row; the longest of ag_news are cut."""

Split = Literal["dirichlet", "iid", "domains"]
Row = dict[str, str]
Random = np.random.Generator


@dataclass(frozen=True)
class LearnTask:
    """One dataset, dealt to devices."""

    name: str
    """`<dataset>-<split>-<seed>`."""
    task: Task
    devices: dict[str, list[Row]]
    """Training rows by device: `text` and `label`, or `prompt` and `completion`."""
    heldout: list[Row]

    def model(self, quantisation: str = "q8_0") -> Path:
        """The GGUF file that devices run."""
        return there(MODEL / f"{quantisation}.gguf")

    @property
    def checkpoint(self) -> Path:
        """The same model for transformers, a folder."""
        return there(MODEL)


@dataclass(frozen=True)
class _Source:
    """How a classification dataset becomes rows."""

    training: str
    heldout: str
    heldout_rows: int
    template: str
    words: dict[str, str]
    """Label word by the label's name; empty: found among the parts of each name."""


_SOURCES = {
    "ag_news": _Source(
        "train",
        "test",
        1000,
        "{text}\nTopic:",
        {"World": "World", "Sports": "Sports", "Business": "Business", "Sci/Tech": "Technology"},
    ),
    "trec": _Source(
        "train",
        "test",
        500,
        "{text}\nTopic:",
        {
            "ABBR": "Abbreviation",
            "DESC": "Description",
            "ENTY": "Entity",
            "HUM": "Human",
            "LOC": "Location",
            "NUM": "Number",
        },
    ),
    "sst2": _Source(
        "train", "validation", 1000, "{text}\nIt was", {"negative": "terrible", "positive": "great"}
    ),
    "clinc150": _Source("train", "test", 1000, "{text}\nTopic:", {}),
}
_E2E_HELDOUT_ROWS = 300


def learn_task(dataset: str, seed: int, split: Split = "dirichlet") -> LearnTask:
    """`dataset` as `seed` chooses and deals its rows; the same on every machine.

    Raises:
        SystemExit: no such dataset or split of it, or its files are not there; names the mend.
    """
    random = np.random.default_rng([seed, len(dataset), *dataset.encode()])
    if dataset == "e2e_nlg":
        task = Task("tokens", max_tokens=MAX_TOKENS)
        training, heldout = _generation(random)
    elif dataset in _SOURCES:
        source = _SOURCES[dataset]
        training, heldout = _classification(dataset, source, random)
        task = Task("choices", source.template, _label_words(source, training), MAX_TOKENS)
    else:
        raise SystemExit(f"learn: no dataset {dataset!r}; it is one of {', '.join(DATASETS)}")
    dealt = _dealt(training, split, random)
    return LearnTask(
        name=f"{dataset}-{split}-{seed}",
        task=task,
        devices={name: _bare(rows) for name, rows in dealt.items()},
        heldout=_bare(heldout),
    )


def _classification(dataset: str, source: _Source, random: Random) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows of `text`, `label`, `group` (the label) and `domain`."""

    def rows(file: str) -> list[Row]:
        found = {row["text"]: row for row in read(dataset, file) if row["text"].strip()}
        return [
            {
                "text": text,
                "label": row["label_name"],
                "group": row["label_name"],
                "domain": row.get("domain", ""),
            }
            for text, row in found.items()
        ]

    heldout = some(rows(source.heldout), source.heldout_rows, random)
    known = {row["text"] for row in heldout}
    training = [row for row in rows(source.training) if row["text"] not in known]
    return some(training, TRAINING_ROWS, random), heldout


def _generation(random: Random) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows of e2e_nlg: `prompt`, `completion` and `group` (the food)."""
    by_meaning: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in read("e2e_nlg", "cleaned_test"):
        attributes = re.findall(r"(\w[\w ]*\[[^\]]*\])", row["mr"])
        food = [one for one in attributes if one.startswith("food[")]
        prompt, completion = row["mr"] + "\n", row["ref"]
        by_meaning.setdefault(tuple(sorted(attributes)), {})[prompt + completion] = {
            "prompt": prompt,
            "completion": completion,
            "group": food[0] if food else "none",
        }
    meanings = [list(rows.values()) for rows in by_meaning.values()]
    heldout: list[Row] = []
    training: list[Row] = []
    for number in random.permutation(len(meanings)):
        (heldout if len(heldout) < _E2E_HELDOUT_ROWS else training).extend(meanings[number])
    return some(training, TRAINING_ROWS, random), heldout[:_E2E_HELDOUT_ROWS]


def _label_words(source: _Source, training: Sequence[Row]) -> dict[str, str]:
    """Each label's word, with the space before it; their first tokens all differ."""
    labels = sorted({row["label"] for row in training})
    if source.words:
        return {label: f" {source.words[label]}" for label in labels}
    choices = {label: _spellings(label) for label in labels}
    flat = [word for words in choices.values() for word in words]
    model = str(there(MODEL / "q8_0.gguf"))
    first = dict(zip(flat, LlamaEngine().inspect(model, flat, source.template).tokens, strict=True))
    owners: dict[int, str] = {}
    found: dict[str, str] = {}

    def claim(label: str, tried: set[int]) -> bool:
        """Give `label` the first of its words whose token is free or can be freed."""
        for word in choices[label]:
            token = first[word]
            if token in tried:
                continue
            tried.add(token)
            if token not in owners or claim(owners[token], tried):
                owners[token] = label
                found[label] = word
                return True
        return False

    for label in labels:
        if not claim(label, set()):
            raise SystemExit(f"learn: no word is left for label {label!r}; give it one of its own")
    return found


def _spellings(label: str) -> list[str]:
    """The words that may stand for `label`, the best first: its own, then their tails."""
    words = label.split("_")
    tried = [" ".join(words), *words, *(word.capitalize() for word in words)]
    tried += [word[start:] for word in words for start in range(1, len(word))]
    return [f" {word}" for word in dict.fromkeys(tried)]


def _dealt(training: list[Row], split: Split, random: Random) -> dict[str, list[Row]]:
    """`training` by device."""
    if split == "domains":
        domains = sorted({row.get("domain", "") for row in training})
        if "" in domains:
            raise SystemExit("learn: only clinc150 has domains; deal this one by dirichlet or iid")
        return {one: [row for row in training if row["domain"] == one] for one in domains}
    if split == "iid":
        owners = random.permutation(np.arange(len(training)) % DEVICES)
    else:
        groups = np.unique([row["group"] for row in training], return_inverse=True)[1]
        owners = _by_dirichlet(groups, random)
    return {
        f"device-{device:02}": [training[n] for n in np.flatnonzero(owners == device)]
        for device in range(DEVICES)
    }


def _by_dirichlet(groups: NDArray[np.int64], random: Random) -> NDArray[np.int64]:
    """A device for each row: each group's rows are shared out in Dirichlet proportions."""
    for _ in range(DRAWS):
        owners = np.zeros(len(groups), np.int64)
        for group in range(int(groups.max()) + 1):
            rows = random.permutation(np.flatnonzero(groups == group))
            shares = random.dirichlet(np.full(DEVICES, CONCENTRATION)).cumsum()
            owners[rows] = np.searchsorted(shares[:-1], (np.arange(len(rows)) + 0.5) / len(rows))
        if np.bincount(owners, minlength=DEVICES).min() >= LEAST_ROWS:
            return owners
    raise SystemExit(f"learn: no split of {len(groups)} rows leaves each device {LEAST_ROWS}")


def _bare(rows: list[Row]) -> list[Row]:
    """What a device's file holds: nothing that only dealing needed."""
    return [{k: v for k, v in row.items() if k not in ("group", "domain")} for row in rows]


def some(rows: list[Row], count: int, random: Random) -> list[Row]:
    """So many, in an order of chance."""
    return [rows[n] for n in random.permutation(len(rows))[:count]]


def read(dataset: str, file: str) -> list[Row]:
    """The rows of a file, as they are. Raises SystemExit where it is missing."""
    with there(DATA / dataset / f"{file}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def there(path: Path) -> Path:
    """`path`. Raises SystemExit where it is missing, and says what to set."""
    if not path.exists():
        raise SystemExit(f"{path} is missing; set SEEDWIRE_DATA and SEEDWIRE_MODELS")
    return path
