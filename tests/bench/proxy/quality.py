"""The table of `make bench NAME=proxy`: what each mode of the proxy is worth.

On three data sets: large alone, small alone before and after the fleet tuned it, their ensemble at
three strengths, the small one after the server distilled the ensemble into it, and, as the ceiling,
the large model tuned directly. All modes are measured on the same held-out rows; plan.py says where
rows come from.

DATASET names one of them or several (with commas; all if not set); QUICK=1 has fewer rounds of
everything. PROXY_JOBS steps are made at once (2), each one core's work. What was made is kept in
`.bench/proxy` (PROXY_CACHE), with the table `quality.md`.
"""

import asyncio
import os
import sys

import msgspec

from tests.bench.figure import Figure
from tests.bench.processes import RunFailed, run_module
from tests.bench.proxy.plan import CACHE, DATASETS, Plan, judge, plan, steps
from tests.bench.proxy.steps import AFTER, Slice, curve, kept, path
from tests.bench.proxy.table import Quality

ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
"""Of numpy and torch: each step is one core's work."""


async def figures() -> list[Figure]:
    """Every mode's figure of the data sets that were asked for; the tables are printed and kept.

    Raises:
        SystemExit: there is no such data set, or a step failed; says which.
    """
    tables = await qualities()
    text = "\n".join(table.markdown() for table in tables)
    (CACHE / "quality.md").write_text(text, encoding="utf-8")
    print(text, file=sys.stderr)
    return [figure for table in tables for figure in table.figures()]


async def qualities() -> list[Quality]:
    """What the modes came to; what is not kept yet is made. Raises as `figures`."""
    quick = os.environ.get("QUICK", "") not in ("", "0")
    names = [one for one in os.environ.get("DATASET", "").split(",") if one] or list(DATASETS)
    plans = [plan(name, quick=quick) for name in names]
    places = asyncio.Semaphore(int(os.environ.get("PROXY_JOBS") or 2))
    try:
        async with asyncio.TaskGroup() as group:
            for one in plans:
                group.create_task(_made(one, places))
    except* RunFailed as failed:
        first: BaseException = failed
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise SystemExit(str(first)) from None
    return [quality(one) for one in plans]


def quality(plan: Plan) -> Quality:
    """What the kept steps of `plan` say together."""
    found = msgspec.convert(kept("measured", plan)["slices"], dict[str, dict[str, Slice]])
    heldout, validation = (
        {mode: one.losses for mode, one in found[name].items()}
        for name in ("heldout", "validation")
    )
    top = curve("ceiling", plan)
    others = [step for step in steps(plan.dataset) if step != "ceiling"]
    return Quality(
        dataset=plan.dataset,
        judge=judge(plan.dataset),
        heldout=heldout,
        validation=validation,
        ceiling=top.last,
        in_float=top.points[0],
        took_s=top.last.wall_s + sum(float(kept(step, plan)["wall_s"]) for step in others),
    )


async def made(plan: Plan, step: str) -> None:
    """The step of `plan` is kept; it needs no other. Raises SystemExit where it failed."""
    if not path(step, plan).exists():
        try:
            await _run(step, plan)
        except RunFailed as failed:
            raise SystemExit(str(failed)) from None


async def _made(plan: Plan, places: asyncio.Semaphore) -> None:
    """Every step of `plan` is kept."""
    done = {step: asyncio.Event() for step in steps(plan.dataset)}

    async def one(step: str) -> None:
        for before in AFTER.get(step, ()):
            if before in done:
                await done[before].wait()
        if not path(step, plan).exists():
            async with places:
                await _run(step, plan)
        done[step].set()

    async with asyncio.TaskGroup() as group:
        for step in done:
            group.create_task(one(step))


async def _run(step: str, plan: Plan) -> None:
    await run_module(
        f"proxy: {step} of {plan.dataset}",
        "tests.bench.proxy.steps",
        step,
        msgspec.json.encode(plan).decode(),
        environment=ONE_THREAD,
    )
