"""Every number of every row, by data set: what tuning trials chose, and where they began.

`job` holds the tables of a job's settings (`adapter`, `tuning`, `pacing`), as an operator would
write them; a method's own defaults (services/console/methods.py) stand where nothing is said.
`torch` holds the numbers of the two rows that are gradients in torch. GRID is what tuning tries:
four trials a row, the same for each.
"""

from dataclasses import dataclass, field
from typing import Any

from tests.bench.learn.curve import Measure
from tests.bench.learn.tasks import Split

HARNESS = 1
"""Part of every cached run's name: raised when the same settings would give other numbers."""

FORWARD_ONLY = ("fwdllm", "fedkseed", "fedkseed-pro", "mezo")
"""The methods that the tenth is measured against."""
TORCH = ("head", "ceiling")
ROWS = (*FORWARD_ONLY, "head", "seedwire", "ceiling")
SHARES = (0.5, 0.75, 0.9)
OVER_OURS = 10
"""A row that seedwire is compared with may spend at least so many times its tokens."""

BUDGET = {"ag_news": 3_300_000, "trec": 1_000_000, "sst2": 1_500_000, "clinc150": 2_000_000}
BUDGET_GENERATION = 3_000_000
TRIAL_TOKENS = {"ag_news": 400_000, "trec": 200_000, "sst2": 200_000, "clinc150": 400_000}
TRIAL_TOKENS_GENERATION = 400_000
"""What one tuning trial may spend."""
TRIAL_SEED = 100
"""Of tuning trials; no seed of the table."""

Table = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """A data set as it is dealt and run; `seeds` at most."""

    dataset: str
    split: Split = "dirichlet"
    quantisation: str = "q8_0"
    rows: tuple[str, ...] = ROWS
    seeds: int = 3


FEW = ("ceiling", "seedwire", "mezo")
PLACES: dict[str, Place] = {
    "ag_news": Place("ag_news"),
    "trec": Place("trec"),
    # The whole vocabulary's rows by plain gradients: hours for what the block's LoRA does better.
    "e2e_nlg": Place("e2e_nlg", rows=tuple(row for row in ROWS if row != "head")),
    "sst2": Place("sst2", rows=FEW, seeds=1),
    "clinc150": Place("clinc150", "domains", rows=FEW, seeds=1),
    "ag_news_iid": Place("ag_news", "iid", rows=FEW, seeds=1),
    "ag_news_q4_k_m": Place("ag_news", quantisation="q4_k_m", rows=FEW, seeds=1),
}
"""By what DATASET calls them."""


@dataclass(frozen=True)
class Settings:
    """One row's numbers on one data set."""

    job: dict[str, Table] = field(default_factory=dict[str, Table])
    torch: Table = field(default_factory=Table)
    commits_between: int = 1000
    """The judge measures at least so often; else by tokens spent."""

    def with_(self, changes: Table) -> "Settings":
        """These with `changes`, whose keys are `table.field`, or fields of `torch`."""
        job = {name: dict(table) for name, table in self.job.items()}
        torch = dict(self.torch)
        for key, value in changes.items():
            table, _, name = key.rpartition(".")
            (job.setdefault(table, {}) if table else torch)[name] = value
        return Settings(job, torch, self.commits_between)


def settings(row: str, dataset: str) -> Settings:
    """What `row` runs with on `dataset`."""
    chosen = CHOSEN.get((row, dataset), CHOSEN.get((row, ""), {}))
    return START[row].with_(chosen)


def measure(dataset: str) -> Measure:
    """What `dataset` is judged by."""
    return "loss" if dataset == "e2e_nlg" else "accuracy"


def budget(row: str, dataset: str, ours: float = 0.0) -> int:
    """Forward tokens that `row` may spend where seedwire needs `ours` to 75 %."""
    least = BUDGET.get(dataset, BUDGET_GENERATION)
    return max(least, round(OVER_OURS * ours)) if row in FORWARD_ONLY else least


