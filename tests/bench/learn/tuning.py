"""Tuning trials: `python -m tests.bench.learn.tuning ROW DATASET`.

Four a row, by its GRID, on a seed that the table does not use, each with the same tokens to spend;
the lowest held-out loss wins (the last point's: a run that came back up is not a good one). What is
chosen is written into settings.CHOSEN by hand.
"""

import asyncio
import json
import math
import os
import sys

from tests.bench.learn.curve import Curve
from tests.bench.learn.orders import order
from tests.bench.learn.settings import (
    GRID,
    ROWS,
    TRIAL_SEED,
    TRIAL_TOKENS,
    TRIAL_TOKENS_GENERATION,
)
from tests.bench.learn.tasks import DATASETS
from tests.bench.learn.workers import Workers

TRIAL_POINTS = 4
"""Held-out rows cost the machine more than the trial itself; only the last point is judged."""


async def trials(row: str, dataset: str, at_once: int) -> list[tuple[dict[str, object], Curve]]:
    """Each trial's changes and what it came to, the best first."""
    workers = Workers(at_once)
    changes = GRID[row]
    spend = TRIAL_TOKENS.get(dataset, TRIAL_TOKENS_GENERATION)
    orders = [order(row, dataset, TRIAL_SEED, budget_tokens=spend, changes=one) for one in changes]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(workers.curve(one)) for one in orders]
    found = [(change, task.result()) for change, task in zip(changes, tasks, strict=True)]
    return sorted(found, key=lambda one: _loss(one[1]))


def _loss(curve: Curve) -> float:
    return math.inf if curve.ended == "diverged" else curve.last.loss


def main() -> int:
    if len(sys.argv) != 3 or sys.argv[1] not in ROWS or sys.argv[2] not in DATASETS:
        print(f"give a row ({', '.join(ROWS)}) and a dataset ({', '.join(DATASETS)})")
        return 2
    row, dataset = sys.argv[1:]
    found = asyncio.run(trials(row, dataset, int(os.environ.get("LEARN_JOBS") or 2)))
    for changes, curve in found:
        last = curve.last
        record = {
            **changes,
            "loss": round(_loss(curve), 4),
            "accuracy": round(last.accuracy, 4),
            "forward_tokens": last.forward_tokens,
            "ended": curve.ended,
        }
        print(json.dumps(record), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
