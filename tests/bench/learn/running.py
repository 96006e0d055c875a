"""One run, from an order to a curve: `python -m tests.bench.learn.running ORDER`, an order as JSON.

What it comes to is left in the cache folder. Peak memory is that of a real engine's child process,
which is asked once more what one device's was asked in round 1.
"""

import asyncio
import hashlib
import json
import os
import sys
import tempfile
import zlib
from pathlib import Path

import msgspec

from services.console.manifest import manifest
from services.console.spec import wanted
from shared.codec import encode_manifest
from shared.engine.llama import LlamaEngine
from shared.engine.process import EngineProcess
from shared.logs import configure
from shared.messages import SubmitJob, Variant
from tests.bench.learn.curve import Curve
from tests.bench.learn.fleet import JOB, Fleet
from tests.bench.learn.orders import Order, keep, so_far
from tests.bench.learn.pacing import Pace
from tests.bench.learn.settings import TORCH
from tests.bench.learn.tasks import LearnTask, learn_task

ENGINE_S = 600.0
NICE = 5
"""Runs take hours, and whoever works here beside them goes first."""


def run(order: Order) -> Curve:
    """What the order's run comes to; its points are on disk as they come."""
    task = learn_task(order.dataset, order.seed, order.split)
    if order.row in TORCH:
        from tests.bench.learn import torch_rows  # torch only where it is needed

        if order.row == "head":
            numbers = msgspec.convert(order.torch, torch_rows.HeadSettings)
            return torch_rows.head(task, numbers, order.seed)
        numbers = msgspec.convert(order.torch, torch_rows.CeilingSettings)
        return torch_rows.ceiling(task, numbers, order.seed)
    return _federated(order, task)


def submission(order: Order, task: LearnTask) -> SubmitJob:
    """The job that an operator with these settings would submit."""
    model = task.model(order.quantisation)
    words = list(task.task.labels.values())
    facts = LlamaEngine().inspect(str(model), words, task.task.template)
    tables: dict[str, object] = {**order.job, "task": msgspec.to_builtins(task.task)}
    found = wanted({}, tables, last_block=bool(facts.last_block))
    spec = msgspec.structs.replace(found.spec, task=task.task)
    data = model.read_bytes()
    made = manifest(
        facts,
        found.adapter,
        labels=task.task.labels,
        variant=Variant(hashlib.sha256(data).hexdigest(), len(data), model.name),
        seed=zlib.crc32(f"learn {order.dataset} {order.seed}".encode()),
        momentum=spec.tuning.momentum > 0,
    )
    return SubmitJob(job=JOB, spec=spec, manifest=encode_manifest(made))


def _federated(order: Order, task: LearnTask) -> Curve:
    submitted = submission(order, task)
    pace = Pace(
        order.budget_tokens, order.commits_between, order.goal, order.measure, order.most_points
    )
    fleet = Fleet(task, submitted, task.model(order.quantisation), pace, order.seed)
    fleet.grown = lambda: so_far(order, fleet.points)
    fleet.run()
    return Curve(
        row=order.row,
        dataset=order.dataset,
        seed=order.seed,
        points=tuple(fleet.points),
        peak_mb=asyncio.run(_peak_mb(fleet, task)),
        ended=fleet.ended,
        facts={name: float(count) for name, count in fleet.facts.items()},
    )


async def _peak_mb(fleet: Fleet, task: LearnTask) -> float:
    """Resident memory of a real device's engine at its work of round 1, MB."""
    asked = fleet.round_one()
    if asked is None:
        return 0.0
    opening, work = asked
    process = EngineProcess("llama")
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        held = task.devices[opening.device]
        rows.write_text("".join(json.dumps(row) + "\n" for row in held), encoding="utf-8")
        opening = msgspec.structs.replace(opening, data=str(rows))
        try:
            await process.ask(opening, timeout_s=ENGINE_S)
            await process.ask(work, timeout_s=ENGINE_S)
            return process.peak_rss_mb
        finally:
            await process.close()


def main() -> int:
    configure("learn", level="error")
    os.nice(NICE)
    order = msgspec.json.decode(sys.argv[1].encode(), type=Order)
    keep(order, run(order))
    return 0


if __name__ == "__main__":
    sys.exit(main())
