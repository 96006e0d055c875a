"""Many schedules, side by side, and what they come to together."""

import multiprocessing
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from shared.logs import configure
from tests.bench.figure import Figure
from tests.chaos.faults import Fault, Kind, Scenario, scenario
from tests.chaos.world import Report, run

WORDS = ("measured", "sent", "folded", "late", "duplicate", "too_late", "rejected")


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
        *(Figure(f"chaos.updates.{word}", updates[word], "updates") for word in WORDS),
        *(
            Figure(f"chaos.faults.{kind.replace(' ', '_')}", n, "faults")
            for kind, n in sorted(injected.items())
        ),
    ]


def reports_of(scenarios: Sequence[Scenario], processes: int) -> list[Report]:
    """What became of each schedule, in their order."""
    if processes < 2 or len(scenarios) < 2:
        return [_one(given) for given in scenarios]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return pool.map(_one, scenarios, chunksize=8)


def at_every_step(seed: int) -> list[Scenario]:
    """The fleet of a seed with one fault in each: a kill, or a power cut, at each boundary."""
    alone = replace(scenario(seed), faults=[])
    made: list[Scenario] = []
    for name, steps in _one(alone).steps.items():
        kinds: list[Kind] = ["kill", "power_cut"] if name in alone.names else ["kill"]
        for step in range(1, steps + 1):
            for kind in kinds:
                fault = Fault(0, kind, name, at_step=step, for_s=0.5)
                made.append(replace(alone, faults=[fault]))
    return made


def _one(given: Scenario) -> Report:
    configure("chaos", level="critical")
    return run(given)
