"""The steps to a table, each kept on disk: `python -m tests.bench.proxy.steps STEP PLAN`.

A step is made in a process of its own (virtual time has an event loop of its own, torch and
llama.cpp hold memory); what it came to is a file in the cache, named by all that it follows from.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from shared.engine.model import Losses
from shared.logs import configure
from tests.bench.learn.curve import Curve
from tests.bench.proxy.measuring import Adapted, measured
from tests.bench.proxy.plan import CACHE, Plan, Rows, judge, rows, steps

Record = dict[str, Any]

AFTER = {
    "distilled": ("tuned",),
    "answered": ("tuned",),
    "measured": ("tuned", "distilled", "answered"),
}
"""What a step needs, of the steps that its data set has."""
MODES = {"tuned": "small", "distilled": "distilled", "answered": "distilled_answers"}
"""What the small model is called with the adapter that a step leaves."""
NICE = 5


class Slice(msgspec.Struct, frozen=True):
    """One mode's losses by row."""

    loss: list[float]
    weight: list[int]
    right: list[bool]

    @property
    def losses(self) -> Losses:
        right = np.array(self.right, np.bool_)
        return Losses(np.array(self.loss), np.array(self.weight, np.int64), right)


def path(step: str, plan: Plan) -> Path:
    """Where the step's result lies, or will."""
    if step == "tuned":
        of = [plan.job]
    elif step == "ceiling":
        of = [plan.ceiling]
    else:
        of = [plan.job, plan.public_rows, plan.distil_steps]
        of += steps(plan.dataset) if step == "measured" else []
    return CACHE / f"{plan.name(step, msgspec.to_builtins(of))}.json"


def make(step: str, plan: Plan) -> None:
    """The step's result lies in the cache; the steps it needs have been made."""
    began = time.perf_counter()
    found = rows(plan)
    record: Record
    match step:
        case "tuned":
            record = _tuned(plan, found)
        case "ceiling":
            record = _ceiling(plan, found)
        case "measured":
            record = _measured(plan, found)
        case _:
            record = _distilled(plan, found, answers=step == "answered")
    keep(path(step, plan), {**record, "wall_s": time.perf_counter() - began})


def _tuned(plan: Plan, found: Rows) -> Record:
    from tests.bench.proxy.tuning import tuned

    manifest, snapshot, came_to = tuned(plan, found)
    return {"manifest": manifest.hex(), "snapshot": snapshot.hex(), "curve": came_to.record()}


def _ceiling(plan: Plan, found: Rows) -> Record:
    from tests.bench.proxy.tuning import ceiling

    return {"curve": ceiling(plan, found).record()}


def _distilled(plan: Plan, found: Rows, *, answers: bool) -> Record:
    from tests.bench.proxy.teaching import distilled, strength  # torch only where it is needed

    task, small = found.task.task, adapted("tuned", plan)
    alpha = strength(task, found.validation, small, judge(plan.dataset))
    taught = distilled(task, found.public, small, alpha, plan.distil_steps, answers=answers)
    return {"manifest": taught.manifest.hex(), "snapshot": taught.snapshot.hex(), "alpha": alpha}


def _measured(plan: Plan, found: Rows) -> Record:
    tuned = {MODES[one]: adapted(one, plan) for one in steps(plan.dataset) if one in MODES}
    slices: dict[str, dict[str, Slice]] = {}
    for name, part in (("heldout", found.task.heldout), ("validation", found.validation)):
        slices[name] = {
            mode: Slice(losses.loss.tolist(), losses.weight.tolist(), losses.right.tolist())
            for mode, losses in measured(found.task.task, part, tuned).items()
        }
    return {"slices": msgspec.to_builtins(slices)}


def adapted(step: str, plan: Plan) -> Adapted:
    """Of `tuned`, `distilled` or `answered`."""
    record = kept(step, plan)
    return Adapted(bytes.fromhex(str(record["manifest"])), bytes.fromhex(str(record["snapshot"])))


def keep(where: Path, record: Record) -> None:
    where.parent.mkdir(parents=True, exist_ok=True)
    part = where.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(record), encoding="utf-8")
    part.replace(where)


def kept(step: str, plan: Plan) -> Record:
    """What the step came to; it has been made."""
    return json.loads(path(step, plan).read_text(encoding="utf-8"))


def curve(step: str, plan: Plan) -> Curve:
    """Of `tuned` or `ceiling`."""
    return msgspec.convert(kept(step, plan)["curve"], Curve)


def main() -> int:
    configure("proxy", level="error")
    os.nice(NICE)
    step, plan = sys.argv[1], msgspec.json.decode(sys.argv[2].encode(), type=Plan)
    make(step, plan)
    return 0


if __name__ == "__main__":
    sys.exit(main())
