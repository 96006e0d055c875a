"""One run as it is asked for, and the folder that keeps what finished runs came to.

A run is known by all that its numbers follow from: every setting, also those that nobody gave, so
that a default which changes makes another run. How far it may go is not part of that: a kept
run that had less to spend than is wanted now, or stopped at a lower goal, is made again.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from deploy.demo.processes import ROOT
from services.console.spec import wanted
from tests.bench.learn.curve import Curve, Measure, Point
from tests.bench.learn.pacing import MOST_POINTS
from tests.bench.learn.settings import HARNESS, TORCH, Table, measure, settings
from tests.bench.learn.tasks import Split

CACHE = Path(os.environ.get("LEARN_CACHE", ROOT / ".bench/learn"))


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """`goal` is the value of `measure` at which a run that gains nothing more may stop.

    `job` holds a job's tables, `torch` the numbers of a row in torch, whose model is in float and
    has no `quantisation`.
    """

    row: str
    dataset: str
    seed: int
    split: Split = "dirichlet"
    quantisation: str = "q8_0"
    job: dict[str, dict[str, Any]] = {}
    torch: dict[str, Any] = {}
    commits_between: int = 1000
    most_points: int = MOST_POINTS
    budget_tokens: int
    goal: float | None = None
    measure: Measure = "accuracy"

    @property
    def name(self) -> str:
        """Names what the run's numbers follow from."""
        of = msgspec.to_builtins(self)
        for bound in ("budget_tokens", "goal", "measure"):
            del of[bound]
        digest = hashlib.sha256(json.dumps([HARNESS, of], sort_keys=True).encode()).hexdigest()
        return f"{self.dataset}-{self.row}-{self.seed}-{digest[:12]}"


def order(
    row: str,
    dataset: str,
    seed: int,
    *,
    budget_tokens: int,
    goal: float | None = None,
    changes: Table | None = None,
    split: Split = "dirichlet",
    quantisation: str = "q8_0",
    most_points: int = MOST_POINTS,
) -> Order:
    """`row` with its settings on `dataset`, and `changes` to them as of Settings.with_.

    Raises:
        ConfigError: there is no such setting; names it.
    """
    chosen = settings(row, dataset).with_(changes or {})
    in_torch = row in TORCH
    return Order(
        row=row,
        dataset=dataset,
        seed=seed,
        split=split,
        quantisation="" if in_torch else quantisation,
        job={} if in_torch else _settled(row, dataset, chosen.job),
        torch=_completed(row, chosen.torch) if in_torch else {},
        commits_between=chosen.commits_between,
        most_points=most_points,
        budget_tokens=budget_tokens,
        goal=goal,
        measure=measure(dataset),
    )


def kept(order: Order, folder: Path = CACHE) -> Curve | None:
    """What the run came to, if it was made and went far enough for `order`."""
    try:
        record = json.loads((folder / f"{order.name}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    curve, made = Curve.of(record["curve"]), msgspec.convert(record["order"], Order)
    if curve.ended == "budget" and made.budget_tokens < order.budget_tokens:
        return None
    if curve.ended == "goal" and not _enough(made, order):
        return None
    return curve


def keep(order: Order, curve: Curve, folder: Path = CACHE) -> None:
    """`curve` is there for whoever asks next; its points so far are not needed any more."""
    record = {"order": msgspec.to_builtins(order), "curve": curve.record()}
    _write(folder / f"{order.name}.json", json.dumps(record, indent=1))
    (folder / f"{order.name}.points").unlink(missing_ok=True)


def so_far(order: Order, points: Sequence[Point], folder: Path = CACHE) -> None:
    """The points of a run that goes on, for people."""
    lines = [json.dumps(msgspec.to_builtins(point)) + "\n" for point in points]
    _write(folder / f"{order.name}.points", "".join(lines))


def _settled(row: str, dataset: str, job: Mapping[str, Table]) -> dict[str, Table]:
    """All of a job's tables, with what the console would fill in."""
    # What the labels are is the task's; that there are any settles what is tuned.
    labels = {"a": " a", "b": " b"} if measure(dataset) == "accuracy" else {}
    tables: dict[str, object] = {
        **job,
        "task": {"labels": labels},
        "tuning": {**job.get("tuning", {}), "method": row},
        "evaluation": {"every_rounds": 0},
    }
    found = wanted({}, tables)
    return {
        "adapter": msgspec.to_builtins(found.adapter),
        "tuning": msgspec.to_builtins(found.spec.tuning),
        "pacing": msgspec.to_builtins(found.spec.pacing),
        # The judge stands outside the fleet: nothing else of this table changes a run.
        "evaluation": {"every_rounds": 0, "enough_devices": 1},
    }


def _completed(row: str, given: Table) -> Table:
    from tests.bench.learn import torch_rows  # torch only where it is needed

    kind = torch_rows.HeadSettings if row == "head" else torch_rows.CeilingSettings
    return msgspec.to_builtins(msgspec.convert(given, kind))


def _enough(made: Order, order: Order) -> bool:
    """Whether the goal at which a run stopped is as far as that of `order`."""
    if order.goal is None or made.goal is None:
        return False
    return made.goal >= order.goal if order.measure == "accuracy" else made.goal <= order.goal


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