# Virtual devices never fail, so nobody is called in excess and nothing comes late.
_PACING: Table = {"over_selection": 1.0, "lateness_rounds": 0, "deadline_s": 600.0}

START: dict[str, Settings] = {
    "mezo": Settings(
        {
            "tuning": {"rounds": 20_000, "directions": 1, "batch_rows": 8, "step": 1e-2},
            "pacing": {**_PACING, "enough_devices": 4},
        }
    ),
    "fwdllm": Settings(
        {
            "tuning": {
                "rounds": 200,
                "directions": 8,
                "batch_rows": 4,
                "variance": "normalised",
                "threshold": 0.1,
                "most_more": 4,
                "step": 1e-1,
            },
            "pacing": {**_PACING, "enough_devices": 4},
        }
    ),
    "fedkseed": Settings(
        {
            "tuning": {
                "rounds": 200,
                "local_steps": 30,
                "batch_rows": 4,
                "eps": 1e-2,
                "step": 1e-3,
            },
            "pacing": {**_PACING, "enough_devices": 4},
        }
    ),
    "seedwire": Settings(
        {"tuning": {}, "pacing": {**_PACING, "enough_devices": 16}}, commits_between=2
    ),
    "head": Settings(),
    "ceiling": Settings(),
}
START["fedkseed-pro"] = START["fedkseed"]

CHOSEN: dict[tuple[str, str], Table] = {
    # A device a domain, and 150 labels take their time.
    ("seedwire", "clinc150"): {"pacing.enough_devices": 10, "tuning.rounds": 150},
    ("seedwire", "trec"): {"tuning.rounds": 100},
    ("head", "trec"): {"learning_rate": 0.015},
    ("head", "ag_news"): {"learning_rate": 0.01},
    ("ceiling", ""): {"learning_rate": 3e-3},
    ("ceiling", "trec"): {"learning_rate": 1e-3},
    ("mezo", "ag_news"): {"tuning.step": 3e-2},
    ("mezo", "e2e_nlg"): {"tuning.step": 3e-2},
    ("mezo", "trec"): {"tuning.step": 1e-2},
    ("fwdllm", "ag_news"): {"tuning.step": 3e-2},
    ("fwdllm", "e2e_nlg"): {"tuning.step": 1e-1},
    ("fwdllm", "trec"): {"tuning.step": 3e-2},
    ("fedkseed", "ag_news"): {"tuning.step": 1e-2},
    ("fedkseed-pro", "ag_news"): {"tuning.step": 1e-2},
    ("fedkseed", "e2e_nlg"): {"tuning.step": 1e-2},
    ("fedkseed-pro", "e2e_nlg"): {"tuning.step": 1e-2},
    ("fedkseed", "trec"): {"tuning.step": 3e-3},
    ("fedkseed-pro", "trec"): {"tuning.step": 3e-3},
}
"""By row and data set (or `""`): what tuning chose, where it differs from START."""

GRID: dict[str, list[Table]] = {
    "mezo": [{"tuning.step": step} for step in (1e-3, 1e-2, 3e-2, 1e-1)],
    "fwdllm": [{"tuning.step": step} for step in (3e-2, 1e-1, 3e-1, 1.0)],
    "fedkseed": [{"tuning.step": step} for step in (3e-4, 1e-3, 3e-3, 1e-2)],
    "fedkseed-pro": [{"tuning.step": step} for step in (3e-4, 1e-3, 3e-3, 1e-2)],
    "seedwire": [
        {"tuning.local_steps": steps, "tuning.local_rate": rate}
        for steps, rate in ((4, 0.01), (4, 0.025), (16, 0.003), (16, 0.006))
    ],
    "head": [{"learning_rate": rate} for rate in (0.003, 0.006, 0.01, 0.015)],
    "ceiling": [{"learning_rate": rate} for rate in (1e-3, 2e-3, 3e-3, 6e-3)],
}
