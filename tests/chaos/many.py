"""Many schedules, side by side, and what they come to together."""

import multiprocessing
from collections import Counter

from shared.logs import configure
from tests.bench.figure import Figure
from tests.chaos.faults import scenario
from tests.chaos.world import Report, run


def figures(reports: list[Report], seconds: float) -> list[Figure]:
    """What all schedules together came to."""
    injected: Counter[str] = sum((report.injected for report in reports), Counter())
    updates: Counter[str] = sum((report.updates for report in reports), Counter())
    over_s = max((report.longest_over_s for report in reports), default=0.0)
    return [
        Figure("chaos.schedules", len(reports), "schedules"),
        Figure("chaos.violations", sum(bool(r.violations) for r in reports), "schedules"),
        Figure("chaos.updates_lost", sum(r.lost for r in reports), "updates"),
        Figure("chaos.updates_counted_twice", sum(r.twice for r in reports), "updates"),
        Figure("chaos.longest_round_over_bound_s", over_s, "s"),
        Figure("chaos.virtual_hours", sum(r.virtual_s for r in reports) / 3600, "h"),
        Figure("chaos.schedules_per_s", len(reports) / seconds, "1/s"),
        *(Figure(f"chaos.updates.{word}", n, "updates") for word, n in sorted(updates.items())),
        *(
            Figure(f"chaos.faults.{kind.replace(' ', '_')}", n, "faults")
            for kind, n in sorted(injected.items())
        ),
    ]


def reports_of(seeds: range, processes: int) -> list[Report]:
    """What became of the schedule of each seed, in their order."""
    if processes < 2 or len(seeds) < 2:
        return [_one(seed) for seed in seeds]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return pool.map(_one, seeds, chunksize=8)


def _one(seed: int) -> Report:
    configure("chaos", level="critical")
    return run(scenario(seed))
