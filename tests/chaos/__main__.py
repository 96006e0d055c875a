"""`python -m tests.chaos`: many schedules, and what came of them as JSON lines.

A schedule that breaks a promise is told with the fewest faults that break one, and on stderr how.

--schedules N    how many; their seeds are --seed, --seed + 1, ...
--seed S         repeats a schedule exactly: what a violation prints
--processes N    side by side
--live N         and so many over real processes, as `python -m tests.chaos.live` runs them
"""

import argparse
import asyncio
import json
import os
import sys
import time

from shared.logs import configure
from tests.chaos.faults import Scenario, scenario
from tests.chaos.live.__main__ import tell_live
from tests.chaos.live.many import figures as live_figures
from tests.chaos.live.many import reports_of as live_reports_of
from tests.chaos.live.plan import a_plan
from tests.chaos.many import at_every_step, figures, reports_of
from tests.chaos.telling import say, tell
from tests.chaos.world import shrunk

SHOWN = 3
"""So many violations are shrunk and told in full."""
LAST_LINES = 80


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--schedules", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every-step", action="store_true")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--live", type=int, default=0)
    given = parser.parse_args()
    configure("chaos", level="critical")
    seeds = range(given.seed, given.seed + given.schedules)
    scenarios = at_every_step(given.seed) if given.every_step else list(map(scenario, seeds))
    began = time.perf_counter()
    reports = reports_of(scenarios, given.processes)
    seconds = time.perf_counter() - began
    both = zip(scenarios, reports, strict=True)
    broken = [one for one, report in both if report.violations]
    for one in broken[:SHOWN]:
        _tell(one)
    plans = [a_plan(seed) for seed in range(given.seed, given.seed + given.live)]
    live = asyncio.run(live_reports_of(plans, given.processes, tell_live))
    for figure in figures([*reports, *live], seconds):
        say(figure.line())
    for figure in live_figures(live) if live else []:
        say(figure.line())
    broken_live = sorted(report.seed for report in live if report.violations)
    say(json.dumps({"broken": sorted({one.seed for one in broken}), "broken_live": broken_live}))
    return 1 if broken or broken_live else 0


def _tell(broken: Scenario) -> None:
    """The seed of what broke, the fewest faults that break it, and on stderr what then happened."""
    fewest, report = shrunk(broken)
    tell(report, "tests.chaos", [fault.text() for fault in fewest.faults], LAST_LINES)


if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    sys.exit(main())
