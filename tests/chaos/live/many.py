"""Schedules of real processes, a few at a time."""

import asyncio
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.bench.figure import Figure
from tests.chaos.live.plan import Plan
from tests.chaos.live.schedule import run
from tests.chaos.world import Report


def figures(reports: Sequence[Report]) -> list[Figure]:
    """What only schedules over real processes have: real seconds."""
    seconds = [report.virtual_s for report in reports]
    over_s = max((report.longest_over_s for report in reports), default=0.0)
    return [
        Figure("chaos.live.schedules", len(reports), "schedules"),
        Figure("chaos.live.violations", sum(bool(r.violations) for r in reports), "schedules"),
        Figure("chaos.live.longest_round_over_bound_s", over_s, "s"),
        Figure("chaos.live.seconds_a_schedule", max(seconds, default=0.0), "s"),
    ]


async def reports_of(
    plans: Sequence[Plan], parallel: int, told: Callable[[Report], None] = lambda report: None
) -> list[Report]:
    """What became of each plan, in their order; `told` hears of each when it has ended."""
    room = asyncio.Semaphore(parallel)

    async def one(plan: Plan) -> Report:
        async with room:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                report = await run(plan, Path(folder))
        told(report)
        return report

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(plan)) for plan in plans]
    return [task.result() for task in tasks]
